"""The lines that end an answer: what would help, and the line to paste."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.cli.report_text import evidence_lines, label
from glmpp.dryrun.advice import (
    PLUGINS_VARIABLE,
    KnownFault,
    Tried,
    fixed_in,
    is_in_record,
    nearest_in_record,
    nearest_line,
    serve_line,
    with_cure,
)
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import NO_FIT
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import LOADS
from glmpp.layouts.uncut import Uncut
from glmpp.partition import PARTITION_VARIABLE
from glmpp.serving import fixes
from glmpp.words import MESSAGE, printable, shown

NO_RELEASE = "no release of vLLM is known here to load it"


def other_lines(options: argparse.Namespace, others: Tried | None) -> list[str]:
    """What was tried in place of the layout that was asked for, and the line to paste for the one that loads."""
    if others is None or not others.tried:
        return []
    if others.loads is None:
        return [f"no other layout of these GPUs that was tried loads and fits: {', '.join(others.names)}"]
    line = pasted_line(options, others.loads)
    return [f"on as many GPUs {others.loads.layout} loads (tried: {', '.join(others.names)}):", f"    {line}"]


def split_lines(options: argparse.Namespace, found: Uncut | None) -> list[str]:
    """A split that cuts nothing, and the line to paste if it loads and fits."""
    if found is None:
        return []
    if found.report is None:
        return ["", f"no split into {options.pp} stages cuts nothing; into {found.most} there is one"]
    split, line = found.report.deployment.partition, pasted_line(options, found.report.deployment)
    answer = found.report.overall(options.gpu_memory_utilization)
    if answer != LOADS:
        return ["", f"a split that cuts nothing, {PARTITION_VARIABLE}={split}: {answer}"]
    return ["", "with a split that cuts nothing it loads, and nothing is read across:", f"    {line}"]


def what_to_do(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    report: DryRunReport,
    again: DryRunReport | None,
    fixed: DryRunReport | None,
) -> list[str]:
    """Lines that end the answer when the checkpoint does not load; [] when there is nothing that would help.

    Args:
        again: the failing stages with the load format; None where that could change nothing.
        fixed: the same with the fixes that are known; None where there are none.
    """
    lines, known, nearest = [], fixed_in(report), nearest_in_record(checkpoint, report)
    if again is not None:
        lines += cure_lines(options, report, again, "--load-format glmpp")
    if fixed is not None:
        names = ", ".join(fixed.deployment.fixes)
        lines += cure_lines(options, report, fixed, f"the fix{'es' * (len(fixed.deployment.fixes) > 1)} {names}")
        lines += [f"    {name}: {fixes.about(name)}" for name in fixed.deployment.fixes]
    lines += [known_line(known, report)] if known else []
    lines += [nearest_line(nearest)] if nearest else []
    lines += [NO_RELEASE] if lines and not known and not nearest and is_in_record(checkpoint, report) else []
    return ["", *lines] if lines else []


def known_line(known: KnownFault, report: DryRunReport) -> str:
    """What is known of the fault that the stages die of. Where PP=1 fails for another reason, it is not all that fails."""
    if report.control is None or report.control.loads:
        return f"known to load from vLLM {known.fixed_in} on ({known.source})"
    return f"this {known.exception} is mended from vLLM {known.fixed_in} on ({known.source}); what PP=1 ends with is another"


def cure_lines(options: argparse.Namespace, report: DryRunReport, again: DryRunReport, what: str) -> list[str]:
    """Whether the ranks that failed load with something, and the line to paste if they also fit."""
    if left := [stage for stage in again.all if not stage.loads]:
        return [f"{what} does not cure it: {label(left[:1])} {left[0].verdict}", *evidence_lines(left[0])]
    loads = f"{label(again.stages)} load{'s' * (len(again.stages) == 1)}"
    whole = with_cure(report, again)
    if whole.crossings:
        return [f"with {what} {loads}, but {whole.crossings[0]}"]
    if (found := whole.fit(options.gpu_memory_utilization)) and found.fits is False:
        return [f"with {what} {loads}, but it {NO_FIT}: {shown(found.lack, MESSAGE)}"]
    line = pasted_line(options, again.deployment)
    return [f"with {what} {loads} (glmpp has to be installed where vLLM runs):", f"    {line}"]


def pasted_line(options: argparse.Namespace, deployment: Deployment) -> str:
    """The command for a server with what was asked for."""
    asked = options.context, options.gpu_memory_utilization, os.environ.get(PLUGINS_VARIABLE)
    return serve_line(pasted(options.model), deployment, *asked)


def pasted(model: str) -> str:
    """What a command for a server says in the place of the model."""
    path = Path(model)
    no_shards = path.is_file() or (path.is_dir() and not any(path.glob("*.safetensors")))
    return "MODEL" if no_shards or model.startswith("-") or printable(model) != model else model
