"""Since when does it load? Architectures by releases of vLLM, from a record that is part of the package.

`make releases` makes each release's share in an environment of that release: tiny checkpoints of every architecture that
counts on the newest, as they are and in block FP8, at PP=1 and PP=2, on a pretended GPU. Of an architecture's variants the
worst is what is kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from glmpp.dryrun.stage_report import LOADS
from glmpp.ledger import ABSENT, LOST, UNTIED

RECORD = Path(__file__).with_name("releases.json")
PP = 2
NOT_THERE, NOT_KNOWN = "not there yet", "not known"


@dataclass(frozen=True)
class Known:
    """What a release does with the tiny checkpoints of an architecture.

    Attributes:
        verdict: LOADS at PP=1 and PP=2, DIES, CANNOT_BUILD, INCOMPLETE, NOT_THERE, or NOT_KNOWN: PP=1 has no verdict.
        variant: which one says so; "" for LOADS and NOT_THERE.
        why: the exception and the key, the parameter of the first fault, or why it is not known.
        place: `file:line` of a death.
    """

    verdict: str
    variant: str = ""
    why: str = ""
    place: str = ""

    @property
    def failure(self) -> tuple[str, str]:
        """Its kind, and its file or the parameter that is left, as `glmpp.dryrun.advice.failures` says them."""
        kind, _, what = self.why.partition(": ")
        return kind, self.place.rpartition(":")[0] or numberless(what)


@dataclass(frozen=True)
class Release:
    """One release's share: architecture -> what is known, with versions, day, machine and target."""

    versions: dict[str, str]
    recorded: str
    machine: str
    gpu: str
    architectures: dict[str, Known] = field(repr=False)

    def verdict(self, architecture: str) -> str:
        return self.architectures.get(architecture, Known(NOT_KNOWN)).verdict


class Record:
    """Releases by their numbers, oldest first."""

    def __init__(self, releases: dict[str, Release]):
        self.releases = dict(sorted(releases.items(), key=lambda one: number(one[0])))

    @classmethod
    def load(cls, path: str | Path = RECORD) -> Record:
        content = json.loads(Path(path).read_text())
        for release in content.values():
            told = release["architectures"]
            release["architectures"] = {
                name: Known(one) if isinstance(one, str) else Known(**one) for name, one in told.items()
            }
        return cls({name: Release(**release) for name, release in content.items()})

    def nearest(self, architecture: str, release: str) -> str | None:
        """The nearest release that is known to load an architecture, of two as near the newer.

        Args:
            release: the one at hand; one that is not in the record is taken for the last before it.

        Returns:
            None where none is known to, and where the one at hand is: then the fault is not the architecture's.
        """
        names = list(self.releases)
        at = names.index(self.last(release))
        loading = [index for index, name in enumerate(names) if self.releases[name].verdict(architecture) == LOADS]
        if not loading or at in loading:
            return None
        return names[min(loading, key=lambda index: (abs(index - at), -index))]

    def last(self, release: str) -> str:
        """The last release of the record that is not after one; the first if all are."""
        before = [name for name in self.releases if number(name) <= number(release)]
        return before[-1] if before else next(iter(self.releases))

    def knows(self, architecture: str, release: str, failures: set[tuple[str, str]]) -> bool:
        """Whether what fails is what the record says of this architecture on this release, and nothing else fails.

        The record has of a death the one file, of what is left at init the first parameter.
        """
        known = self.releases[self.last(release)].architectures.get(architecture, Known(NOT_KNOWN))
        if known.verdict in (LOADS, NOT_KNOWN, NOT_THERE):
            return known.verdict == NOT_THERE
        alone = {kind for kind, _ in failures} <= {ABSENT, LOST, UNTIED} or failures == {known.failure}
        return known.failure in failures and alone


def numberless(name: str) -> str:
    """A parameter's name whatever its layer."""
    return re.sub(r"\d+", "0", name)


def number(release: str) -> tuple[int, ...]:
    """(0, 22, 1) of "0.22.1", "0.22.1+cpu", "0.22.1rc2"."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


@cache
def record() -> Record:
    """The one that the package brings."""
    return Record.load()


def nearest_release(config: dict, release: str) -> dict[str, str] | None:
    """The nearest release that is known to load what a config names, and where that is from; None if there is none."""
    for architecture in architectures(config):
        if nearest := record().nearest(architecture, release):
            source = f"from the record of {record().releases[nearest].recorded.removeprefix('on ')}, tiny checkpoints"
            return {"vllm": nearest, "architecture": architecture, "pp_size": PP, "source": source}
    return None


def in_record(config: dict, release: str, failures: set[tuple[str, str]]) -> bool:
    """Whether what fails is what the record says of what a config names."""
    return any(record().knows(architecture, release, failures) for architecture in architectures(config))


def architectures(config: dict) -> list[str]:
    names = config.get("architectures")
    return [name for name in (names if isinstance(names, list) else ()) if isinstance(name, str)]
