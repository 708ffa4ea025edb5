"""A split whose stages read nothing of each other's but hidden states, in place of one whose stages do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.crossing import uncut
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.messages import StageResult
from glmpp.dryrun.report import DryRunReport
from glmpp.layouts.split import balance


@dataclass(frozen=True)
class Uncut:
    """What was tried.

    Attributes:
        report: of the split with the smallest largest stage, of those that cut nothing; None if there is none.
        most: stages that there can be.
    """

    report: DryRunReport | None
    most: int


def try_uncut(checkpoint: Checkpoint, report: DryRunReport, **how) -> Uncut | None:
    """The deployment with another split, run. Args: how: of `dry_run`. Returns: None where nothing is read across a cut."""
    if not report.crossings:
        return None
    results = [one for one in report.messages if isinstance(one, StageResult)]
    starts = uncut(results, report.stages[0].stage.num_layers)
    counts = balance(checkpoint, report.pp_size, report.deployment.drafter, starts)
    if counts is None:
        return Uncut(None, len(starts))
    return Uncut(dry_run(checkpoint, replace(report.deployment, layer_counts=counts), control=False, **how), len(starts))
