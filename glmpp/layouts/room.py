"""What would make a model fit that does not: more GPUs, a shorter context, a cache in FP8. Each is tried first."""

from __future__ import annotations

from functools import partial

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.fit import NO_FIT, Fit
from glmpp.dryrun.report import DryRunReport
from glmpp.layouts.plan import smallest_layouts

TRIES = 3  # of each kind


def would_fit(
    checkpoint: Checkpoint, report: DryRunReport, utilization: float | None = None, context: int | None = None, **how
) -> list[str]:
    """Lines that say what fits in place of a deployment that loads and does not; [] for others.

    Args:
        utilization, context: as they were asked for.
        how: of `dry_run`: strict, timeout.
    """
    if report.overall(utilization) != NO_FIT:
        return []
    found = report.fit(utilization)
    run = partial(dry_run, checkpoint, control=False, **how)
    same = partial(run, report.deployment, ranks=[stage.rank for stage in report.stages])
    lines = []
    for deployment in smallest_layouts(checkpoint, report.deployment, found.gpu.memory * found.share, of_a_request(report))[
        :TRIES
    ]:
        if fits(run(deployment, context=context), utilization):
            how = ", with --load-format glmpp" if deployment.guard == "loader" else ""
            lines.append(f"{deployment.gpus} x {found.gpu.name} hold it: {deployment.layout}{how}")
            break
    if any(memory.room(found.gpu, utilization) <= 0 for memory in found.memories):
        return lines
    if length := shorter(same, found, utilization):
        lines.append(f"with --max-model-len {length} it fits")
    if found.known and fits(same(context=context, cache="fp8"), utilization):
        lines.append("with --kv-cache-dtype fp8 it fits")
    return lines


def fits(report: DryRunReport, utilization: float | None) -> bool:
    """Whether what was run loads and is known to fit."""
    found = report.fit(utilization)
    return report.loads and found is not None and found.fits is True


def shorter(same, found: Fit, utilization: float | None) -> int | None:
    """The longest request that there is room for, in tokens. Args: same: runs the deployment with another `context`."""
    for _ in range(TRIES):
        if not found or not (length := found.tokens):
            return None
        again = same(context=length)
        if fits(again, utilization):
            return length
        found = again.fit(utilization)
    return None


def of_a_request(report: DryRunReport) -> float:
    """Bytes of KV cache that a request takes in one layer, at most; 0 if unknown."""
    caches = [(stage.memory.kv_cache, len(stage.stage.layers)) for stage in report.stages]
    return max((one.block_bytes * one.blocks_per_request / layers for one, layers in caches if one and layers), default=0)
