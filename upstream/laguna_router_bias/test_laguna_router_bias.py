# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laguna's router gets the correction bias of the checkpoint.

The checkpoint has one ``mlp.experts.e_score_correction_bias`` of [num_experts] for
each MoE layer. ``mlp.experts`` is an ``MoERunner``, which hands it to
``RoutedExperts.load_weights``; that one knows tensors of single experts only and
passes over what it cannot match, without a word. The parameter, which the router
shares, is ``mlp.experts.routed_experts.e_score_correction_bias`` and stays at zero.

Real: ``load_weights`` of model, runner and experts, the layer split, the
placeholders. Stubs, on the CPU: the modules around them and the pipeline group.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models import utils
from vllm.model_executor.models.laguna import LagunaModel

NUM_LAYERS = 12  # so that there is a layer 11 beside layer 1
NUM_EXPERTS, HIDDEN, INNER = 3, 4, 2
STORED = "mlp.experts.e_score_correction_bias"
PARAMETER = "mlp.experts.routed_experts.e_score_correction_bias"

# The layers of each stage, as in VLLM_PP_LAYER_PARTITION, and the rank of a stage.
SPLITS = [(12,), (6, 6), (4, 4, 4), (2, 10)]
STAGES = [(split, rank) for split in SPLITS for rank in range(len(split))]


def _bare(cls: type[nn.Module], **attributes) -> nn.Module:
    """A real class with its methods, without its __init__, which asks for a GPU."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _load_expert(param, loaded_weight, shard_id, expert_id, **_) -> bool:
    rows = {"w1": slice(0, INNER), "w3": slice(INNER, 2 * INNER), "w2": slice(None)}
    param.data[expert_id, rows[shard_id]] = loaded_weight
    return True


def _weight(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
    weight.weight_loader = _load_expert
    return weight


def _decoder_layer(prefix: str = "") -> nn.Module:
    bias = nn.Parameter(torch.zeros(NUM_EXPERTS), requires_grad=False)
    experts = _bare(
        RoutedExperts,
        layer_name=f"{prefix}.mlp.experts",
        moe_config=SimpleNamespace(num_experts=NUM_EXPERTS, num_logical_experts=NUM_EXPERTS, is_act_and_mul=True),
        expert_map_manager=SimpleNamespace(num_fused_shared_experts=0),
        ckpt_gate_proj_name="gate_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj",
        lora_base_layer_prefix="",
        e_score_correction_bias=bias,
        w13_weight=_weight(NUM_EXPERTS, 2 * INNER, HIDDEN),
        w2_weight=_weight(NUM_EXPERTS, HIDDEN, INNER),
    )
    runner = _bare(MoERunner, routed_experts=experts)
    return _bare(nn.Module, mlp=_bare(nn.Module, experts=runner))


def _checkpoint(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    tensors = {STORED: torch.randn(NUM_EXPERTS, generator=generator)}
    for expert in range(NUM_EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
            weight = torch.randn(shape, generator=generator)
            tensors[f"mlp.experts.{expert}.{name}.weight"] = weight
    return tensors


def _expected(layer: int) -> dict[str, torch.Tensor]:
    tensors = _checkpoint(layer)

    def stacked(name: str) -> torch.Tensor:
        path = f"mlp.experts.{{}}.{name}.weight"
        return torch.stack([tensors[path.format(e)] for e in range(NUM_EXPERTS)])

    w13 = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    path = "mlp.experts.routed_experts."
    return {
        PARAMETER: tensors[STORED],
        f"{path}w13_weight": w13,
        f"{path}w2_weight": stacked("down_proj"),
    }


@pytest.mark.parametrize("order", [1, -1], ids=["ascending", "descending"])
@pytest.mark.parametrize(("split", "rank"), STAGES)
def test_stage_loads_its_router_biases(split, rank, order, monkeypatch):
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    group = SimpleNamespace(rank_in_group=rank, world_size=len(split))
    monkeypatch.setattr(parallel_state, "_PP", group)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
    _, _, layers = utils.make_layers(NUM_LAYERS, _decoder_layer, "model.layers")
    model = _bare(LagunaModel, layers=layers, quant_config=None)

    loaded = model.load_weights(
        (f"layers.{layer}.{name}", tensor)
        for layer in range(NUM_LAYERS)[::order]
        for name, tensor in _checkpoint(layer).items()
    )

    expected = {
        f"layers.{layer}.{name}": tensor
        for layer in range(sum(split[:rank]), sum(split[: rank + 1]))
        for name, tensor in _expected(layer).items()
    }
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    wrong = [n for n in expected if not torch.equal(parameters[n], expected[n])]
    assert wrong == []
    assert loaded == expected.keys()
