"""What a cut between stages takes away, and the splits that take nothing away."""

from __future__ import annotations

from argparse import Namespace
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmpp.checkpoint import Checkpoint
from glmpp.cli.advice_text import cure_lines
from glmpp.dryrun.advice import with_cure
from glmpp.dryrun.cuts.crossing import computing, crossings, uncut
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.messages import Holder, Run, StageResult
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CROSSES, DIES, LOADS, StageReport
from glmpp.layouts.plan import plan
from glmpp.layouts.split import balance, split_at
from glmpp.partition import make_stages, stage_bytes

FULL = [0, 1, 2, *range(6, 78, 4)]  # GLM-5.2: `index_skip_topk_offset` 3, `index_topk_freq` 4
CONFIG = {"num_hidden_layers": 12}


COMPUTES, READS, OTHER = ["Attention 4", "Indexer 1", "Op 1"], ["Attention 4"], ["Attention 128"]


def result(layers: dict[int, list[str]], **run) -> StageResult:
    """Of modules by class and ratio; each knows the number of its layer, too."""
    held = {
        at: [Holder(one.split()[0], {"ratio": int(one.split()[1]), "layer": at}) for one in modules]
        for at, modules in layers.items()
    }
    return StageResult(run=Run(**run), carried={"buffer": held} if held else {})


def schedule(computes: str) -> StageResult:
    """Of "ccr-": two layers that compute, one that reads, and one that only refers to it."""
    return result({layer: {"c": COMPUTES, "r": READS, "-": OTHER}[one] for layer, one in enumerate(computes)})


def reads_across(computes: str, start: int, stop: int) -> bool:
    """By hand: whether a stage meets a reader before any layer of its own that computes."""
    seen = False
    for at, one in enumerate(computes[:stop]):
        if at < start:
            seen = seen or one == "c"
        elif one != "-":
            return one == "r" and seen
    return False


@given(st.text("cr-", min_size=12, max_size=12), st.integers(1, 5), st.randoms())
def test_a_crossing_is_where_a_stage_begins_with_a_reader(computes, pp, random):
    cuts = sorted(random.sample(range(1, 12), pp - 1))
    counts = [stop - start for start, stop in pairwise([0, *cuts, 12])]
    found = crossings([schedule(computes)], make_stages(CONFIG, pp, counts))
    kinds = {*computes} - {"-"}
    spans = list(pairwise([*cuts, 12]))
    expected = [at for at, span in enumerate(spans, 1) if kinds == {"c", "r"} and reads_across(computes, *span)]
    assert [one.stage for one in found] == expected
    for one in found:
        assert computes[one.computed_by] == "c" and "c" not in computes[one.computed_by + 1 : one.layer]


def test_layers_of_several_ranks_are_put_together_and_a_drafter_is_left_out():
    stages = [result({0: COMPUTES, 1: READS}), result({2: COMPUTES, 3: READS}, stage=1, pp_size=2)]
    assert computing([*stages, result({4: COMPUTES * 2}, drafter=True)]) == {
        "buffer": {0: True, 1: False, 2: True, 3: False}
    }
    assert computing([result({0: COMPUTES, 1: COMPUTES, 2: OTHER})]) == {} == computing([result({})])


def test_a_layer_that_was_not_run_is_taken_for_one_of_its_kind():
    ran = [result({0: COMPUTES, 1: READS})]
    assert computing(ran, "abab") == {"buffer": {0: True, 1: False, 2: True, 3: False}}
    assert [one.stage for one in crossings(ran, make_stages({"num_hidden_layers": 4}, 2, [3, 1]), "abab")] == [1]


def test_glm_5_2_can_be_cut_at_the_layers_that_compute():
    computes = "".join("c" if layer in FULL else "r" for layer in range(78))
    assert uncut([schedule(computes)], 78) == FULL
    stages = make_stages({"num_hidden_layers": 78}, 8)
    assert [one.layer for one in crossings([schedule(computes)], stages)] == [stage.layers[0] for stage in stages[1:]]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.sets(st.integers(1, 8)), st.integers(1, 5))
def test_the_split_at_these_layers_has_the_smallest_largest_stage(sizes, starts, pp):
    below = [0, *accumulate(sizes)]
    inner = [start for start in starts if start < len(sizes)]
    largest = [
        max(below[stop] - below[start] for start, stop in pairwise([0, *cuts, len(sizes)]))
        for cuts in combinations(sorted(inner), pp - 1)
    ]
    found = split_at(inner, len(sizes), pp, lambda start, stop: below[stop] - below[start])
    assert (found is None) == (not largest)
    if found:
        assert {*accumulate(found)} <= {*inner, len(sizes)} and sum(found) == len(sizes) and min(found) > 0
        assert max(below[stop] - below[start] for start, stop in pairwise(accumulate(found, initial=0))) == min(largest)


def test_a_plan_of_glm_5_2_says_what_vllms_split_cuts_and_has_one_that_cuts_nothing(config_52):
    checkpoint = Checkpoint.from_config(config_52)
    text, _ = plan(checkpoint, Deployment(8, gpu="cpu"))
    assert "stages 1, 2, 3, 4, 5, 6, 7 begin with a layer that reads the top-k indices of the stage before" in text
    counts = balance(checkpoint, 8, starts=FULL)
    assert {*accumulate(counts[:-1])} <= {*FULL} and f"={','.join(map(str, counts))}\n" in text
    assert text.endswith("\nthe balanced split cuts nothing")
    uneven = plan(checkpoint, Deployment(8, gpu="cpu", layer_counts=counts))[0]
    assert "begin with" not in uneven
    assert "at most 21 stages cut nothing" in plan(checkpoint, Deployment(22, gpu="cpu"))[0]
    stages = make_stages(checkpoint.config, 8, counts)
    assert max(stage_bytes(checkpoint, stages)) == pytest.approx(118.493e9, rel=1e-4)


def test_what_a_cure_leaves_read_across_has_no_line_to_paste():
    """The ranks that failed load with it. Whether something is read across, the ranks before tell."""
    stages = make_stages(CONFIG, 2)
    crossed = crossings([schedule("ccrrccrrccrr")], make_stages(CONFIG, 2, [7, 5]))
    before = [StageReport(stages[0], LOADS), StageReport(stages[1], DIES)]
    rest = (None, [], {"vllm": "x"}, {}, 1.0, 1)
    report = DryRunReport(Deployment(2, gpu="cpu"), before, *rest, crossings=crossed)
    again = DryRunReport(Deployment(2, gpu="cpu", guard="loader"), [StageReport(stages[1], LOADS)], *rest)
    options = Namespace(model="m", context=None, gpu_memory_utilization=None)
    assert cure_lines(options, report, again, "x") == [
        "with x stage 1 loads, but stage 1 reads buffer that stage 0 computes"
    ]
    whole = with_cure(report, again)
    assert [stage.verdict for stage in whole.stages] == [LOADS] * 2 and whole.overall() == CROSSES
    report.crossings = []
    assert "    vllm serve m --pipeline-parallel-size 2 --load-format glmpp" in cure_lines(options, report, again, "x")


def test_a_plan_of_glm_5_1_says_nothing_of_it(full):
    assert "top-k" not in plan(full, Deployment(8, gpu="cpu"))[0]
