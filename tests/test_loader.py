"""The helper of the bug, before and after the fix, and the ledger that has to close."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize
from glmpp.errors import GlmppError
from glmpp.formats.tensor import torch_dtypes
from glmpp.ledger import LOADED, UNEXPECTED, Ledger, digest
from glmpp.loader import (
    first_foreign_pair,
    load_fp8_indexer_wk,
    load_fp8_indexer_wk_late_skip,
    load_fp8_indexer_wk_unguarded,
    load_stage,
)
from glmpp.partition import OTHER_STAGE, SPECULATIVE, make_stages
from glmpp.serving.write_tracking import WriteRecorder

SPLITS = [(1, None), (2, None), (3, None), (4, None), (8, None), (3, [1, 9, 2])]
HIDDEN, HEAD = 256, 128


class FusedParameter(torch.nn.Parameter):
    """wk_weights_proj as vLLM has it: shard 0 is wk, shard 1 weights_proj."""

    @staticmethod
    def make() -> torch.nn.Parameter:
        param = torch.nn.Parameter(torch.full((HEAD + 4, HIDDEN), -1.0, dtype=torch.bfloat16), requires_grad=False)
        param.weight_loader = lambda p, tensor, shard: p.data[:HEAD].copy_(tensor) if shard == 0 else None
        return param


def wk(layer: int) -> dict[str, torch.Tensor]:
    """FP8 wk of a layer and its scale, under the names that the inner model sees."""
    codes, scale = quantize(torch.randn(HEAD, HIDDEN, generator=torch.Generator().manual_seed(layer)))
    stem = f"layers.{layer}.self_attn.indexer.wk"
    return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scale}


def fused(layer: int) -> str:
    return f"layers.{layer}.self_attn.indexer.wk_weights_proj.weight"


# --- the helper ---


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_arrival_order_of_two_layers_gives_the_same_parameters(order):
    params, pending, loaded = {fused(n): FusedParameter.make() for n in (1, 11)}, {}, set()
    arrivals = [*wk(1).items(), *wk(11).items()]
    for index in order:
        assert load_fp8_indexer_wk(*arrivals[index], pending, params, loaded, [])
    assert pending == {} and loaded == {fused(1), fused(11)}
    for layer in (1, 11):
        weight, scale = wk(layer).values()
        assert torch.equal(params[fused(layer)][:HEAD], dequantize(weight, scale))
        assert (params[fused(layer)][HEAD:] == -1).all()  # shard 1 untouched


def test_weight_and_scale_may_arrive_in_separate_calls_of_load_weights(tiny):
    """vLLM issue 46078: the buffer has to outlive one call."""
    stage = make_stages(tiny.config, 3)[1]
    everything = list(tiny.read())
    scales = [pair for pair in everything if pair[0].endswith(".wk.weight_scale_inv")]
    rest = [pair for pair in everything if not pair[0].endswith(".wk.weight_scale_inv")]
    whole, _ = load_stage(tiny, stage)
    for first, second in ((scales, rest), (rest, scales)):
        pending = {}
        params, ledger = load_stage(tiny, stage, weights=first, pending=pending)
        assert sorted(pending) == [f"model.layers.{n}.self_attn.indexer" for n in stage.layers]
        assert any(name.endswith("wk_weights_proj.weight") for name in ledger.left_at_init)
        params, ledger = load_stage(tiny, stage, weights=second, pending=pending, params=params)
        assert pending == {} and ledger.left_at_init == []
        assert all(torch.equal(params[name], whole[name]) for name in whole)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_foreign_layer_leaves_buffer_parameters_and_loaded_untouched(reverse):
    pending, loaded = {}, set()
    for name, tensor in sorted(wk(0).items(), reverse=reverse):
        assert load_fp8_indexer_wk(name, tensor, pending, {}, loaded, ["layers.0.", "layers.2."])
        assert pending == {} and loaded == set()


def test_a_missing_layer_1_does_not_swallow_layer_11():
    params, pending, loaded = {fused(11): FusedParameter.make()}, {}, set()
    for name, tensor in wk(11).items():
        load_fp8_indexer_wk(name, tensor, pending, params, loaded, ["layers.1."])
    assert loaded == {fused(11)}


def test_without_the_skip_the_key_error_is_the_one_that_was_reported():
    pending = {}
    (first, weight), (second, scale) = wk(0).items()
    assert load_fp8_indexer_wk_unguarded(first, weight, pending, {}, set(), ["layers.0."])
    with pytest.raises(KeyError) as error:
        load_fp8_indexer_wk_unguarded(second, scale, pending, {}, set(), ["layers.0."])
    assert error.value.args[0] == "layers.0.self_attn.indexer.wk_weights_proj.weight"


def test_with_the_skip_after_the_buffering_foreign_tensors_stay_in_the_buffer():
    pending = {}
    for layer in (0, 2):
        for name, tensor in wk(layer).items():
            load_fp8_indexer_wk_late_skip(name, tensor, pending, {}, set(), [f"layers.{layer}."])
    assert sorted(pending) == ["layers.0.self_attn.indexer", "layers.2.self_attn.indexer"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers.0.self_attn.indexer.wk.weight", torch.bfloat16),  # a BF16 checkpoint
        ("layers.0.self_attn.indexer.weights_proj.weight", torch.bfloat16),
        ("layers.0.self_attn.indexer.wk_weights_proj.weight", torch.bfloat16),
        ("layers.0.self_attn.indexer.wq_b.weight", torch.float8_e4m3fn),
        ("layers.0.self_attn.q_a_proj.weight_scale_inv", torch.float32),
        ("layers.0.mlp.gate.weight", torch.bfloat16),
    ],
)
def test_other_tensors_are_none_of_the_helpers_business(name, dtype):
    pending, loaded = {}, set()
    assert not load_fp8_indexer_wk(name, torch.zeros(2, 2).to(dtype), pending, {}, loaded, ["layers.0."])
    assert pending == {} and loaded == set()


def test_models_without_an_indexer_never_enter_the_helper(full):
    others = [spec for spec in full.values() if ".indexer.wk." not in spec.name]
    assert len(others) == len(full) - 2 * 79
    assert not any(load_fp8_indexer_wk(spec.name, spec.meta(), {}, {}, set(), [""]) for spec in others)


# --- one stage, and its ledger ---


@pytest.mark.parametrize(("pp_size", "counts"), SPLITS)
def test_every_stage_loads_exactly_the_bytes_of_the_whole(tiny, pp_size, counts):
    whole, ledger = load_stage(tiny, make_stages(tiny.config, 1)[0])
    ledger.check(tiny, make_stages(tiny.config, 1)[0])
    seen: set[str] = set()
    for stage in make_stages(tiny.config, pp_size, counts):
        params, ledger = load_stage(tiny, stage)
        ledger.check(tiny, stage)
        assert seen.isdisjoint(params)
        seen |= params.keys()
        for name, param in params.items():
            assert torch.equal(param.view(torch.uint8), whole[name].view(torch.uint8)), name
    assert seen == whole.keys()


def test_full_size_ledger_closes_on_every_stage(full):
    for stage in make_stages(full.config, 8):
        _, ledger = load_stage(full, stage)
        ledger.check(full, stage)
        counts = ledger.counts()
        assert sum(counts.values()) == len(full) and counts[SPECULATIVE] == 1569 and counts[UNEXPECTED] == 0


def test_columns_of_all_stages_together_hold_every_tensor_once(tiny):
    """The MTP layer is neither lost nor counted twice."""
    ledgers = [load_stage(tiny, stage)[1] for stage in make_stages(tiny.config, 4)]
    for name in tiny:
        columns = [ledger.tensors[name] for ledger in ledgers]
        if name.startswith("model.layers.12."):
            assert columns == [SPECULATIVE] * 4
        else:
            assert sorted(columns) == sorted([LOADED] + [OTHER_STAGE] * 3)
    with_drafter = [load_stage(tiny, stage)[1] for stage in make_stages(tiny.config, 4, drafter=True)]
    mtp = [name for name in tiny if name.startswith("model.layers.12.")]
    assert [sum(ledger.tensors[name] == LOADED for name in mtp) for ledger in with_drafter] == [0, 0, 0, len(mtp)]


def test_without_the_skip_the_kits_own_loader_dies_like_vllm(tiny):
    for stage in make_stages(tiny.config, 4):
        with pytest.raises(KeyError) as error:
            load_stage(tiny, stage, helper=load_fp8_indexer_wk_unguarded)
        layer = 3 if stage.is_first else 0
        assert error.value.args[0] == f"model.layers.{layer}.self_attn.indexer.wk_weights_proj.weight"


def test_a_tensor_nobody_owns_is_unexpected_and_the_books_do_not_close(tiny):
    stage = make_stages(tiny.config, 2)[0]
    stray = "model.layers.0.self_attn.rotary.inv_freq"
    pairs = [*tiny.read(), (stray, torch.zeros(4))]
    _, ledger = load_stage(tiny, stage, weights=pairs)
    assert ledger.in_column(UNEXPECTED) == [stray]
    with pytest.raises(GlmppError, match="the ledger only"):
        ledger.check(tiny, stage)


def test_the_books_do_not_close_when_a_tensor_never_arrives(tiny):
    stage = make_stages(tiny.config, 2)[0]
    name = "model.layers.2.input_layernorm.weight"
    _, ledger = load_stage(tiny, stage, weights=(pair for pair in tiny.read() if pair[0] != name))
    assert ledger.left_at_init == [name]
    with pytest.raises(GlmppError, match="the checkpoint or the ledger only"):
        ledger.check(tiny, stage)


def test_the_books_do_not_close_when_half_of_a_pair_is_held_back(tiny):
    stage = make_stages(tiny.config, 2)[0]
    pairs = [(n, t.float() if n == "model.layers.1.self_attn.indexer.wk.weight" else t) for n, t in tiny.read()]
    _, ledger = load_stage(tiny, stage, weights=pairs)
    assert ledger.in_column(UNEXPECTED) == ["model.layers.1.self_attn.indexer.wk.weight_scale_inv"]
    with pytest.raises(
        GlmppError, match=r"'.*layers\.1\..*wk\.weight_scale_inv' came and '.*layers\.1\..*wk\.weight' never did"
    ):
        ledger.check(tiny, stage)


def test_a_tensor_of_another_shape_is_an_error_with_its_name(tiny):
    """torch would spread a [n, 1] over [n, m]."""
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    pairs = [(n, t[:, :1] if n == name else t) for n, t in tiny.read()]
    with pytest.raises(
        GlmppError, match=rf"stage 0 of 2 .*'{name}': a tensor of shape \[2, 1\] does not fit rows of shape \[2, 2\]"
    ):
        load_stage(tiny, make_stages(tiny.config, 2)[0], weights=pairs)


@pytest.mark.parametrize("seed", range(5))
def test_a_tensor_that_is_lost_from_the_checkpoint_is_named(tiny, seed):
    lost = random.Random(seed).choice(list(tiny))
    _, ledger = load_stage(tiny, make_stages(tiny.config, 1)[0], weights=[pair for pair in tiny.read() if pair[0] != lost])
    with pytest.raises(GlmppError, match=re.escape(repr(lost))):
        ledger.check(tiny, make_stages(tiny.config, 1)[0])


@pytest.fixture
def closed(tiny) -> tuple[Ledger, Checkpoint, object]:
    stage = make_stages(tiny.config, 2)[1]
    return load_stage(tiny, stage)[1], tiny, stage


def test_a_guard_that_is_one_layer_too_wide_is_caught(closed):
    ledger, tiny, stage = closed
    name = "model.layers.6.mlp.gate.weight"
    ledger.tensors[name] = OTHER_STAGE
    with pytest.raises(GlmppError, match=rf"{name}.*another stage's.*expected 'loaded'"):
        ledger.check(tiny, stage)


def test_a_parameter_left_at_init_is_caught_unless_accounted_for(closed):
    ledger, tiny, stage = closed
    name = "model.norm.weight"
    ledger.parameters[name] = (0, 256)
    with pytest.raises(GlmppError, match="left at init"):
        ledger.check(tiny, stage)
    ledger.check(tiny, stage, may_stay_at_init=[name])


def test_a_parameter_written_twice_is_caught(closed):
    ledger, tiny, stage = closed
    ledger.parameters["model.norm.weight"] = (512, 256)
    with pytest.raises(GlmppError, match="more than once"):
        ledger.check(tiny, stage)


def test_first_foreign_pair_is_where_the_unguarded_helper_dies_in_any_order(tiny_config):
    tiny = Checkpoint.from_config(tiny_config)
    rng = torch.Generator().manual_seed(3)
    for _ in range(20):
        names = [list(tiny)[i] for i in torch.randperm(len(tiny), generator=rng)]
        for stage in make_stages(tiny.config, 4):
            weights = [(name, tiny[name].meta()) for name in names]
            with pytest.raises(KeyError) as error:
                load_stage(tiny, stage, helper=load_fp8_indexer_wk_unguarded, weights=weights)
            assert error.value.args[0] == first_foreign_pair(names, stage)
    assert first_foreign_pair(tiny, make_stages(tiny.config, 1)[0]) is None


# --- digests ---


@st.composite
def stored(draw) -> torch.Tensor:
    """A tensor of any dtype and rank up to 3, empty ones too, maybe as a view that is not contiguous."""
    dtype = draw(st.sampled_from([*torch_dtypes().values()]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor([*draw(st.binary(min_size=size, max_size=size))], dtype=torch.uint8)
    tensor = (data % 2 if dtype is torch.bool else data).view(dtype).view(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).clone()


@settings(max_examples=300, deadline=None)
@given(stored(), stored())
def test_two_digests_agree_exactly_if_dtype_shape_and_bytes_do(one, other):
    same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(fresh(one), fresh(other))
    assert (digest(one) == digest(other)) == same
    assert digest(one) == digest(fresh(one).view(one.dtype).view(one.shape)) == digest(torch.nn.Parameter(one, False))
    if one.numel():
        changed = fresh(one)
        changed[-1] ^= 1
        assert digest(changed.view(one.dtype).view(one.shape)) != digest(one)


def test_digests_of_conjugates_are_those_of_their_values():
    values = torch.tensor([1 + 2j, 3 - 1j])
    assert digest(values.conj()) == digest(torch.tensor([1 - 2j, 3 + 1j])) != digest(values)
    assert digest(values.conj().imag) == digest(torch.tensor([-2.0, 1.0]))


# --- which parameters were written --------------------------------------------------------------------------------


class Written(torch.nn.Module):
    """A matrix, a fused pair, four experts, a scalar."""

    def __init__(self):
        super().__init__()
        for name, shape in {"matrix": (6, 4), "fused": (8, 4), "experts": (4, 6, 3), "scale": (1,)}.items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))


def experts(model: Written, rows: int, which: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    for expert in which:
        model.experts.data[expert, :rows].copy_(torch.ones(rows, 3))


WRITES = {
    "copy_ of the whole": (lambda m: m.matrix.data.copy_(torch.ones(6, 4)), "matrix"),
    "slice assignment": (lambda m: m.matrix.data.__setitem__(slice(None), 1.0), "matrix"),
    "fill_ of a scalar": (lambda m: m.scale.data.fill_(2.0), "scale"),
    "rows and a fill_ of the rest": (lambda m: (m.matrix.data[:4].copy_(torch.ones(4, 4)), m.matrix[4:].fill_(0)), "matrix"),
    "columns, as tensor parallelism": (
        lambda m: [m.matrix.data.narrow(1, i, 2).copy_(torch.ones(6, 2)) for i in (0, 2)],
        "matrix",
    ),
    "both shards": (lambda m: [m.fused.data.narrow(0, i, 4).copy_(torch.ones(4, 4)) for i in (0, 4)], "fused"),
    "expert by expert": (lambda m: [m.experts.data[i].copy_(torch.ones(6, 3)) for i in range(4)], "experts"),
    "index_copy_": (lambda m: m.matrix.data.index_copy_(0, torch.arange(6), torch.ones(6, 4)), "matrix"),
    "advanced indexing": (lambda m: m.matrix.data.__setitem__(torch.arange(6), torch.ones(6, 4)), "matrix"),
    "one row by its index": (lambda m: m.matrix.data.__setitem__([0], torch.ones(1, 4)), None),
    "two of four columns by their index": (lambda m: m.matrix.data.__setitem__((slice(None), [0, 3]), 1.0), None),
    "columns of experts by an index": (lambda m: m.experts.data.__setitem__((..., torch.arange(3)), 1.0), "experts"),
    "one row of index_copy_": (lambda m: m.matrix.data.index_copy_(0, torch.tensor([2]), torch.ones(1, 4)), None),
    "a mask with a gap": (lambda m: m.matrix.data.__setitem__(torch.arange(24).view(6, 4) != 7, 1.0), None),
    "a mask without one": (lambda m: m.matrix.data.masked_fill_(torch.ones(4, dtype=torch.bool), 1.0), "matrix"),
    "scatter_": (lambda m: m.matrix.data.scatter_(0, torch.arange(6)[:, None].expand(6, 4), torch.ones(6, 4)), "matrix"),
    "put_": (lambda m: m.matrix.data.put_(torch.arange(24), torch.ones(24)), "matrix"),
    "masked_scatter_": (lambda m: m.matrix.data.masked_scatter_(torch.tensor(True), torch.ones(6, 4)), "matrix"),
    "foreach": (lambda m: torch._foreach_copy_([m.matrix.data[:1], m.matrix.data[1:]], [torch.ones(4)] * 2), "matrix"),
    "out=": (lambda m: torch.add(torch.ones(6, 4), 1, out=m.matrix.data), "matrix"),
    "add_": (lambda m: m.matrix.data.add_(1.0), "matrix"),
    "slices that overlap": (lambda m: [m.matrix.data[i : i + 3].fill_(1.0) for i in (0, 1)], None),
    "every second column, twice": (lambda m: [m.matrix.data[:, ::2].fill_(1.0) for _ in range(2)], None),
    "every column, in two steps": (lambda m: [m.matrix.data[:, i::2].fill_(1.0) for i in range(2)], "matrix"),
    "bytes": (lambda m: m.matrix.data.view(torch.uint8).copy_(torch.ones(6, 16, dtype=torch.uint8)), "matrix"),
    "transposed": (lambda m: m.matrix.data.t().copy_(torch.ones(4, 6)), "matrix"),
    "another shape": (lambda m: m.matrix.data.unsqueeze_(0), None),
    "nothing": (lambda m: (m.matrix.data[:0].fill_(1.0), m.matrix.data.masked_fill_(torch.tensor(False), 1.0)), None),
    "one shard of two": (lambda m: m.fused.data[:4].copy_(torch.ones(4, 4)), None),
    "one shard twice": (lambda m: [m.fused.data[:4].copy_(torch.ones(4, 4)) for _ in range(2)], None),
    "an expert missing": (lambda m: [m.experts.data[i].copy_(torch.ones(6, 3)) for i in (0, 1, 3)], None),
    "half an expert missing": (
        lambda m: [
            m.experts.data[i, a : a + 3].copy_(torch.ones(3, 3)) for i in range(4) for a in (0, 3) if (i, a) != (2, 3)
        ],
        None,
    ),
    "the same padding in each expert": (lambda m: experts(m, rows=4), "experts"),
    "half of each expert, no padding": (lambda m: experts(m, rows=3), None),
    "more than the padding left in each expert": (lambda m: experts(m, rows=3), None),
    "an expert missing, the padding of others filled": (lambda m: experts(m, rows=6, which=(0, 1, 3)), None),
    "rows short of the padding": (lambda m: m.matrix.data[:5].copy_(torch.ones(5, 4)), "matrix"),
    "rows short of more than the padding": (lambda m: m.matrix.data[:4].copy_(torch.ones(4, 4)), None),
    "replaced as a whole": (lambda m: setattr(m.matrix, "data", torch.ones(6, 4)), "matrix"),
    "a read": (lambda m: m.matrix.sum(), None),
}

# Elements that no checkpoint fills, in these cases.
PADDING = {
    "the same padding in each expert": {"experts": 4 * 2 * 3},
    "more than the padding left in each expert": {"experts": 4 * 2 * 3},
    "an expert missing, the padding of others filled": {"experts": 4 * 2 * 3},
    "rows short of the padding": {"matrix": 4},
    "rows short of more than the padding": {"matrix": 4},
}
TWICE = {"one shard twice": "fused", "slices that overlap": "matrix", "every second column, twice": "matrix"}


@pytest.mark.parametrize("case", WRITES)
def test_a_load_is_seen_to_write_what_it_writes(case):
    write, filled = WRITES[case]
    model = Written()
    with WriteRecorder(model) as recorder:
        write(model)
    left = [name for name in ("matrix", "fused", "experts", "scale") if name != filled]
    assert recorder.left_at_init(PADDING.get(case, {})) == left
    assert recorder.overwritten == {TWICE[case]} if case in TWICE else not recorder.overwritten


VALUES = {torch.float32: float("nan"), torch.int16: -7}


@st.composite
def views(draw, tensor: torch.Tensor) -> torch.Tensor:
    """A part of a tensor: rows or columns, with a step, transposed, one dimension less, flat."""
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, max(tensor.dim() - 1, 0)))
        kind = draw(st.sampled_from(["slice", "slice", "select", "transpose", "flat", "diagonal"]))
        if not tensor.dim() or not tensor.numel():
            break
        if kind == "slice":
            start, end = sorted(draw(st.tuples(*[st.integers(0, tensor.shape[axis])] * 2)))
            tensor = tensor[(slice(None),) * axis + (slice(start, end, draw(st.integers(1, 3))),)]
        elif kind == "select":
            tensor = tensor.select(axis, draw(st.integers(0, tensor.shape[axis] - 1)))
        elif kind == "transpose":
            tensor = tensor.transpose(axis, -1)
        elif kind == "flat" and tensor.is_contiguous():
            tensor = tensor.view(-1)
        elif kind == "diagonal" and tensor.dim() > 1:
            tensor = tensor.diagonal(0, 0, 1)
    return tensor


@st.composite
def operators(draw, view: torch.Tensor):
    """An operator that writes ones into all or some of a view."""
    ones, axis = torch.ones(view.shape, dtype=view.dtype), draw(st.integers(0, max(view.dim() - 1, 0)))
    length = view.shape[axis] if view.dim() else 0
    some = st.lists(st.integers(0, max(length - 1, 0)), max_size=4, unique=True)
    index = torch.tensor(draw(some) if length else [], dtype=torch.int64)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=view.numel(), max_size=view.numel())), dtype=torch.bool)
    mask = mask.view(view.shape)
    flat = mask.view(-1).nonzero()[:, 0]
    where = (slice(None),) * axis + (index,)
    whole = [
        lambda v: v.copy_(ones),
        lambda v: v.fill_(1),
        lambda v: torch._foreach_copy_([v], [ones]),
        lambda v: torch.mul(ones, ones, out=v),
        lambda v: v.__setitem__(..., 1),
        lambda v: torch.ops.aten.copy_(v, ones),
    ]
    by_mask = [
        lambda v: v.__setitem__(mask, 1),
        lambda v: v.masked_fill_(mask, 1),
        lambda v: v.masked_scatter_(mask, ones),
        lambda v: v.put_(flat, torch.ones(len(flat), dtype=v.dtype)),
    ]
    picked = torch.ones([len(index) if at == axis else size for at, size in enumerate(view.shape)], dtype=view.dtype)
    if not view.dim():
        return draw(st.sampled_from(whole + by_mask[:3]))
    along = index.view([-1 if at == axis else 1 for at in range(view.dim())]).expand(picked.shape)
    by_index = [
        lambda v: v.__setitem__(where, 1),
        lambda v: v.index_copy_(axis, index, picked),
        lambda v: v.index_fill_(axis, index, 1),
        lambda v: v.scatter_(axis, along, 1),
        lambda v: v.scatter_(axis, along, picked),
    ]
    square = [lambda v: v.fill_diagonal_(1)] if view.dim() == 2 and min(view.shape) else []
    return draw(st.sampled_from(whole + by_mask + by_index + square))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_exactly_the_elements_that_any_operators_write_are_counted(data):
    """The oracle does the same to numbers that no operator writes, and looks which of them are gone."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from([*VALUES]))
    model, turned = torch.nn.Module(), data.draw(st.booleans())
    fresh = torch.full(shape, VALUES[dtype], dtype=dtype)
    model.one = torch.nn.Parameter(fresh.transpose(0, -1) if turned and shape else fresh, requires_grad=False)
    times, oracle = torch.zeros(model.one.shape, dtype=torch.int64), model.one.data
    recorder = WriteRecorder(model)
    for _ in range(data.draw(st.integers(1, 4))):
        view = data.draw(views(oracle))
        write = data.draw(operators(view))
        before = oracle.clone()
        oracle.fill_(VALUES[dtype])
        write(view)
        wrote = ~oracle.isnan() if dtype.is_floating_point else oracle != VALUES[dtype]
        times += wrote
        oracle.copy_(before)
        with recorder:
            write(view)
    assert recorder.filled == {"one": int((times > 0).sum())} and recorder.written == {"one": int(times.sum())}
    assert recorder.overwritten == ({"one"} if (times > 1).any() else set())
    assert recorder.left_at_init() == ([] if (times > 0).all() else ["one"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 6)), max_size=12), st.integers(0, 18))
def test_each_expert_lacks_no_more_than_its_padding(writes, padding):
    model, written = Written(), torch.zeros(4, 6, 3, dtype=torch.bool)
    with WriteRecorder(model) as recorder:
        for expert, start, rows in writes:
            model.experts.data[expert, start : start + rows].fill_(1.0)
            written[expert, start : start + rows] = True
    left = bool((written.view(4, -1).sum(1) < 18 - padding).any())
    assert ("experts" in recorder.left_at_init({"experts": 4 * padding})) == left


def test_parameters_that_share_a_storage_are_told_apart():
    model, both = torch.nn.Module(), torch.zeros(4, 3)
    model.upper, model.lower = (torch.nn.Parameter(part, requires_grad=False) for part in (both[:2], both[2:]))
    model.tied = torch.nn.Parameter(both[:2], requires_grad=False)
    with WriteRecorder(model) as recorder:
        model.upper.data.fill_(1.0)
        both[1:3, 0].fill_(1.0)
    assert recorder.left_at_init() == ["lower"] and recorder.filled == {"upper": 6, "lower": 1, "tied": 6}


@pytest.mark.parametrize("more", [0, 1])
def test_an_index_without_data_is_no_verdict(more):
    """Of a matrix of six rows; on the meta device nobody knows which rows three indices name."""
    model = Written().to("meta")
    with WriteRecorder(model) as recorder:
        model.matrix.data[: 3 + more].fill_(1.0)
        model.matrix.data[torch.zeros(3 - more, dtype=torch.int64, device="meta")] = 1.0
        model.fused.data.index_copy_(0, torch.zeros(3, dtype=torch.int64, device="meta"), model.fused.data[:3].clone())
        model.experts.data.fill_(1.0).masked_fill_(torch.ones(3, dtype=torch.bool, device="meta"), 0.0)
    assert recorder.left_at_init() == ["fused", "scale"] and recorder.unplaced() == {"matrix": 4 * (3 - more)}
    assert recorder.left_at_init({"matrix": 12}) == ["fused", "scale"] and recorder.unplaced({"matrix": 12}) == {}


def test_what_is_known_of_an_index_on_the_meta_device_is_used():
    model = Written().to("meta")
    with WriteRecorder(model) as recorder:
        model.matrix.data[torch.arange(5, device="cpu")] = 1.0
    assert recorder.filled["matrix"] == 20 and recorder.unplaced() == {}


def test_recorders_nest_and_leave_torch_as_it_was():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.copy_.default
            return func(*args, **(kwargs or {}))

    model, before = Written(), dict(vars(torch.Tensor))
    patch = lambda tensor, source: tensor.set_(source)  # noqa: E731
    torch.Tensor.copy_ = patch
    try:
        with WriteRecorder(model) as outer, Counting() as counting:
            with pytest.raises(RuntimeError), WriteRecorder(model) as inner:
                torch.ops.aten.copy_(model.scale.data, torch.ones(1))
                model.matrix.data[:] = torch.ones(7, 7)
            torch.ops.aten.copy_(model.fused.data, torch.ones(8, 4))
        torch.ops.aten.copy_(model.matrix.data, torch.ones(6, 4))
        assert torch.Tensor.copy_ is patch
    finally:
        del torch.Tensor.copy_
    assert vars(torch.Tensor) == before
    assert inner.left_at_init() == ["matrix", "fused", "experts"] and outer.left_at_init() == ["matrix", "experts"]
    assert counting.seen == 2


def test_a_storage_that_is_given_back_is_no_longer_the_parameters():
    """The next tensor may get its number."""
    model = Written()
    recorder = WriteRecorder(model)
    model.matrix.data = torch.ones(6, 4)
    others = [torch.zeros(6, 4) for _ in range(100)]
    with recorder:
        list(recorder.hand_over([("a", others[0])]))
        for other in others:
            other.copy_(torch.ones(6, 4))
    assert recorder.stored == set() and "matrix" not in recorder.left_at_init()


def test_a_parameter_that_gives_its_storage_back_and_gets_another_is_written():
    """However often: a storage that comes later must not be taken for the one that has gone."""
    model = Written()
    with WriteRecorder(model) as recorder:
        for _ in range(20):
            model.matrix.data = torch.empty(0)
            model.matrix.data = torch.ones(6, 4)
    assert "matrix" not in recorder.left_at_init()


def test_threads_that_a_load_starts_are_seen():
    model, run = Written(), threading.Thread.run
    with WriteRecorder(model) as recorder, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda row: row.copy_(torch.ones(4)), model.matrix.data))
    assert "matrix" not in recorder.left_at_init() and threading.Thread.run is run


@pytest.mark.parametrize(
    "write",
    [
        lambda data: data.index_add_(0, torch.arange(6, dtype=torch.int32), torch.ones(6, 4)),
        lambda data: data.index_put_((torch.ones(6, dtype=torch.uint8),), torch.ones(6, 4)),
        lambda data: data.index_copy_(0, torch.arange(6), torch.ones(6, 4)),
    ],
)
def test_an_index_may_be_of_any_kind_that_torch_takes(write):
    model = Written()
    with WriteRecorder(model) as recorder:
        write(model.matrix.data)
    assert "matrix" not in recorder.left_at_init()


def test_an_index_out_of_bounds_is_the_models_fault_and_ends_no_recorder():
    """On the meta device torch does not look."""
    model = Written().to("meta")
    with WriteRecorder(model) as recorder:
        model.matrix.data.index_copy_(0, torch.tensor([1000]), torch.empty(1, 4, device="meta"))
    assert "matrix" in recorder.left_at_init() and not recorder.stored
    with pytest.raises(IndexError), WriteRecorder(Written()) as recorder:
        recorder.model.matrix.data[[1000]] = 1.0


def test_operators_that_are_made_while_a_recorder_lives_are_seen_too():
    model, recorder = Written(), WriteRecorder(Written())
    with recorder:
        pass
    with torch.library._scoped_library("glmpp_test", "FRAGMENT") as library:
        library.define("ones_(Tensor(a!) self) -> ()")
        library.impl("ones_", lambda tensor: (tensor.fill_(1.0), None)[1], "CPU")
        with WriteRecorder(model) as recorder:
            torch.ops.glmpp_test.ones_(model.matrix.data)
    assert "matrix" not in recorder.left_at_init() and not recorder.overwritten


def test_of_what_a_tensor_wrote_the_parameters_are_known():
    model = Written()
    with WriteRecorder(model) as recorder:
        for name, tensor in recorder.hand_over([("a", torch.ones(4)), ("b", torch.ones(2, 4)), ("c", torch.ones(1))]):
            if name != "c":
                model.matrix.data[:2].copy_(tensor)
                model.fused.data[[1, 2, 2]] = 1.0
    assert recorder.traces({"a", "b"}) == {name: {"matrix": 8, "fused": 8} for name in "ab"}
    assert recorder.stored == {"a", "b"}
    assert recorder.shapes == [(4,), (2, 4), (1,)]
