"""Make one release's share of the record "since when does it load?" (`glmpp.dryrun.releases`), and write the record.

A share is made on the release that is installed, or taken from a full sweep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from glmpp.dryrun.releases import NOT_KNOWN, NOT_THERE, PP, RECORD, Known, Record, Release
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.records import MACHINE, as_text, today
from sweep.cases import Case, Sweep
from sweep.run import call_in_vllm, try_all, try_case

VARIANTS, TIED = ("plain", "fp8"), "tied"
WORST_FIRST = (DIES, CANNOT_BUILD, INCOMPLETE, NOT_KNOWN, LOADS)
PATH = re.compile(r"(?<![\w.])/[\w./+-]+")  # of the machine


def cases_of(newest: Sweep) -> list[tuple[str, str]]:
    """(architecture, variant) to try on other releases: what counts on the newest, tied only where nothing else does."""
    counted: dict[str, list[str]] = {}
    for case in newest.counted:
        counted.setdefault(case.architecture, []).append(case.variant)
    chosen = {name: [one for one in variants if one in VARIANTS] or variants for name, variants in counted.items()}
    return [(name, variant) for name, variants in chosen.items() for variant in variants]


def try_release(cases: list[tuple[str, str]], gpu: str, workers: int | None = None, progress: bool | None = None) -> Release:
    """Try cases on the installed vLLM, and tied what has no verdict: some releases know an architecture in no other way.

    Raises:
        GlmppError: vLLM is not installed.
    """
    names, versions = call_in_vllm("known_architectures", gpu)

    def tried(cases: list[tuple[str, str]]) -> list[Case]:
        return try_all(lambda case: try_case(*case, gpu, (1, PP)), cases, f"vLLM {versions['vllm']}", workers, progress)

    done = tried([case for case in cases if case[0] in names])
    silent = {case.architecture for case in done} - {case.architecture for case in done if case.counts}
    done += tried([(name, TIED) for name in sorted(silent) if (name, TIED) not in cases])
    return Release(versions, today(), MACHINE, gpu, known_of(done, {name for name, _ in cases}))


def release_of(newest: Sweep, architectures: Collection[str] | None = None) -> Release:
    """The share of a release that was swept in full, taken from that sweep.

    Args:
        architectures: those of the share; default all that count in the sweep.
    """
    chosen = {case for case in cases_of(newest) if architectures is None or case[0] in architectures}
    cases = [case for case in newest.cases if (case.architecture, case.variant) in chosen]
    known = known_of(cases, {name for name, _ in chosen})
    return Release(newest.versions, newest.recorded or "live", newest.machine, newest.gpu, known)


def known_of(cases: list[Case], architectures: set[str]) -> dict[str, Known]:
    """The worst of each architecture's cases, tied if only that counts; NOT_THERE for one that has none."""
    known = {}
    for name in sorted(architectures):
        its_cases = [case for case in cases if case.architecture == name]
        counting = [case for case in its_cases if case.counts]
        if counting and all(case.variant == TIED for case in counting):
            its_cases = counting
        worst_first = sorted(map(known_from, its_cases), key=lambda one: WORST_FIRST.index(one.verdict))
        known[name] = worst_first[0] if worst_first else Known(NOT_THERE)
    return known


def known_from(case: Case) -> Known:
    if not case.counts:
        return Known(NOT_KNOWN, case.variant, PATH.sub("…", case.why).strip())
    for found in case.findings:
        if found.pp_size == PP:
            said = found.key or found.message or ", ".join(found.left_at_init[:2])
            why = f"{found.exception}: {said}" if found.exception else said
            return Known(found.verdict, case.variant, why, found.place or "")
    if case.left:
        name = min(case.left)
        return Known(INCOMPLETE, case.variant, f"{case.left[name].kind}: {name}")
    return Known(LOADS)


def renewed(before: Record, later: Record, whole: bool = True) -> Record:
    """A record with later shares in place of its own: whole ones, or their architectures alone."""
    releases = dict(before.releases)
    for name, share in later.releases.items():
        own = releases.get(name)
        if own and not whole:
            share = replace(own, architectures=dict(sorted({**own.architectures, **share.architectures}.items())))
        releases[name] = share
    return Record(releases)


def save(record: Record, path: str | Path = RECORD) -> None:
    """Write a record, an architecture a line; where there is nothing else to say, its verdict alone."""
    parts = []
    for name, release in record.releases.items():
        head = asdict(release)
        known = {one: said if said["why"] else said["verdict"] for one, said in head.pop("architectures").items()}
        parts.append(f"{json.dumps(name)}: {as_text(head, 'architectures', known)}")
    Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n")
