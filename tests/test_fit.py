"""What fits beside the weights: arithmetic on what vLLM says of one block, without vLLM."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.advice import serve_line
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit, KVCache, Memory
from glmpp.dryrun.stage_report import DIES, LOADS
from glmpp.formats.tensor import TensorSpec
from glmpp.gpus import GPUS
from glmpp.layouts.layout import Layout, Layouts
from glmpp.layouts.search import CONTEXT, distinct, layer_kinds
from glmpp.layouts.text import layouts_json, layouts_text

H200 = GPUS["h200"]


def memory(weights: int, block: int, per_request: int = 16, context: int = 1024, **more) -> Memory:
    return Memory(weights, 0, (), KVCache(2, (), block, per_request, context), 0.9, **more)


@given(st.lists(st.tuples(st.integers(0, 200 * 10**9), st.integers(1, 10**7)), min_size=1, max_size=5), st.integers(1, 300))
def test_a_deployment_has_the_room_of_the_rank_that_has_the_least(ranks, per_request):
    """vLLM gives every rank as many blocks as the smallest number of them."""
    found = Fit([memory(weights, block, per_request) for weights, block in ranks], H200)
    blocks = min(max(0, int(H200.memory * 0.9) - weights) // block for weights, block in ranks)
    assert found.tokens == int(Fraction(blocks * 1024, per_request)) or abs(found.tokens - blocks * 1024 / per_request) < 1
    assert found.requests == blocks / per_request
    assert found.fullest == max(weights for weights, _ in ranks)


def test_weights_that_do_not_fit_leave_no_tokens():
    found = Fit([memory(10**9, 10**6), memory(200 * 10**9, 10**6)], H200)
    assert found.tokens == 0 and found.memories[1].room(H200) < 0
    assert found.tokens_of(found.memories[0]) > 10**6


def test_the_share_that_is_asked_for_counts_and_otherwise_vllms():
    one = memory(0, 10**6)
    assert Fit([one], H200).share == 0.9
    assert Fit([one], H200, 0.45).tokens == pytest.approx(Fit([one], H200).tokens / 2, rel=1e-3)


def test_nobody_knows_the_room_if_vllm_did_not_say_what_a_block_is():
    unknown = Memory(10**9, 0, (), None, 0.9, "NotImplementedError: pages")
    found = Fit([memory(10**9, 10**6), unknown], H200)
    assert found.tokens is None and found.requests is None and found.tokens_of(unknown) is None


def test_a_drafter_takes_its_weights_and_its_part_of_every_block():
    both = memory(10**9, 10**6).with_drafter(memory(10**8, 10**5))
    assert both.weights == 11 * 10**8 and both.kv_cache.block_bytes == 11 * 10**5 and both.kv_cache.blocks_per_request == 16


@pytest.mark.parametrize(
    ("weights", "per_request", "more", "fits", "says"),
    [
        (10**9, 16, {}, True, None),
        (
            int(H200.memory * 0.9) + 1,
            1,
            {},
            False,
            "135,679,338,087 bytes of weights on a rank, vLLM takes 135,679,338,086",
        ),
        (int(H200.memory * 0.9) - 2**30, 1025, {}, False, "1,024 tokens needs 1.00 GiB of KV cache on a rank, 1.00 GiB"),
        (int(H200.memory * 0.9) - 2**30, 1024, {}, True, None),
        (10**9, 16, {"why": "ValueError: longer", "refused": True}, False, "ValueError: longer"),
    ],
)
def test_what_fits_has_room_for_one_request_on_every_rank(weights, per_request, more, fits, says):
    found = Fit([memory(10**9, 1), memory(weights, 2**20, per_request, **more)], H200)
    assert found.fits is fits and (found.lack is None if says is None else says in found.lack)


def test_whether_it_fits_is_unknown_where_a_request_was_not_counted_and_weights_alone_can_be_too_many():
    uncounted, none_needed = Memory(10**9, 0, (), None, 0.9, "KeyError: pages"), Memory(10**9, 0, (), None, 0.9)
    assert Fit([uncounted, none_needed], H200).fits is None and Fit([none_needed], H200).fits is True
    assert Fit([replace(uncounted, parameters=200 * 10**9)], H200).fits is False
    assert Fit([replace(uncounted, utilization=None)], H200).fits is None


def test_bytes_per_token_are_those_of_a_whole_request():
    assert KVCache(1, (), 6_409_728, 2048, 131_072).bytes_per_token == 100_152


# --- layouts ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=3), min_size=1, max_size=8))
def test_stages_that_share_a_run_hold_the_same_kinds_of_layers_and_the_ends_have_their_own(stages):
    found = distinct(stages)
    assert all(sorted(stages[rank]) == sorted(stages[ran]) and ran <= rank for rank, ran in enumerate(found))
    assert found[0] == 0 and found[-1] == len(stages) - 1
    assert len(set(found[1:-1])) == len({tuple(sorted(stage)) for stage in stages[1:-1]})


def test_glm_5_1_has_two_kinds_of_layers(full):
    kinds = layer_kinds(full)
    assert len(kinds) == 78 and len(set(kinds)) == 2 and len(set(kinds[:3])) == len(set(kinds[3:])) == 1


def test_layers_with_the_same_tensors_and_another_type_are_another_kind():
    specs = [TensorSpec(f"model.layers.{n}.w.weight", "U8", (4,)) for n in range(4)]
    config = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
    kinds = layer_kinds(Checkpoint(specs, config))
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


def layout(tp: int, pp: int, verdict: str = LOADS, weights: int = 10**9, **more) -> Layout:
    fit = Fit([memory(weights, 10**6 * pp)], H200)
    return Layout(Deployment(tp=tp, pp=pp, gpu="h200", **more), verdict, "", fit, None, 1)


def test_the_best_layout_loads_has_room_then_holds_most_requests_then_has_the_fewest_stages():
    dead, full_up = layout(1, 1, DIES), layout(2, 1, weights=200 * 10**9)
    many, few, few_deeper = layout(8, 2), layout(4, 4), layout(2, 4)
    few_deeper = Layout(Deployment(tp=2, pp=8, gpu="h200"), LOADS, "", few_deeper.fit, None, 1)
    assert sorted([dead, few_deeper, full_up, few, many], key=lambda one: one.rank) == [many, few, few_deeper, full_up, dead]
    assert [one.serves for one in (many, full_up, dead)] == [True, False, False]


def test_the_line_to_paste_says_all_that_differs_from_the_default():
    one = layout(4, 2, ep=True, layer_counts="40,38", guard="loader")
    assert serve_line("org/a model", one.deployment, CONTEXT, 0.85) == (
        "VLLM_PP_LAYER_PARTITION=40,38 vllm serve 'org/a model' --tensor-parallel-size 4 --pipeline-parallel-size 2 "
        "--enable-expert-parallel --max-model-len 131072 --gpu-memory-utilization 0.85 --load-format glmpp"
    )
    plain = "vllm serve m --tensor-parallel-size 8 --max-model-len 4096"
    assert serve_line("m", layout(8, 1).deployment, 4096) == plain


def test_a_terminal_is_told_why_a_layout_does_not_serve():
    unknown = Fit([Memory(10**9, 0, (), None, 0.9, "ValueError: longer")], H200)
    found = [layout(8, 2), layout(2, 1, weights=200 * 10**9), layout(4, 1, DIES)]
    found.append(Layout(Deployment(tp=16, gpu="h200"), LOADS, "ValueError: longer", unknown, None, 1))
    assert [one.answer for one in found] == ["loads", "loads, no room", "dies", "loads, not counted"]
    text = layouts_text("m", Checkpoint([], {}), Layouts(found, (16, CONTEXT), H200, None, {}, {"vllm": "0"}, 1.0))
    assert [line.split()[0] for line in text.splitlines() if " serve " in line] == ["vllm"]
    assert "TP=2           loads, no room" in text and "ValueError: longer" in text and "run: 4 ranks" in text


def test_a_record_says_what_was_found(tmp_path):
    found = [layout(8, 2, ep=True, layer_counts="40,38"), layout(2, 1, weights=200 * 10**9)]
    found.append(Layout(Deployment(tp=4, gpu="h200"), DIES, "stage 0: no", None, None, 1))
    some = Layouts(found, (16, CONTEXT), H200, None, {"PP=99": "the model has 78 layers"}, {"vllm": "0"}, 1.0)
    some.save(tmp_path / "record.json")
    again = Layouts.load(tmp_path / "record.json")
    assert again.source.startswith("recorded on ") and some.source.startswith("live (vllm 0; a pretended h200")
    assert [one.deployment for one in again.layouts] == [one.deployment for one in some.layouts]
    assert [(one.tokens, one.requests, one.rank) for one in again.layouts] == [
        (one.tokens, one.requests, one.rank) for one in some.layouts
    ]
    assert layouts_json("m", Checkpoint([], {}), again) == layouts_json("m", Checkpoint([], {}), some)
