"""A report as a terminal shows it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.fit import LEFT_OUT, NO_FIT
from glmpp.dryrun.messages import NO_DATA
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import (
    CANNOT_TELL,
    CROSSES,
    DIES,
    DRAFTER,
    INCOMPLETE,
    LOADS,
    PARTLY,
    STAGE,
    StageReport,
)
from glmpp.ledger import CUT, DROPPED
from glmpp.words import MESSAGE, joined, quoted, shown, some

MANY = 4  # lines of a kind


def as_text(checkpoint: Checkpoint, report: DryRunReport, each: bool = False, utilization: float | None = None) -> str:
    """The report for a terminal: nothing in it changes from run to run unless a verdict does.

    Args:
        each: a paragraph for each rank; otherwise those that end alike share one.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
    """
    versions = shown(", ".join(f"{name} {version}" for name, version in report.versions.items()), MESSAGE)
    lines = [
        *checkpoint.headline,
        f"{versions}; guard: {report.guard}; GPU: {report.deployment.gpu}"
        + (f"; fixes: {', '.join(report.deployment.fixes)}" if report.deployment.fixes else ""),
        *chosen(report),
        "",
    ]
    ends: dict[tuple, list[StageReport]] = {}
    for stage in report.all:
        alone = each or stage.role != STAGE
        ends.setdefault((id(stage) if alone else 0, stage.verdict, *_ending(stage)), []).append(stage)
    width = max(13, *(len(label(alike)) for alike in ends.values()))
    for alike in ends.values():
        lines.append(f"{label(alike):<{width}} layers {_layers(alike):<8} {alike[0].verdict}")
        lines += evidence_lines(alike[0], several=len(alike) > 1)
    lines += held_lines(report) + crossing_lines(report)
    lines += ["", *lines_of_memory] if (lines_of_memory := memory_lines(report, utilization)) else []
    lines += ["", "stand-ins: " + ", ".join(map(shown, report.stand_ins))]
    if data := sorted({stage.data for stage in report.all if stage.data != NO_DATA and not stage.failures}):
        lines.append(f"not complete without data, and tried again on the CPU with values: {', '.join(data)}")
    return joined([*lines, "", f"{report.deployment.layout}: {conclusion(report, utilization)}"])


def chosen(report: DryRunReport) -> list[str]:
    """What vLLM built and chose, from all stages: the model's class, attention backends, kernels."""
    classes = sorted({stage.model_class for stage in report.all if stage.model_class})
    lines = [f"model: {', '.join(map(shown, classes))}"] if classes else []
    for kind in ("attention", "linear", "moe"):
        names = sorted({name for stage in report.all for name in stage.backends.get(kind, ())})
        lines += [f"{kind}: {', '.join(map(shown, names))}"] if names else []
    return lines


def _ending(stage: StageReport) -> list[str]:
    """What ranks that end alike have in common: the evidence, whatever the numbers of what is cut."""
    cuts = set(_cut_lines(stage))
    return [re.sub(r"\d+(\.\d+)?", "0", line) if line in cuts else line for line in evidence_lines(stage)]


def evidence_lines(stage: StageReport, several: bool = False) -> list[str]:
    """What a stage's verdict rests on, indented; [] for one that loads and leaves nothing to say.

    Args:
        several: other ranks end alike: what has numbers of this rank's own says so.
    """
    lines = []
    for failure in stage.failures:
        said = shown(" ".join(failure.message.split()), MESSAGE)
        lines.append(f"    KeyError: {quoted(failure.key)}" if failure.key else f"    {shown(failure.exception)}: {said}")
        handed = f", handed {shown(failure.tensor)}" if failure.tensor else ""
        handed += f" of {shown(failure.file)}" if failure.file else ""
        lines.append(f"        in {shown(failure.place)} {shown(failure.function)}{handed}")
    if stage.verdict == INCOMPLETE:
        lines += _left_lines(stage) + _cut_lines(stage, several)
    if stage.verdict == CANNOT_TELL and stage.unplaced:
        lines.append(f"    written at places that only data would tell: {some([*stage.unplaced])}")
    if stage.why and not stage.failures:
        lines.append(f"    {shown(stage.why, MESSAGE)}")
    told = {stage.left[name].tensor for name in stage.unaccounted}
    if stage.verdict in (LOADS, INCOMPLETE) and (dropped := [name for name in stage.dropped if name not in told]):
        lines.append(f"    dropped without a trace: {some(dropped)}")
    return lines


def held_lines(report: DryRunReport) -> list[str]:
    """The rank that holds most of other stages' tensors while it loads, in the host's memory, and how much."""
    holding = [stage for stage in report.all if stage.held and not stage.failures]
    if not holding:
        return []
    most = max(holding, key=lambda stage: sum(stage.held.values()))
    size, first = f"{sum(most.held.values()) / 1e9:,.3f} GB of other stages' tensors", shown(next(iter(most.held)))
    return ["", f"{label(holding)} hold{'s' * (len(holding) == 1)} up to {size} while loading, e.g. {first}"]


def crossing_lines(report: DryRunReport) -> list[str]:
    """What stages read across their cuts, and the split to take in place of this one."""
    told = [f"    {one}: layer {one.layer} reads what layer {one.computed_by} writes" for one in report.crossings]
    if len(told) > MANY:
        told[MANY:] = [f"    and {len(told) - MANY} more"]
    return ["", "read across the cuts, where vLLM hands over nothing but hidden states:", *told] if told else []


def _left_lines(stage: StageReport) -> list[str]:
    """What is wrong with the parameters left at init, or partly; those of one kind for one reason share a line."""
    why: dict[tuple, list[str]] = {}
    for name in stage.unaccounted:
        what = stage.what_is_left(name)
        what = what if what in (PARTLY, CUT, DROPPED) else "left at init"
        why.setdefault((what, str(stage.left[name])), []).append(name)
    return [line for (what, reason), names in why.items() for line in (f"    {what}: {some(names)}", f"        {reason}")]


def _cut_lines(stage: StageReport, several: bool = False) -> list[str]:
    """Tensors that are cut, those that are cut alike on one line: what differs in names are numbers."""
    alike: dict[tuple, list] = {}
    for cut in stage.cuts:
        alike.setdefault((re.sub(r"\d+", "", cut.tensor), str(cut)), []).append(cut)
    lines = []
    for (_, said), cuts in alike.items():
        more = f" and {len(cuts) - 1:,} more" if len(cuts) > 1 else ""
        here = f" (on rank {stage.run.tp_rank}; on the others likewise)" if several and cuts[0].scales else ""
        lines += [f"    cut: {shown(cuts[0].tensor)}{more}", f"        {said}{here}"]
    return lines


def memory_lines(report: DryRunReport, utilization: float | None = None) -> list[str]:
    """What each rank takes, those that take the same on one line, and what the deployment has room for."""
    found = report.fit(utilization)
    if found is None or report.overall() == DIES or not found.share:
        return []
    of = (
        f"{found.share:{'.0%' if found.share >= 0.01 else '.2%'}} of the {found.gpu.memory / 1e9:.1f} GB of {found.gpu.name}"
    )
    lines = [f"memory, {of}; left out: {LEFT_OUT}"]
    alike: dict[tuple, list] = {}
    for stage, memory in zip(report.stages, found.memories):
        alike.setdefault(memory.figures, []).append((stage, memory))
    for same in alike.values():
        memory, where = same[0][1], label([stage for stage, _ in same])
        cache = f"KV cache not counted: {shown(memory.why, MESSAGE)}" if memory.why else "no KV cache"
        if memory.kv_cache:
            tokens = found.tokens_of(memory)
            room = f"{tokens:>12,} tokens fit" if memory.room(found.gpu, utilization) > 0 else f"{'does not fit':>24}"
            cache = f"{memory.kv_cache.bytes_per_token:>10,.0f} bytes of KV cache per token {room}"
        lines.append(f"    {where:<26} {memory.weights / 1e9:>7.1f} GB of weights {cache}")
    if found.known:
        lines.append(f"    requests of {found.context:,} tokens at a time: {found.requests:.1f}")
    return lines


def label(stages: list[StageReport]) -> str:
    """ "stage 3", "stages 0, 2-7", "stages 0-1, ranks 0, 7 of 8", or what else was run."""
    if len(stages) == 1:
        return stages[0].label
    numbers = sorted({stage.stage.rank for stage in stages})
    found = f"stage{'s' * (len(numbers) > 1)} {_spans(numbers)}"
    for name, number, count in (("rank", "tp_rank", "tp_size"), ("replica", "dp_rank", "dp_size")):
        if (of := getattr(stages[0].run, count)) > 1:
            numbers = sorted({getattr(stage.run, number) for stage in stages})
            found += f", {name}{'s' * (len(numbers) > 1)} {_spans(numbers)} of {of}"
    return found


def _layers(stages: list[StageReport]) -> str:
    return _spans(sorted({layer for stage in stages for layer in stage.stage.layers}))


def _spans(numbers: list[int]) -> str:
    """ "0, 2-7" for ascending numbers."""
    runs = (list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]))
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def conclusion(report: DryRunReport, utilization: float | None = None) -> str:
    """The answer in one line. Args: utilization: as in `as_text`."""
    failing = [stage for stage in report.stages if not stage.loads]
    several = report.deployment.tp * report.deployment.dp > 1
    of = f"{len(report.stages)} ranks that were run" if several else f"{report.pp_size} stages"
    found, room = report.overall(utilization), report.fit(utilization)
    if found == LOADS:
        return "loads, complete" + ("; whether it fits was not counted" if room and room.fits is None else "")
    if found == CROSSES:
        stages = len({one.stage for one in report.crossings})
        more = f"; {stages - 1} more stage{'s do' if stages > 2 else ' does'} so" if stages > 1 else ""
        return f"loads, and {report.crossings[0]}{more}"
    if found == NO_FIT:
        refused = any(memory.refused for memory in room.memories)
        return f"loads, and {'vLLM refuses to serve it' if refused else NO_FIT}: {shown(room.lack, MESSAGE)}"
    if found == CANNOT_TELL:
        neither = report.control is not None and report.control.verdict == CANNOT_TELL
        return "cannot tell: " + ("PP=1 cannot be built here either" if neither else "see above")
    if found == INCOMPLETE:
        left = {name: stage.what_is_left(name) for stage in report.stages for name in stage.unaccounted}
        left |= {(DRAFTER, name): one.what_is_left(name) for one in report.drafters for name in one.unaccounted}
        kinds = Counter(left.values())
        kinds[CUT] += len({cut.tensor for stage in report.all for cut in stage.cuts})
        said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count) or "see PP=1"
        also = ", nor is PP=1" if report.control and not report.control.loads else ""
        return f"loads, and is not complete{also}: {said}"
    if report.control is not None and not report.control.loads:
        return f"does not load, nor does PP=1: {len(failing)} of {of} fail"
    although = " although PP=1 loads" if report.control else ""
    return f"does not load: {len(failing)} of {of} fail{although}"
