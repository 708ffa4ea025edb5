"""What a comparison of the two load formats makes of two reports of a stage, and the record of the newest release."""

from __future__ import annotations

import pytest
from conftest import ROOT
from sweep.cases import Sweep
from sweep.same_bytes import (
    EQUAL,
    FALSE_ALARM,
    MISSED,
    NOT_COMPARABLE,
    REFUSED,
    UNEQUAL,
    WRONG,
    Compared,
    Comparison,
    compare_stage,
)

from glmpp.dryrun.messages import Failure, Run, StageResult
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS, StageReport
from glmpp.ledger import ABSENT, EXPECTED, UNTIED, Ledger, UnloadedParam
from glmpp.partition import make_stages

STAGE = make_stages({"num_hidden_layers": 2}, 1)[0]
HEAD, SCALE = {"head": UnloadedParam(UNTIED, "w")}, {"kv_scale": UnloadedParam(EXPECTED, "w")}


def stage(
    verdict: str, digests: dict | None = None, left: dict | None = None, said: str = "", padding: dict | None = None
) -> StageReport:
    """A report of a stage; what it dies of is a GlmppError if it is something about parameters."""
    ledger = Ledger({}, {}, padding=padding or {})
    exception = "GlmppError" if "parameters" in said else "KeyError"
    failures = [Failure(exception=exception, message=said, place="vllm/a.py:1", function="f")] if said else []
    result = StageResult(run=Run(), digests=digests or {}, failures=failures, left=left or {})
    return StageReport(STAGE, verdict, ledger=ledger, result=result)


def refused(count: int, left: dict) -> StageReport:
    return stage(
        DIES, left=left, said=f"glmpp: stage 0 of 1: {count} parameters were left at init, or partly: head (untied)"
    )


ONE, OTHER = {"a": "1", "head": "2"}, {"a": "1", "head": "3"}


# What stands there -> stock's report, the load format's, and what comes of the two.
PAIRS = {
    "the same bytes": (stage(LOADS, ONE), stage(LOADS, ONE), EQUAL),
    "other bytes": (stage(LOADS, ONE), stage(LOADS, OTHER), UNEQUAL),
    "other bytes where vLLM pads": (stage(LOADS, ONE), stage(LOADS, OTHER, padding={"head": 2}), EQUAL),
    "a parameter more": (stage(LOADS, {"a": "1"}), stage(LOADS, ONE), UNEQUAL),
    "at init in both": (stage(LOADS, {**ONE, "kv_scale": "4"}, SCALE), stage(LOADS, {**ONE, "kv_scale": "5"}, SCALE), EQUAL),
    "at init in one": (stage(LOADS, {**ONE, "kv_scale": "4"}), stage(LOADS, {**ONE, "kv_scale": "5"}, SCALE), UNEQUAL),
    "refused for nothing": (stage(LOADS, ONE), refused(1, HEAD), FALSE_ALARM),
    "dead where stock loads": (stage(LOADS, ONE), stage(DIES, said="no such key"), FALSE_ALARM),
    "refused with reason": (stage(INCOMPLETE, ONE, HEAD), refused(1, HEAD), REFUSED),
    "more named than the bytes confirm": (stage(INCOMPLETE, ONE, HEAD), refused(2, HEAD), FALSE_ALARM),
    "up, and not complete": (stage(INCOMPLETE, ONE, HEAD), stage(INCOMPLETE, ONE, HEAD), MISSED),
    "neither": (stage(CANNOT_BUILD, said="no layer"), stage(CANNOT_BUILD, said="no layer"), NOT_COMPARABLE),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_stage_loaded_by_both(pair):
    stock, ours, outcome = PAIRS[pair]
    assert compare_stage(stock, ours, stock, "PP=1 stage 0").outcome == outcome


def test_where_stock_dies_pp_1_says_what_the_stage_should_hold():
    dead, whole = stage(DIES, {"a": "0"}, said="no such key"), stage(LOADS, {"a": "1", "b": "2"})
    assert compare_stage(dead, stage(LOADS, {"a": "1"}), whole, "w") == Compared(EQUAL, "", 1)
    assert compare_stage(dead, stage(LOADS, {"a": "0"}), whole, "w") == Compared(UNEQUAL, "w: a")
    assert compare_stage(dead, stage(LOADS, {"a": "1"}), dead, "w").outcome == MISSED


def test_a_refusal_carries_its_kinds():
    left = {"head": UnloadedParam(UNTIED, "w"), "a": UnloadedParam(ABSENT, "w"), "b": UnloadedParam(ABSENT, "w"), **SCALE}
    assert compare_stage(stage(INCOMPLETE, ONE, left), refused(3, left), None, "w").why == "1 untied, 2 absent"


def test_a_saved_comparison_is_read_back_and_says_of_how_many(tmp_path):
    one = Comparison({"A, plain": Compared(EQUAL, "", 3)}, 2, {"vllm": "1"}, "m", "h100", 4.2, "on 2026-01-01")
    one.save(tmp_path / "c.json")
    again = Comparison.load(tmp_path / "c.json")
    assert again.cases == one.cases and again.outcomes == {EQUAL: 1} and again.source.endswith(": 1 of 2 cases")


def test_the_record_of_the_newest_release_has_no_false_alarm():
    (path,) = (ROOT / "data" / "recorded").glob("no-false-alarm-*.json")
    found = Comparison.load(path)
    swept = Sweep.load(ROOT / "data" / "recorded" / f"sweep-vllm-{found.versions['vllm']}-{found.gpu}.json")
    counted = {f"{case.architecture}, {case.variant}": case for case in swept.counted}
    assert found.versions["vllm"] in path.name and found.of == len(counted) and found.cases.keys() <= counted.keys()
    assert not found.outcomes.keys() & set(WRONG)
    for name, case in found.cases.items():
        if case.outcome == EQUAL:
            assert case.parameters > 0 and not counted[name].left
        if case.outcome == REFUSED:
            assert counted[name].left
