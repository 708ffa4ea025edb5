# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage of GraniteMoeHybrid loads the parameters of its own layers only.

Every pipeline stage iterates the whole checkpoint; the layers of other stages are
``PPMissingLayer`` placeholders without parameters. ``GraniteMoeHybridModel.
load_weights`` has four ways to store a tensor. Fused and expert parameters are
looked up with a guard; what is stored as it is (the router under its new name, norms,
Mamba) is not, and ends in
``KeyError: 'layers.3.block_sparse_moe.gate.weight'``.

Real: ``load_weights``, the layer split, the placeholders. Stubs, on the CPU: the
modules around it, their weight loaders and the pipeline group.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.models import utils
from vllm.model_executor.models.granitemoehybrid import GraniteMoeHybridModel

NUM_LAYERS = 12  # so that there is a layer 11 beside layer 1
NUM_EXPERTS, HIDDEN, INNER = 3, 4, 2
EXPERTS = "block_sparse_moe.experts.routed_experts"

# What a layer's tensors are called in the checkpoint, and their shapes.
TENSORS = {
    "input_layernorm.weight": (HIDDEN,),
    "mamba.A_log": (HIDDEN,),
    "self_attn.q_proj.weight": (4, HIDDEN),
    "self_attn.k_proj.weight": (2, HIDDEN),
    "self_attn.v_proj.weight": (2, HIDDEN),
    "block_sparse_moe.router.layer.weight": (NUM_EXPERTS, HIDDEN),
    "block_sparse_moe.input_linear.weight": (NUM_EXPERTS, 2 * INNER, HIDDEN),
    "block_sparse_moe.output_linear.weight": (NUM_EXPERTS, HIDDEN, INNER),
}
# Which of them, one below the other, make up each parameter of the model.
PARAMETERS = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "mamba.A": ["mamba.A_log"],
    "self_attn.qkv_proj.weight": [f"self_attn.{p}_proj.weight" for p in "qkv"],
    "block_sparse_moe.gate.weight": ["block_sparse_moe.router.layer.weight"],
    f"{EXPERTS}.w13_weight": ["block_sparse_moe.input_linear.weight"],
    f"{EXPERTS}.w2_weight": ["block_sparse_moe.output_linear.weight"],
}
ROWS = {"q": (0, 4), "k": (4, 6), "v": (6, 8)}  # of qkv_proj
EXPERT_ROWS = {"w1": (0, INNER), "w3": (INNER, 2 * INNER), "w2": (0, HIDDEN)}

# The layers of each stage, as in VLLM_PP_LAYER_PARTITION, and the rank of a stage.
SPLITS = [(12,), (6, 6), (4, 4, 4), (2, 10)]
STAGES = [(split, rank) for split in SPLITS for rank in range(len(split))]
ORDERS = {"ascending": 1, "descending": -1}


def _tensor(layer: int, name: str) -> torch.Tensor:
    """Values that no other tensor has."""
    shape = TENSORS[name]
    first = 1000 * layer + 100 * list(TENSORS).index(name)
    return torch.arange(first, first + torch.Size(shape).numel()).float().view(shape)


def _load_rows(param, loaded, shard_id) -> None:
    param.data[slice(*ROWS[shard_id])] = loaded


def _load_expert(param, loaded, name, shard_id, expert_id) -> None:
    param.data[expert_id, slice(*EXPERT_ROWS[shard_id])] = loaded


def _decoder_layer(prefix: str = "") -> nn.Module:
    """Every parameter in a module of the right path, NaN until it is loaded."""
    layer = nn.Module()
    for path, parts in PARAMETERS.items():
        *modules, name = path.split(".")
        module = layer
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        shape = torch.cat([_tensor(0, part) for part in parts]).shape
        parameter = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        if "qkv" in path:
            parameter.weight_loader = _load_rows
        elif EXPERTS in path:
            parameter.weight_loader = _load_expert
        module.register_parameter(name, parameter)
    return layer


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("split", "rank"), STAGES)
def test_stage_loads_its_own_layers(split, rank, order, monkeypatch):
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    group = SimpleNamespace(rank_in_group=rank, world_size=len(split))
    monkeypatch.setattr(parallel_state, "_PP", group)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
    model = GraniteMoeHybridModel.__new__(GraniteMoeHybridModel)  # no __init__
    nn.Module.__init__(model)
    model.config = SimpleNamespace(num_local_experts=NUM_EXPERTS)
    _, _, model.layers = utils.make_layers(NUM_LAYERS, _decoder_layer, "model.layers")
    own = range(sum(split[:rank]), sum(split[: rank + 1]))
    layers = range(NUM_LAYERS)[:: ORDERS[order]]

    loaded = model.load_weights((f"layers.{layer}.{name}", _tensor(layer, name)) for layer in layers for name in TENSORS)

    expected = {
        f"layers.{layer}.{path}": torch.cat([_tensor(layer, part) for part in parts])
        for layer in own
        for path, parts in PARAMETERS.items()
    }
    assert loaded == expected.keys()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    wrong = [n for n in expected if not torch.equal(parameters[n], expected[n])]
    assert wrong == []
