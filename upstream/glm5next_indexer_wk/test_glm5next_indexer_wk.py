# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage of Glm5Next dequantizes the FP8 projections of its own layers only.

Every pipeline stage iterates the whole checkpoint; the layers of other stages are
``PPMissingLayer`` placeholders without parameters. ``Glm5NextModel.load_weights``
keeps some projections in BF16 that a block-FP8 checkpoint stores as ``weight`` and
``weight_scale_inv``: ``_try_load_fp8_indexer_wk`` (``wk``) and
``_try_load_fp8_attn_proj`` (``q_a_proj``, ``kv_a_proj_with_mqa``, ``q_b_proj``,
``o_proj``) buffer one until the other has arrived. Both run before the branches that
ask ``is_pp_missing_parameter``, so they have to ask for themselves, before they
buffer; or else the pair of a missing layer ends in
``KeyError: 'layers.3.self_attn.indexer.wk_weights_proj.weight'``, and a stage holds
halves that it never stores.

Real: ``load_weights``, the layer split, the placeholders, the weight loader of the
fused parameters. Stubs, on the CPU: the modules around it and the process groups.
"""

import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models import utils
from vllm.models.glm5next.common.model import Glm5NextModel

NUM_LAYERS = 12  # so that there is a layer 11 beside layer 1
BLOCK = 128  # _try_load_fp8_attn_proj pads to blocks of this size
INDEXER, ATTN = "self_attn.indexer", "self_attn"

# Rows of each tensor of a layer; all have BLOCK columns.
FP8 = {
    f"{INDEXER}.wk.weight": BLOCK,
    f"{ATTN}.q_a_proj.weight": BLOCK,
    f"{ATTN}.kv_a_proj_with_mqa.weight": BLOCK,
    f"{ATTN}.q_b_proj.weight": 2 * BLOCK,
    f"{ATTN}.o_proj.weight": 2 * BLOCK,
}
BF16 = {f"{INDEXER}.weights_proj.weight": 4, "input_layernorm.weight": 1}
# Which of them, one below the other, make up each parameter of the model.
PARAMETERS = {
    f"{INDEXER}.wk_weights_proj.weight": [
        f"{INDEXER}.wk.weight",
        f"{INDEXER}.weights_proj.weight",
    ],
    f"{ATTN}.fused_qkv_a_proj.weight": [
        f"{ATTN}.q_a_proj.weight",
        f"{ATTN}.kv_a_proj_with_mqa.weight",
    ],
    f"{ATTN}.q_b_proj.weight": [f"{ATTN}.q_b_proj.weight"],
    f"{ATTN}.o_proj.weight": [f"{ATTN}.o_proj.weight"],
    "input_layernorm.weight": ["input_layernorm.weight"],
}
CONFIG = SimpleNamespace(
    num_hidden_layers=NUM_LAYERS,
    num_nextn_predict_layers=0,
    n_routed_experts=None,
    mla_use_nope=False,
)

# The layers of each stage, as in VLLM_PP_LAYER_PARTITION, and the rank of a stage.
SPLITS = [(12,), (6, 6), (4, 4, 4), (2, 10)]
STAGES = [(split, rank) for split in SPLITS for rank in range(len(split))]

# Orders of arrival, as sort keys of (layer, name); the sort is stable.
ORDERS = {
    "weight_before_scale": lambda layer, name: layer,
    "scale_before_weight": lambda layer, name: (layer, "scale" not in name),
    "scales_after_all_layers": lambda layer, name: "scale" in name,
    "layers_reversed": lambda layer, name: -layer,
}


def _values(layer: int, name: str) -> torch.Tensor:
    """Small whole numbers, which FP8 and BF16 hold exactly; no two tensors alike."""
    rows = (FP8 | BF16)[name]
    seed = 31 * layer + 7 * list(FP8 | BF16).index(name)
    codes = (torch.arange(rows * BLOCK) * (seed + 3) + seed) % 13 - 6
    return codes.float().view(rows, BLOCK)


def _scales(layer: int, name: str) -> torch.Tensor:
    """A power of two for each block, so that products are exact."""
    blocks = FP8[name] // BLOCK
    return 2.0 ** torch.arange(layer % 5 - 2, layer % 5 - 2 + blocks).view(blocks, 1)


@functools.cache
def _checkpoint() -> dict[tuple[int, str], torch.Tensor]:
    tensors = {}
    for layer in range(NUM_LAYERS):
        for name in FP8:
            tensors[layer, name] = _values(layer, name).to(torch.float8_e4m3fn)
            tensors[layer, f"{name}_scale_inv"] = _scales(layer, name)
        for name in BF16:
            tensors[layer, name] = _values(layer, name).to(torch.bfloat16)
    return tensors


@functools.cache
def _expected(layer: int, name: str) -> torch.Tensor:
    """A tensor as the model holds it: value times scale of its block."""
    values = _values(layer, name)
    if name in FP8:
        values = values * _scales(layer, name).repeat_interleave(BLOCK, dim=0)
    return values.to(torch.bfloat16)


def _fused(*rows: int) -> nn.Module:
    return MergedColumnParallelLinear(BLOCK, list(rows), bias=False, params_dtype=torch.bfloat16, disable_tp=True)


def _plain(rows: int) -> nn.Module:
    module = nn.Module()
    weight = torch.empty(rows, BLOCK, dtype=torch.bfloat16)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.weight.weight_loader = lambda param, loaded: param.data.copy_(loaded)
    return module


def _decoder_layer(prefix: str = "") -> nn.Module:
    layer, attn, indexer = nn.Module(), nn.Module(), nn.Module()
    indexer.wk_weights_proj = _fused(BLOCK, 4)
    attn.indexer = indexer
    attn.fused_qkv_a_proj = _fused(BLOCK, BLOCK)
    attn.q_b_proj, attn.o_proj = _plain(2 * BLOCK), _plain(2 * BLOCK)
    layer.self_attn, layer.input_layernorm = attn, _plain(1)
    return layer


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("split", "rank"), STAGES)
def test_stage_loads_its_own_fp8_projections(split, rank, order, monkeypatch):
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    group = SimpleNamespace(rank_in_group=rank, world_size=len(split))
    monkeypatch.setattr(parallel_state, "_PP", group)
    # A parameter asks for its rank when it is made, with disable_tp as well.
    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", one)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
    model = Glm5NextModel.__new__(Glm5NextModel)  # no __init__, which asks for a GPU
    nn.Module.__init__(model)
    model.config, model.is_fused_shared_expert_enabled = CONFIG, False
    with torch.device("cpu"):
        _, _, model.layers = utils.make_layers(NUM_LAYERS, _decoder_layer, "model.layers")
    own = range(sum(split[:rank]), sum(split[: rank + 1]))
    foreign: dict[tuple[int, str], weakref.ref] = {}

    def arrivals():
        tensors = {key: tensor.clone() for key, tensor in _checkpoint().items()}
        for layer, name in sorted(tensors, key=lambda key: ORDERS[order](*key)):
            fresh = [tensors.pop((layer, name))]
            if layer not in own:
                foreign[layer, name] = weakref.ref(fresh[0])
            # pop: a variable here would keep the tensor alive while this waits.
            yield f"layers.{layer}.{name}", fresh.pop()

    loaded = model.load_weights(arrivals())

    expected = {
        f"layers.{layer}.{path}": torch.cat([_expected(layer, part) for part in parts])
        for layer in own
        for path, parts in PARAMETERS.items()
    }
    assert expected.keys() <= loaded
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    wrong = [n for n in expected if not torch.equal(parameters[n], expected[n])]
    assert wrong == []
    if any(ref() is not None for ref in foreign.values()):
        gc.collect()
    assert [key for key, ref in foreign.items() if ref() is not None] == []
