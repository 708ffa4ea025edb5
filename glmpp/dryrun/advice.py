"""What to do about a stage that does not load: does the load format cure it, and which release is known to load it?"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.releases import in_record, nearest_release, numberless
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, INCOMPLETE, LOADS, StageReport
from glmpp.formats.config import has_experts
from glmpp.ledger import ABSENT
from glmpp.partition import PARTITION_VARIABLE
from glmpp.serving import fixes

MOST_LAYOUTS = 3  # that are tried in place of one that fails
PLUGINS_VARIABLE = "VLLM_PLUGINS"  # names of those that vLLM loads, with commas between them


@dataclass(frozen=True)
class KnownFault:
    """A fault of some releases of vLLM, and the first that loads what it broke.

    Attributes:
        exception, file, function: what a stage dies of, and where.
        fixed_in: release.
        source: where that is from.
    """

    exception: str
    file: str
    function: str
    fixed_in: str
    source: str


KNOWN_FAULTS = [
    KnownFault(
        "KeyError",
        "vllm/model_executor/models/deepseek_v2.py",
        "_try_load_fp8_indexer_wk",
        "0.23.0",
        "vLLM PR 42944; every stage of PP = 2, 4, 8 was loaded with it",
    )
]


def failures(report: DryRunReport) -> set[tuple[str, str]]:
    """What the ranks end with: exception and file, or kind of incompleteness and parameter, its layer's number taken out."""
    raised = {(one.exception, one.place.rpartition(":")[0]) for stage in report.all for one in stage.failures}
    ended = [stage for stage in report.all if not stage.failures]  # what one leaves at init is no failure of its own
    return raised | {(stage.left[name].kind, numberless(name)) for stage in ended for name in stage.unaccounted}


def known_fault(stage: StageReport) -> KnownFault | None:
    """What is known of the fault that a stage dies of, if anything is."""
    if stage.verdict != DIES or stage.place is None:
        return None
    found = (stage.exception, stage.place.rpartition(":")[0], stage.function)
    return next((known for known in KNOWN_FAULTS if (known.exception, known.file, known.function) == found), None)


def fixed_in(report: DryRunReport) -> KnownFault | None:
    """The fault, if every failing stage has the same one and it is known."""
    faults = {known_fault(stage) for stage in report.stages if not stage.loads}
    return faults.pop() if len(faults) == 1 else None


def nearest_in_record(checkpoint: Checkpoint, report: DryRunReport) -> dict | None:
    """The nearest release that is known to load this architecture, from the record.

    Returns:
        None where no release would help: every rank loads or cannot be told, vLLM was not run as it is installed, what is
        missing is missing in the checkpoint, or the record knows of another failure than this one.
    """
    failing = [stage for stage in report.all if not stage.loads and stage.verdict != CANNOT_TELL]
    kinds = {stage.left[name].kind for stage in failing for name in stage.unaccounted}
    lacks = {stage.verdict for stage in failing} <= {INCOMPLETE} and kinds <= {ABSENT}
    if report.guard != "installed" or lacks:
        return None
    return nearest_release(checkpoint.config, report.versions["vllm"]) if is_in_record(checkpoint, report) else None


def is_in_record(checkpoint: Checkpoint, report: DryRunReport) -> bool:
    """Whether the record of releases knows this failure of this architecture."""
    return in_record(checkpoint.config, report.versions["vllm"], failures(report))


def nearest_line(nearest: dict) -> str:
    return (
        f"vLLM {nearest['vllm']} is the nearest release that is known to load {nearest['architecture']} "
        f"at PP={nearest['pp_size']} ({nearest['source']})"
    )


def try_load_format(checkpoint: Checkpoint, report: DryRunReport, **how) -> DryRunReport | None:
    """The stages that fail, once more with `--load-format glmpp`.

    Args:
        how: of `dry_run`: strict, timeout.

    Returns:
        None where that could change nothing: vLLM was not run as it is installed, no stage fails, or PP=1 fails, too.
    """
    failing = [stage.rank for stage in report.stages if stage.verdict != LOADS]
    sound = report.control is not None and report.control.loads
    if report.guard != "installed" or not failing or not sound:
        return None
    return dry_run(checkpoint, replace(report.deployment, guard="loader"), ranks=failing, control=False, **how)


def try_fixes(checkpoint: Checkpoint, report: DryRunReport, **how) -> DryRunReport | None:
    """The ranks that fail, once more with the load format and the fixes that are for this release, model and failure.

    Args:
        how: as for `try_load_format`.

    Returns:
        None where there are none, no rank fails or what fails cannot be told, or vLLM was not run as it is installed.
    """
    names = fixes.curing(report.versions["vllm"], checkpoint.config, failures(report))
    told = any(not stage.loads and stage.verdict != CANNOT_TELL for stage in report.all)
    if report.guard != "installed" or report.deployment.fixes or not told or not names:
        return None
    failing = [stage.rank for stage in report.stages if not stage.loads] or [report.stages[0].rank]
    deployment = replace(report.deployment, guard="loader", fixes=names)
    return dry_run(checkpoint, deployment, ranks=failing, control=report.control is not None, **how)


def with_cure(report: DryRunReport, again: DryRunReport) -> DryRunReport:
    """A deployment as a whole: the failing ranks with what may cure them, and beside them those that load without."""
    stages = sorted([*again.stages, *(stage for stage in report.stages if stage.loads)], key=lambda stage: stage.rank)
    messages = [*report.messages, *again.messages]
    return replace(again, stages=stages, messages=messages, crossings=again.crossings or report.crossings)


@dataclass(frozen=True)
class Tried:
    """Layouts of the same GPUs that were tried in place of one that fails, the first that loads the last of them."""

    tried: list[Deployment]
    loads: Deployment | None

    @property
    def names(self) -> list[str]:
        return [one.layout for one in self.tried]


def try_layouts(checkpoint: Checkpoint, report: DryRunReport, utilization: float | None = None, **how) -> Tried | None:
    """Other layouts of the same GPUs, until one loads and fits: experts spread, then fewer shards and more stages.

    Args:
        utilization, how: as in `glmpp.layouts.room.would_fit`; context, too.

    Returns:
        None where another layout would not help: no rank dies or is cut, a single GPU, or PP=1 without shards fails, too.
    """
    asked = report.deployment
    dies = any(stage.verdict in (DIES, CANNOT_BUILD) for stage in report.all)
    cut = any(stage.cuts for stage in report.all)
    alone = asked.tp * asked.dp == 1 and not (report.control and report.control.loads)
    if report.guard != "installed" or asked.fixes or not (dies or cut) or alone:
        return None
    layers, tried = report.stages[0].stage.num_layers, []
    for one in other_layouts(asked, layers, has_experts(checkpoint.config))[:MOST_LAYOUTS]:
        again = dry_run(checkpoint, one, control=False, **how)
        tried.append(one)
        if again.loads and not ((found := again.fit(utilization)) and found.fits is False):
            return Tried(tried, one)
    return Tried(tried, None)


def other_layouts(asked: Deployment, layers: int, experts: bool) -> list[Deployment]:
    """Layouts of the same GPUs, what is least different from the one that was asked for first."""
    base, found = replace(asked, layer_counts=None), []
    if experts and not asked.ep and asked.tp * asked.dp > 1:
        found.append(replace(base, ep=True))
    each = asked.tp * asked.pp
    smaller = [tp for tp in range(asked.tp - 1, 0, -1) if each % tp == 0]
    larger = [tp for tp in range(asked.tp + 1, each + 1) if each % tp == 0]
    for tp in smaller + larger:
        if each // tp <= layers:
            found.append(replace(base, tp=tp, pp=each // tp, ep=asked.ep and tp * asked.dp > 1))
    return found


def serve_line(
    model: str,
    deployment: Deployment,
    context: int | None = None,
    utilization: float | None = None,
    plugins: str | None = None,
) -> str:
    """The command that starts a server with a deployment: with the load format where that is its guard, or has its fixes.

    Args:
        context, utilization: as they were asked for, and counted with.
        plugins: VLLM_PLUGINS as it is set where the line is pasted; None: it is not, and vLLM takes all that are installed.
    """
    sizes = {"tensor": deployment.tp, "pipeline": deployment.pp, "data": deployment.dp}
    words = [f"--{name}-parallel-size {size}" for name, size in sizes.items() if size > 1]
    words += ["--enable-expert-parallel"] if deployment.ep else []
    words += [f"--max-model-len {context}"] if context else []
    words += [f"--gpu-memory-utilization {utilization:g}"] if utilization else []
    by_kit = deployment.guard == "loader" or bool(deployment.fixes)
    words += ["--load-format glmpp"] if by_kit else []
    if deployment.fixes:
        words += ["--model-loader-extra-config", shlex.quote(json.dumps({"fixes": list(deployment.fixes)}))]
    variables = [f"{PARTITION_VARIABLE}={deployment.partition}"] if deployment.partition and deployment.pp > 1 else []
    if plugins is not None and by_kit and "glmpp" not in plugins.split(","):
        variables.append(f"{PLUGINS_VARIABLE}={shlex.quote(','.join(filter(None, [plugins, 'glmpp'])))}")
    return " ".join([*variables, "vllm serve", shlex.quote(model), *words])
