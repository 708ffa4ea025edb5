"""One layout and what came of it, all layouts of some GPUs, and the order that they are told in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from glmpp import records
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit
from glmpp.dryrun.stage_report import CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.gpus import GPU

CRITERION = (
    "first those that load completely and hold a request of this length; of these first the most requests at a time, then "
    "the fewest stages. It is about memory, not speed: every token passes all stages, one after the other, and all GPUs of "
    "a stage exchange data in every layer, which over nodes needs a fast network"
)


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs, and what came of it.

    Attributes:
        deployment: with the split that leaves most room, its guard "installed" if vLLM's own load does, otherwise "loader".
        verdict: LOADS, or of the first rank that does not.
        why: what vLLM says to it, "" if it loads and vLLM says how much a token takes.
        fit: None if a stage was not built.
        even: tokens with vLLM's own split, where `deployment` has another.
        ran: ranks that were built and loaded for it.
    """

    deployment: Deployment
    verdict: str
    why: str
    fit: Fit | None
    even: int | None
    ran: int

    @property
    def requests(self) -> float:
        return (self.fit and self.fit.requests) or 0.0

    @property
    def tokens(self) -> int:
        return (self.fit and self.fit.tokens) or 0

    @property
    def serves(self) -> bool:
        """Whether it loads, all of it, and has room for one request."""
        return self.verdict == LOADS and self.requests >= 1

    @property
    def untold(self) -> bool:
        """Whether nobody knows if it serves: its verdict is missing, or what a token takes."""
        uncounted = self.verdict == LOADS and not (self.fit and self.fit.known)
        return self.verdict == CANNOT_TELL or uncounted

    @property
    def answer(self) -> str:
        """In a word or two: the verdict, or why it is no help that it loads."""
        if self.serves or self.verdict != LOADS:
            return "not complete" if self.verdict == INCOMPLETE else self.verdict
        return "loads, no room" if self.fit and self.fit.known else "loads, not counted"

    def brief(self) -> Layout:
        """The same without what each layer takes, and memories that are alike once: what a record needs."""
        if not self.fit:
            return self
        cut = [replace(m, layers=(), kv_cache=m.kv_cache and replace(m.kv_cache, pages=())) for m in self.fit.memories]
        return replace(self, fit=replace(self.fit, memories=list(dict.fromkeys(cut))))

    @property
    def rank(self) -> tuple:
        """Sorts the best first, see CRITERION."""
        return not self.serves, self.verdict != LOADS, -round(self.requests, 1), self.deployment.pp, self.deployment.ep


@dataclass(frozen=True)
class Layouts:
    """All layouts of some GPUs, best first.

    Attributes:
        asked: GPUs in all; tokens of a request.
        left: sizes that were not tried -> why.
        seconds: it took, on this machine.
        checkpoint: see `glmpp.records.digest`.
    """

    layouts: list[Layout]
    asked: tuple[int, int]
    gpu: GPU
    utilization: float | None
    left: dict[str, str]
    versions: dict[str, str]
    seconds: float
    recorded: str | None = None
    checkpoint: str | None = None

    @property
    def verdict(self) -> str:
        """LOADS if one serves, CANNOT_TELL if one of the others might, otherwise DIES."""
        if any(one.serves for one in self.layouts):
            return LOADS
        return CANNOT_TELL if any(one.untold for one in self.layouts) else DIES

    @property
    def source(self) -> str:
        """One line for a caption."""
        return records.caption(self.recorded, self.versions, f"a pretended {self.gpu.name}")

    def save(self, path: str | Path) -> None:
        """Write it down, with the day and the machine, so that `load` can show it where vLLM is not."""
        when, brief = f"{records.today()} on {records.MACHINE}", [one.brief() for one in self.layouts]
        head = msgspec.to_builtins(replace(self, recorded=when, layouts=brief))
        records.write(path, head, "layouts", head.pop("layouts"))

    @classmethod
    def load(cls, path: str | Path, question: dict | None = None) -> Layouts:
        """Read a record. Raises GlmppError if it answers another question, see `glmpp.layouts.search.question`."""
        found = records.decode(path, cls)
        records.check(path, question or {}, {**vars(found), "gpu": found.gpu.name})
        return found
