"""One release's share of the record of `releases`: made on the release that is installed, or taken from a full sweep."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from glmpp.progress import progress_bar
from glmpp.verdict.installed import ask_vllm
from glmpp.verdict.releases import NOT_KNOWN, NOT_THERE, PP, WORST_FIRST, Known, Release
from glmpp.verdict.stage_report import INCOMPLETE, LOADS
from glmpp.verdict.sweep import try_case
from glmpp.verdict.sweep_report import Case, Sweep

VARIANTS, TIED = ("plain", "fp8"), "tied"
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
    installed = ask_vllm({"kind": "architectures", "gpu": gpu})

    def tried(cases: list[tuple[str, str]]) -> list[Case]:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            done = pool.map(lambda case: try_case(*case, gpu, (1, PP)), cases)
            return list(progress_bar(done, f"vLLM {installed['versions']['vllm']}", total=len(cases), show=progress))

    done = tried([case for case in cases if case[0] in installed["names"]])
    silent = {case.architecture for case in done} - {case.architecture for case in done if case.counts}
    done += tried([(name, TIED) for name in sorted(silent) if (name, TIED) not in cases])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, CPU only"
    known = known_of(done, {name for name, _ in cases})
    return Release(installed["versions"], f"on {time.strftime('%Y-%m-%d')}", machine, gpu, known)


def release_of(newest: Sweep, architectures: Collection[str] | None = None) -> Release:
    """The share of a release that was swept in full, from that sweep's record: of all that counts there, or of these."""
    chosen = {case for case in cases_of(newest) if architectures is None or case[0] in architectures}
    cases = [case for case in newest.cases if (case.architecture, case.variant) in chosen]
    known = known_of(cases, {name for name, _ in chosen})
    return Release(newest.versions, newest.recorded or "live", newest.machine, newest.gpu, known)


def known_of(cases: list[Case], architectures: set[str]) -> dict[str, Known]:
    """The worst of each architecture's cases, tied if only that counts; NOT_THERE for one that has none."""
    known = {}
    for name in sorted(architectures):
        of = [case for case in cases if case.architecture == name]
        if any(case.counts for case in of) and not any(case.counts for case in of if case.variant in VARIANTS):
            of = [case for case in of if case.counts]
        told = sorted(map(known_from, of), key=lambda one: WORST_FIRST.index(one.verdict))
        known[name] = told[0] if told else Known(NOT_THERE)
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
