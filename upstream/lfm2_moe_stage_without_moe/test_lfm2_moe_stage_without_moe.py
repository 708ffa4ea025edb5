# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage of LFM2-MoE that holds dense layers alone can be built.

The first ``num_dense_layers`` layers have no experts. ``Lfm2MoeForCausalLM.__init__``
looks for an ``Lfm2MoeSparseMoeBlock`` among the layers of the stage and raises where
there is none: ``RuntimeError: No Lfm2MoeSparseMoeBlock layer found``.

Real: both classes, their ``__init__``, the layer split, the placeholders,
``load_weights``. Stubs, on the CPU: the decoder layers and the process groups.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Lfm2MoeConfig
from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models import lfm2_moe, utils
from vllm.model_executor.models.interfaces import is_mixture_of_experts

VOCAB, HIDDEN = 128, 64
EXPERTS = ("logical", "physical", "local_physical", "routed", "redundant")

# Layers, dense ones among them, stages, and which stage.
STAGES = [
    (24, 2, 1, 0),  # LFM2-8B-A1B
    *((24, 2, 8, rank) for rank in range(8)),
    *((24, 2, 9, rank) for rank in range(9)),
    *((24, 2, 12, rank) for rank in range(12)),
    *((6, 2, 3, rank) for rank in range(3)),
    *((6, 3, 2, rank) for rank in range(2)),
]


class _MoEBlock(lfm2_moe.Lfm2MoeSparseMoeBlock):
    def __init__(self):
        nn.Module.__init__(self)
        self.experts = nn.Module()
        for name in EXPERTS:
            setattr(self, f"n_{name}_experts", 4)


def _layer(cls):
    class Layer(cls):
        def __init__(self, config, layer_idx, *args, **kwargs):
            nn.Module.__init__(self)
            is_dense = layer_idx < config.num_dense_layers
            self.feed_forward = nn.Identity() if is_dense else _MoEBlock()
            self.norm = nn.Linear(HIDDEN, 1, bias=False)

    return Layer


@pytest.mark.parametrize(("layers", "dense", "size", "rank"), STAGES)
def test_stage_is_built_and_loaded(layers, dense, size, rank, monkeypatch):
    stage = {"is_first_rank": rank == 0, "is_last_rank": rank == size - 1}
    group = SimpleNamespace(rank_in_group=rank, world_size=size, **stage)
    monkeypatch.setattr(parallel_state, "_PP", group)
    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", one)
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    for name in ("Lfm2MoeAttentionDecoderLayer", "Lfm2MoeShortConvDecoderLayer"):
        monkeypatch.setattr(lfm2_moe, name, _layer(getattr(lfm2_moe, name)))
    config = Lfm2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_dense_layers=dense,
        layer_types=["conv", "full_attention"] * (layers // 2),
    )
    vllm_config = VllmConfig(device_config=DeviceConfig("cpu"))
    vllm_config.cache_config = CacheConfig()
    vllm_config.model_config = SimpleNamespace(
        hf_config=config,
        hf_text_config=config,
        dtype=torch.float32,
        head_dtype=torch.float32,
    )

    with set_current_vllm_config(vllm_config), torch.device("cpu"):
        model = lfm2_moe.Lfm2MoeForCausalLM(vllm_config=vllm_config)

    start, end = get_pp_indices(layers, rank, size)
    with_experts = end - max(start, dense)
    assert is_mixture_of_experts(model) == (with_experts > 0)
    if with_experts > 0:
        assert len(model.moe_layers) == model.num_moe_layers == with_experts
        assert model.num_logical_experts == 4

    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.norm.weight"] = torch.randn(1, HIDDEN)
    model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())

    for layer in range(start, end):
        expected = tensors[f"model.layers.{layer}.norm.weight"]
        assert torch.equal(model.model.layers[layer].norm.weight, expected)
