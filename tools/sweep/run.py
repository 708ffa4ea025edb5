"""Try the architectures of the installed vLLM that declare pipeline support, each with tiny checkpoints.

A case is an architecture with a tiny checkpoint that transformers saves, under the names of the hub: as it is, with tied
embeddings, or in block FP8. A case counts if PP=1 loads. Then every stage of PP=2 and PP=3 is built and loaded by the
installed vLLM. What fails is tried again with the load format "glmpp". A case whose load is not complete is loaded once
more with its real bytes, and these decide.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import Options, stage_request
from glmpp.dryrun.installed import ask_vllm
from glmpp.dryrun.messages import FunctionCall, StageResult
from glmpp.dryrun.report import DryRunReport, assemble
from glmpp.dryrun.stage_report import CANNOT_TELL, INCOMPLETE, LOADS, StageReport
from glmpp.dryrun.workers import TIMEOUT, run_stages
from glmpp.errors import GlmppError
from glmpp.gpus import target_name
from glmpp.progress import progress_bar
from glmpp.records import MACHINE
from sweep.block_fp8 import write_block_fp8
from sweep.cases import Case, Finding, Sweep

SIZES = (1, 2, 3)
VARIANTS = ("plain", "tied", "fp8")
SECONDS_PER_CASE = 120
FOLDER = re.compile(r"/[^\s'\"]*glmpp-\w+(/model)?")  # of a case's checkpoint
TOOLS = Path(__file__).resolve().parents[1]


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
    names, versions = call_in_vllm("known_architectures", gpu)
    if architectures is None:
        architectures = names
    if unknown := sorted(set(architectures) - set(names)):
        raise GlmppError(f"vLLM {versions['vllm']} has no architecture {unknown[0]!r}")
    cases = [(architecture, variant) for architecture in architectures for variant in variants]
    done = try_all(lambda case: try_case(*case, gpu), cases, "sweeping", workers, progress)
    return Sweep(done, versions, MACHINE, time.perf_counter() - started, gpu)


def call_in_vllm(function: str, gpu: str | None, timeout: float = TIMEOUT, **arguments: Any) -> Any:
    """What a function of `tiny_models` returns in a fork of the process that has imported vLLM.

    Raises:
        GlmppError: vLLM is not installed, or the function raised it.
    """
    call = FunctionCall(gpu=gpu, folder=str(TOOLS), function=f"sweep.tiny_models:{function}", arguments=arguments)
    return ask_vllm(call, timeout)


def try_all(try_one: Callable, cases: list, what: str, workers: int | None, progress: bool | None) -> list:
    """What a function returns for each case, some of them at a time, under a bar that says what is done."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(progress_bar(pool.map(try_one, cases), what, total=len(cases), show=progress))


def try_case(architecture: str, variant: str, gpu: str, sizes: tuple[int, ...] = SIZES) -> Case:
    """Make a tiny checkpoint, load it at every size, PP=1 first, and again with the load format where that fails."""
    case, started = Case(architecture, variant), time.perf_counter()
    stock, ours = Deployment(guard="installed", gpu=gpu), Deployment(guard="loader", gpu=gpu)
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        try:
            checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
            judge(case, dry_runs(checkpoint, stock, sizes))
            if case.left:
                prove(case, dry_runs(checkpoint, stock, (1,), "real"))
        except GlmppError as error:
            case.why = str(error).splitlines()[0]
        if case.findings:
            with contextlib.suppress(GlmppError):  # then they stay, with "cannot tell"
                confirm(case, dry_runs(checkpoint, ours, tuple(found.pp_size for found in case.findings)))
    case.why = FOLDER.sub("…", case.why)
    case.seconds = round(time.perf_counter() - started, 1)
    return case


def tiny_checkpoint(architecture: str, variant: str, directory: Path, gpu: str | None = None) -> Checkpoint:
    """A case's checkpoint. Raises GlmppError, with the reason as its message, when there is none to be had."""
    tied = variant == "tied"
    call_in_vllm("make", gpu, SECONDS_PER_CASE, architecture=architecture, directory=str(directory), tied=tied)
    checkpoint = Checkpoint.from_directory(directory)
    if tied and any(name.endswith("lm_head.weight") for name in checkpoint):
        raise GlmppError("cannot be tied")
    return write_block_fp8(checkpoint, directory.with_name("block-fp8")) if variant == "fp8" else checkpoint


def dry_runs(
    checkpoint: Checkpoint, deployment: Deployment, sizes: tuple[int, ...] = SIZES, weights: str = "meta"
) -> list[DryRunReport]:
    """`dry_run` of a deployment at several pipeline sizes in one fork, which imports the model's module once."""
    sized = {size: replace(deployment, pp=size) for size in sizes}
    runs = [sized[size].run(stage) for size in sizes for stage in range(size)]
    request = stage_request(checkpoint, deployment, Options(weights=weights))
    messages = run_stages(checkpoint, request, runs, workers=1, timeout=SECONDS_PER_CASE)
    reports = []
    for size in sizes:
        of_size = [one for one in messages if not isinstance(one, StageResult) or one.run.pp_size == size]
        reports.append(assemble(of_size, checkpoint, sized[size]))
    return reports


def judge(case: Case, reports: list[DryRunReport]) -> None:
    """Fill in a case's verdicts and findings."""
    (whole,) = reports[0].stages
    case.model_class, case.stand_ins = whole.model_class, sorted(whole.stand_ins)
    if case.model_class and ".transformers." in case.model_class:
        case.why = "not vLLM's own class: the transformers backend"
    elif whole.verdict not in (LOADS, INCOMPLETE):
        case.why = f"PP=1 {whole.verdict}: {whole.exception or ''} {(whole.message or '')[:150]}"
    if not case.counts:
        return
    for report in reports:
        failing = [stage for stage in report.stages if fails(stage, whole.unaccounted)]
        case.verdicts[report.pp_size] = failing[0].verdict if failing else whole.verdict
        if failing:
            case.findings.append(finding(report.pp_size, failing[0]))
    case.left = {name: whole.left[name] for name in whole.unaccounted}


def fails(stage: StageReport, left: Iterable[str]) -> bool:
    """Whether a stage does worse than PP=1, which leaves some parameters at init."""
    if stage.verdict == INCOMPLETE:
        return not set(stage.unaccounted) <= set(left)
    return stage.verdict != LOADS


def prove(case: Case, reports: list[DryRunReport]) -> None:
    """Keep of what PP=1 leaves at init only what a load of real bytes confirms."""
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
    """Say of each finding what the load format does: it is cured if every stage of that pipeline size loads."""
    by_size = {report.pp_size: report for report in reports}
    for found in case.findings:
        failing = [stage for stage in by_size[found.pp_size].stages if fails(stage, case.left)]
        where = failing and (failing[0].place or ", ".join(failing[0].unaccounted))
        found.with_load_format = f"{failing[0].verdict}: {where}" if failing else LOADS
