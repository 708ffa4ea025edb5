"""One layout and what came of it, all layouts of some GPUs, and the order that they are told in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from glmpp import records
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit, Memory
from glmpp.dryrun.stage_report import CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.gpus import GPU, gpu_of

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

    def plain(self) -> dict:
        """As values that JSON knows; memories that are alike once, without what each layer takes."""
        one, fit = self.deployment, None
        if self.fit:
            cut = [replace(m, layers=(), kv_cache=m.kv_cache and replace(m.kv_cache, pages=())) for m in self.fit.memories]
            fit = [asdict(memory) for memory in dict.fromkeys(cut)]
        layout = {"tp": one.tp, "pp": one.pp, "ep": one.ep, "layer_counts": one.layer_counts, "guard": one.guard}
        return {**layout, "verdict": self.verdict, "why": self.why, "even": self.even, "ran": self.ran, "memories": fit}

    @classmethod
    def of(cls, plain: dict, gpu: GPU, utilization: float | None) -> Layout:
        memories = plain.pop("memories")
        fit = memories and Fit([Memory.of(memory) for memory in memories], gpu, utilization)
        layout = {name: plain.pop(name) for name in ("tp", "pp", "ep", "layer_counts", "guard")}
        return cls(Deployment(**layout, gpu=gpu.name), fit=fit, **plain)

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
        head = {name: getattr(self, name) for name in ("asked", "utilization", "left", "versions", "seconds", "checkpoint")}
        head = {"recorded": f"{records.today()} on {records.MACHINE}", "gpu": self.gpu.name, **head}
        records.write(path, head, "layouts", [one.plain() for one in self.layouts])

    @classmethod
    def load(cls, path: str | Path, question: dict | None = None) -> Layouts:
        """Read a record. Raises GlmppError if it answers another question, see `glmpp.layouts.search.question`."""
        content = records.read(path, question)
        gpu = gpu_of(content.pop("gpu"))
        found = [Layout.of(plain, gpu, content["utilization"]) for plain in content.pop("layouts")]
        return cls(found, gpu=gpu, **{**content, "asked": tuple(content["asked"])})
