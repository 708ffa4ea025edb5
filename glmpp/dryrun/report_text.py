"""A report as a terminal shows it, and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.advice import Tried, fixed_in, nearest_in_record
from glmpp.dryrun.fit import LEFT_OUT, NO_FIT, Fit
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import (
    CANNOT_BUILD,
    CANNOT_TELL,
    DIES,
    DRAFTER,
    INCOMPLETE,
    LOADS,
    NO_DATA,
    PARTLY,
    STAGE,
    StageReport,
)
from glmpp.ledger import CUT, DROPPED
from glmpp.words import MESSAGE, joined, quoted, shown, some

SCHEMA_VERSION = 7


def overall(report: DryRunReport, utilization: float | None = None) -> str:
    """LOADS if every stage and the control do, completely, and it fits as far as it was counted; otherwise the first of
    DIES, INCOMPLETE, NO_FIT, CANNOT_TELL. Args: utilization: as in `as_json`."""
    verdicts = {stage.verdict for stage in report.all}
    if verdicts & {DIES, CANNOT_BUILD}:
        return DIES
    if (found := report.fit(utilization)) and found.fits is False:
        verdicts.add(NO_FIT)
    return next((verdict for verdict in (INCOMPLETE, NO_FIT, CANNOT_TELL) if verdict in verdicts), LOADS)


def as_json(
    checkpoint: Checkpoint,
    report: DryRunReport,
    again: DryRunReport | None = None,
    utilization: float | None = None,
    fixed: DryRunReport | None = None,
    would_fit: Sequence[str] = (),
    others: Tried | None = None,
) -> dict:
    """The report as plain values; `tests/check.schema.json` is its schema.

    Args:
        again: the failing stages with the load format, see `glmpp.dryrun.advice`.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
        fixed: the same with the fixes that are known.
        would_fit: what was tried and does, see `glmpp.layouts.room`.
        others: layouts of the same GPUs that were tried, see `glmpp.dryrun.advice.try_layouts`.
    """
    known, found = fixed_in(report), report.fit(utilization)
    return {
        "schema": SCHEMA_VERSION,
        "checkpoint": {
            "source": checkpoint.source,
            "tensors": len(checkpoint),
            "bytes": checkpoint.nbytes,
            "notes": checkpoint.notes,
        },
        "versions": report.versions,
        "guard": report.guard,
        "fixes": list(report.deployment.fixes),
        "gpu": report.deployment.gpu,
        "pp_size": report.pp_size,
        "tp_size": report.deployment.tp,
        "dp_size": report.deployment.dp,
        "ep": report.deployment.ep,
        "verdict": overall(report, utilization),
        "fit": found
        and {
            "gpu_memory_bytes": found.gpu.memory,
            "gpu_memory_utilization": found.share,
            "tokens": found.tokens,
            "context": found.context if found.known else None,
            "left_out": LEFT_OUT,
            "fits": found.fits,
            "lack": found.lack,
        },
        "would_fit": [*would_fit],
        "other_layouts": others and {"tried": others.names, "loads": others.loads and others.loads.layout},
        "stages": [_stage_json(stage, found) for stage in report.stages],
        "control": None if report.control is None else _stage_json(report.control),
        "stand_ins": report.stand_ins,
        "with_load_format": again
        and {"verdict": overall(again, utilization), "stages": [_stage_json(stage) for stage in again.stages]},
        "with_fixes": fixed
        and {
            "fixes": list(fixed.deployment.fixes),
            "verdict": overall(fixed, utilization),
            "stages": [_stage_json(stage) for stage in fixed.stages],
        },
        "known_to_load_from": known and {"vllm": known.fixed_in, "source": known.source},
        "nearest_in_record": nearest_in_record(checkpoint, report),
    }


def _stage_json(stage: StageReport, found: Fit | None = None) -> dict:
    return {
        "rank": stage.stage.rank,
        "shard": stage.shard,
        "experts": stage.experts,
        "replica": stage.replica,
        "layers": [*stage.stage.layers[:1], *stage.stage.layers[-1:]],  # the first and the last; a stage may have none
        "verdict": stage.verdict,
        "model_class": stage.model_class,
        "backends": stage.backends,
        "refused": stage.refused,
        "device": stage.device,
        "data": stage.data,
        "tensors_handed_over": stage.handed_over,
        "deaths": [
            {key: getattr(death, key) for key in ("exception", "message", "key", "place", "function", "tensor")}
            for death in stage.deaths
        ],
        "complete": None if stage.ledger is None or stage.deaths else not (stage.unaccounted or stage.cuts),
        "cut": [asdict(cut) for cut in stage.cuts],
        "left_at_init": {name: asdict(one) for name, one in stage.left.items()},
        "dropped": [] if stage.deaths else stage.dropped,
        "held": stage.held,
        "memory": memory_json(stage, found),
    }


def as_text(checkpoint: Checkpoint, report: DryRunReport, each: bool = False, utilization: float | None = None) -> str:
    """The report for a terminal: nothing in it changes from run to run unless a verdict does.

    Args:
        each: a paragraph for each rank; otherwise those that end alike share one.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
    """
    versions = shown(", ".join(f"{name} {version}" for name, version in report.versions.items()), MESSAGE)
    lines = [
        *headline(checkpoint),
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
    lines += held_lines(report)
    lines += ["", *lines_of_memory] if (lines_of_memory := memory_lines(report, utilization)) else []
    lines += ["", "stand-ins: " + ", ".join(map(shown, report.stand_ins))]
    if data := sorted({stage.data for stage in report.all if stage.data != NO_DATA and not stage.deaths}):
        lines.append(f"not complete without data, and tried again on the CPU with values: {', '.join(data)}")
    return joined([*lines, "", f"{report.deployment.layout}: {conclusion(report, utilization)}"])


def headline(checkpoint: Checkpoint) -> list[str]:
    """Which checkpoint, how large it is, and what is to be told of the choice of its files."""
    size = f"{len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:,.3f} GB"
    return [f"{shown(str(checkpoint.source), MESSAGE)}: {size}", *(f"    {note}" for note in checkpoint.notes)]


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
    for death in stage.deaths:
        said = shown(" ".join(death.message.split()), MESSAGE)
        lines.append(f"    KeyError: {quoted(death.key)}" if death.key else f"    {shown(death.exception)}: {said}")
        handed = f", handed {shown(death.tensor)}" if death.tensor else ""
        handed += f" of {shown(death.file)}" if death.file else ""
        lines.append(f"        in {shown(death.place)} {shown(death.function)}{handed}")
    if stage.verdict == INCOMPLETE:
        lines += _left_lines(stage) + _cut_lines(stage, several)
    if stage.verdict == CANNOT_TELL and stage.evidence.unplaced:
        lines.append(f"    written at places that only data would tell: {some([*stage.evidence.unplaced])}")
    if stage.evidence.why and not stage.deaths:
        lines.append(f"    {shown(stage.evidence.why, MESSAGE)}")
    told = {stage.left[name].tensor for name in stage.unaccounted}
    if stage.verdict in (LOADS, INCOMPLETE) and (dropped := [name for name in stage.dropped if name not in told]):
        lines.append(f"    dropped without a trace: {some(dropped)}")
    return lines


def held_lines(report: DryRunReport) -> list[str]:
    """The rank that holds most of other stages' tensors while it loads, in the host's memory, and how much."""
    holding = [stage for stage in report.all if stage.held and not stage.deaths]
    if not holding:
        return []
    most = max(holding, key=lambda stage: sum(stage.held.values()))
    size, first = f"{sum(most.held.values()) / 1e9:,.3f} GB of other stages' tensors", shown(next(iter(most.held)))
    return ["", f"{label(holding)} hold{'s' * (len(holding) == 1)} up to {size} while loading, e.g. {first}"]


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
        here = f" (on rank {stage.shard}; on the others likewise)" if several and cuts[0].scales else ""
        lines += [f"    cut: {shown(cuts[0].tensor)}{more}", f"        {said}{here}"]
    return lines


def memory_lines(report: DryRunReport, utilization: float | None = None) -> list[str]:
    """What each rank takes, those that take the same on one line, and what the deployment has room for."""
    found = report.fit(utilization)
    if found is None or overall(report) == DIES:
        return []
    of = f"{found.share:.0%} of the {found.gpu.memory / 1e9:.1f} GB of {found.gpu.name}"
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


def memory_json(stage: StageReport, found: Fit | None) -> dict | None:
    """What a rank takes, as plain values. `found` is of its deployment."""
    memory = stage.memory
    if memory is None:
        return None
    cache = memory.kv_cache
    return {
        "weights_bytes": memory.weights,
        "kv_cache_bytes_per_token": cache and cache.bytes_per_token,
        "kv_cache_dtype": cache and cache.dtype,
        "tokens": found and found.tokens_of(memory),
        "not_counted_because": memory.why,
    }


def label(stages: list[StageReport]) -> str:
    """ "stage 3", "stages 0, 2-7", "stages 0-1, ranks 0, 7 of 8", or what else was run."""
    if len(stages) == 1:
        return stages[0].label
    numbers = sorted({stage.stage.rank for stage in stages})
    found = f"stage{'s' * (len(numbers) > 1)} {_spans(numbers)}"
    for name, number, count in (("rank", "shard", "shards"), ("replica", "replica", "replicas")):
        if (of := getattr(stages[0], count)) > 1:
            numbers = sorted({getattr(stage, number) for stage in stages})
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
    found, room = overall(report, utilization), report.fit(utilization)
    if found == LOADS:
        return "loads, complete" + ("; whether it fits was not counted" if room and room.fits is None else "")
    if found == NO_FIT:
        return f"loads, and {NO_FIT}: {shown(room.lack, MESSAGE)}"
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
