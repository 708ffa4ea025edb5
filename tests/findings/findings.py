"""What `upstream/findings.json` says, and what of it the recorded sweeps show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sweep.cases import Case

UPSTREAM = Path(__file__).resolve().parents[2] / "upstream"
CONTENT = json.loads((UPSTREAM / "findings.json").read_text())
RELEASE = CONTENT["release"]


@dataclass(frozen=True)
class Entry:
    """A finding, or the reason why a row of the record is none.

    Attributes:
        name: of the folder and of the fix; "" for what is no finding.
        architectures, variants: of the sweep's cases.
        places: `file:line` of the exceptions that it is about.
        left: patterns of the parameters, left at init, that it is about.
        targets: of the record's, those on which it shows.
        what, state, links: for the README.
        why: why it is no finding, or why there is no fix.
    """

    architectures: list[str]
    variants: list[str]
    name: str = ""
    places: tuple[str, ...] | list[str] = ()
    left: tuple[str, ...] | list[str] = ()
    targets: tuple[str, ...] | list[str] = ("cpu", "h100")
    what: str = ""
    state: str = ""
    links: tuple[str, ...] | list[str] = ()
    why: str = ""

    def is_about(self, case: Case) -> bool:
        return case.architecture in self.architectures and case.variant in self.variants

    def covers(self, parameter: str) -> bool:
        return any(fnmatchcase(parameter, pattern) for pattern in self.left)


FINDINGS = [Entry(**entry) for entry in CONTENT["findings"]]
OTHERS = [Entry(**entry) for entry in CONTENT["others"]]
FIXED = [entry for entry in FINDINGS if not entry.why]


def uncovered(case: Case) -> set[str]:
    """Places of a case's exceptions and parameters that it leaves at init of which no entry knows."""
    entries = [entry for entry in FINDINGS + OTHERS if entry.is_about(case)]
    places = {found.place for found in case.findings if found.place} - {place for entry in entries for place in entry.places}
    names = {*case.left, *(name for found in case.findings if not found.place for name in found.left_at_init)}
    return places | {name for name in names if not any(entry.covers(name) for entry in entries)}


def table() -> list[str]:
    """The README's rows."""
    rows = []
    for entry in FINDINGS:
        folder = f"[{entry.name}]({entry.name}){', no fix' * bool(entry.why)}"
        links = ", ".join(f"[{link.rpartition('/')[2]}]({link})" for link in entry.links)
        rows.append(f"| {folder} | {entry.what} | {entry.state}{f' ({links})' if links else ''} |")
    return rows
