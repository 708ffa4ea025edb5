"""A report as plain values, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.advice import Tried, fixed_in, nearest_in_record
from glmpp.dryrun.fit import LEFT_OUT, Fit
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import StageReport
from glmpp.layouts.uncut import Uncut

SCHEMA_VERSION = 8


def as_json(
    checkpoint: Checkpoint,
    report: DryRunReport,
    again: DryRunReport | None = None,
    utilization: float | None = None,
    fixed: DryRunReport | None = None,
    would_fit: Sequence[str] = (),
    others: Tried | None = None,
    split: Uncut | None = None,
) -> dict:
    """The report as plain values; `tests/check.schema.json` is its schema.

    Args:
        again: the failing stages with the load format, see `glmpp.dryrun.advice`.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
        fixed: the same with the fixes that are known.
        would_fit: what was tried and does, see `glmpp.layouts.room`.
        split: what was tried in place of one that is read across, see `glmpp.layouts.uncut`.
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
        "verdict": report.overall(utilization),
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
        "across_the_cuts": [asdict(one) for one in report.crossings],
        "split_that_cuts_nothing": split
        and {"partition": split.report and split.report.deployment.partition, "most_stages": split.most},
        "stand_ins": report.stand_ins,
        "with_load_format": again
        and {"verdict": again.overall(utilization), "stages": [_stage_json(stage) for stage in again.stages]},
        "with_fixes": fixed
        and {
            "fixes": list(fixed.deployment.fixes),
            "verdict": fixed.overall(utilization),
            "stages": [_stage_json(stage) for stage in fixed.stages],
        },
        "known_to_load_from": known and {"vllm": known.fixed_in, "source": known.source},
        "nearest_in_record": nearest_in_record(checkpoint, report),
    }


def _stage_json(stage: StageReport, found: Fit | None = None) -> dict:
    return {
        "stage": stage.stage.rank,
        "tp_rank": stage.run.tp_rank,
        "experts": stage.experts,
        "dp_rank": stage.run.dp_rank,
        "layers": [*stage.stage.layers[:1], *stage.stage.layers[-1:]],  # the first and the last; a stage may have none
        "verdict": stage.verdict,
        "model_class": stage.model_class,
        "backends": stage.backends,
        "refused": stage.refused,
        "device": stage.device,
        "data": stage.data,
        "tensors_handed_over": stage.handed_over,
        "failures": [
            {key: getattr(failure, key) for key in ("exception", "message", "key", "place", "function", "tensor")}
            for failure in stage.failures
        ],
        "complete": None if stage.ledger is None or stage.failures else not (stage.unaccounted or stage.cuts),
        "cut": [asdict(cut) for cut in stage.cuts],
        "left_at_init": {name: asdict(one) for name, one in stage.left.items()},
        "dropped": [] if stage.failures else stage.dropped,
        "held": stage.held,
        "memory": memory_json(stage, found),
    }


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
