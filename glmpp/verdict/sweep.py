"""Is the class of bugs still alive? Every architecture of the installed vLLM that declares pipeline support, tried.

A case is an architecture with a tiny checkpoint that transformers saves, under the names of the hub: as it is, with tied
embeddings, and in block FP8. PP=1 must load for a case to count; then every stage of PP=2 and PP=3 is built and loaded by
the installed vLLM, and what fails is tried again with the load format "glmpp". A case whose load is not complete is loaded
once more with its real bytes, which have the last word.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.gpus import target_name
from glmpp.progress import progress_bar
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.dry_run import run_of, stage_request
from glmpp.verdict.forks import run_stages
from glmpp.verdict.installed import ask_vllm
from glmpp.verdict.report import DryRunReport, assemble
from glmpp.verdict.stage_report import CANNOT_TELL, INCOMPLETE, LOADS, StageReport
from glmpp.verdict.sweep_report import Case, Finding, Sweep
from glmpp.verdict.variants import write_block_fp8

SIZES = (1, 2, 3)
VARIANTS = ("plain", "tied", "fp8")
SECONDS_PER_CASE = 120
FOLDER = re.compile(r"/[^\s'\"]*glmpp-\w+(/model)?")


def sweep(
    architectures: list[str] | None = None,
    variants: tuple[str, ...] = VARIANTS,
    gpu: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Try architectures of the installed vLLM at PP=1, 2 and 3.

    Args:
        architectures: names as in config.json; default every one of the installed vLLM.
        variants: of "plain", "tied" (tie_word_embeddings), "fp8" (block FP8 of 128 x 128, quantised by the kit).
        gpu: the GPU that is pretended, as in `Deployment`.
        workers: cases at a time; default the number of cores.

    Raises:
        GlmppError: an architecture that the installed vLLM does not have, or vLLM is not installed.
    """
    started, gpu = time.perf_counter(), target_name(gpu)
    known = ask_vllm({"kind": "architectures", "gpu": gpu})
    if architectures is None:
        architectures = known["names"]
    if unknown := sorted(set(architectures) - set(known["names"])):
        raise GlmppError(f"vLLM {known['versions']['vllm']} has no architecture {unknown[0]!r}")
    cases = [(architecture, variant) for architecture in architectures for variant in variants]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = pool.map(lambda case: try_case(*case, gpu), cases)
        done = list(progress_bar(done, "sweeping", total=len(cases), show=progress))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, CPU only"
    return Sweep(done, known["versions"], machine, time.perf_counter() - started, gpu)


def try_case(architecture: str, variant: str, gpu: str, sizes: tuple[int, ...] = SIZES) -> Case:
    """Make a tiny checkpoint, load it at every size, PP=1 first, and again with the load format where that fails."""
    case, started = Case(architecture, variant), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        try:
            checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
            judge(case, dry_runs(checkpoint, Deployment(guard="installed", gpu=gpu), sizes))
            if case.left:
                prove(case, dry_runs(checkpoint, Deployment(guard="installed", gpu=gpu), (1,), "real"))
        except GlmppError as error:
            case.why = str(error).splitlines()[0]
        if case.findings:
            with contextlib.suppress(GlmppError):  # then they stay, with "cannot tell"
                failing = tuple(found.pp_size for found in case.findings)
                confirm(case, dry_runs(checkpoint, Deployment(guard="loader", gpu=gpu), failing))
    case.why = FOLDER.sub("…", case.why)
    case.seconds = round(time.perf_counter() - started, 1)
    return case


def tiny_checkpoint(architecture: str, variant: str, directory: Path, gpu: str | None = None) -> Checkpoint:
    """A case's checkpoint. Raises GlmppError, with the reason as its message, when there is none to be had."""
    request = {
        "kind": "tiny_model",
        "architecture": architecture,
        "directory": str(directory),
        "tied": variant == "tied",
        "gpu": gpu,
    }
    made = ask_vllm(request, SECONDS_PER_CASE)
    if "why" in made:
        raise GlmppError(made["why"])
    checkpoint = Checkpoint.from_directory(directory)
    if variant == "tied" and any(name.endswith("lm_head.weight") for name in checkpoint):
        raise GlmppError("cannot be tied")
    return write_block_fp8(checkpoint, directory.with_name("block-fp8")) if variant == "fp8" else checkpoint


def dry_runs(
    checkpoint: Checkpoint, deployment: Deployment, sizes: tuple[int, ...] = SIZES, weights: str = "meta"
) -> list[DryRunReport]:
    """`dry_run` of a deployment at several pipeline sizes in one fork, which imports the model's module once."""
    runs = [run_of(replace(deployment, pp=size), rank) for size in sizes for rank in range(size)]
    request = stage_request(checkpoint, deployment, weights)
    messages = run_stages(checkpoint, request, runs, workers=1, timeout=SECONDS_PER_CASE)
    reports = []
    for size in sizes:
        of_size = [message for message in messages if message.get("size", size) == size]
        evidence = {"real_group": False, "seconds": 0.0, "messages": of_size}
        of_its_size = replace(deployment, pp=size)
        reports.append(assemble(evidence, checkpoint, of_its_size, of_its_size.stages(checkpoint.config)))
    return reports


def judge(case: Case, reports: list[DryRunReport]) -> None:
    """Fill in a case's verdicts and findings."""
    (whole,) = reports[0].stages
    case.model_class, case.stand_ins = whole.model_class, sorted(whole.stand_ins)
    if case.model_class and ".transformers." in case.model_class:
        case.why = "not vLLM's own class: the transformers backend"
    elif whole.verdict not in (LOADS, INCOMPLETE):
        case.why = f"PP=1 {whole.verdict}: {whole.exception or ''} {(whole.message or '')[:150]}"
    for report in reports if case.counts else ():
        failing = [stage for stage in report.stages if fails(stage, whole.unaccounted)]
        case.verdicts[report.pp_size] = failing[0].verdict if failing else whole.verdict
        if failing:
            case.findings.append(finding(report.pp_size, failing[0]))
    if case.counts:
        case.left = {name: whole.left[name] for name in whole.unaccounted}


def fails(stage: StageReport, left: Iterable[str]) -> bool:
    """Whether a stage does worse than PP=1, which leaves some parameters at init."""
    if stage.verdict == INCOMPLETE:
        return not set(stage.unaccounted) <= set(left)
    return stage.verdict != LOADS


def prove(case: Case, reports: list[DryRunReport]) -> None:
    """What a load of real bytes says of the parameters that PP=1 leaves at init."""
    (whole,) = reports[0].stages
    case.left = {name: whole.left[name] for name in whole.unaccounted}
    if not case.left:
        case.verdicts = {size: LOADS if verdict == INCOMPLETE else verdict for size, verdict in case.verdicts.items()}


def finding(pp_size: int, stage: StageReport) -> Finding:
    return Finding(
        pp_size=pp_size,
        stage=stage.stage.rank,
        verdict=stage.verdict,
        exception=stage.exception,
        key=stage.key,
        message=(stage.message or "").split("\n")[0][:200],
        place=stage.place,
        tensor=stage.tensor,
        left_at_init=stage.unaccounted,
        with_load_format=CANNOT_TELL,
    )


def confirm(case: Case, reports: list[DryRunReport]) -> None:
    """What the same pipeline sizes do with the load format: every stage has to load for a finding to count as cured."""
    by_size = {report.pp_size: report for report in reports}
    for found in case.findings:
        left = [stage for stage in by_size[found.pp_size].stages if fails(stage, case.left)]
        found.with_load_format = (
            LOADS if not left else f"{left[0].verdict}: {left[0].place or ', '.join(left[0].unaccounted)}"
        )
