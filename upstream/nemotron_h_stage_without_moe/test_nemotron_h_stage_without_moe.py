# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage of Nemotron-H that holds no MoE layer can be built.

``NemotronHModel.has_moe`` is read off the pattern of the whole model;
``NemotronHForCausalLM.__init__`` then looks for an MoE layer among those of the
stage and asserts that there is one, without a message.

Real: both classes, their ``__init__``, the layer split, the placeholders. Stubs, on
the CPU: the decoder layers and the process groups.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.models import nemotron_h
from vllm.model_executor.models.interfaces import is_mixture_of_experts

EXPERTS = ("logical", "physical", "local_physical", "routed", "shared", "redundant")
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"  # Nemotron 3 Nano, 30B

# A pattern, and the layers of each stage as in VLLM_PP_LAYER_PARTITION.
CASES = [
    ("ME*-", (4,)),
    ("ME*-", (2, 2)),
    ("ME*-", (1, 2, 1)),
    ("M*M-EMEM", (4, 4)),
    ("M-M*M-M*", (4, 4)),  # the control: a model without experts
    (NANO, (26, 26)),
    (NANO, (6, 7, 6, 7, 7, 6, 7, 6)),
    (NANO, (1, 51)),
]
STAGES = [(*case, rank) for case in CASES for rank in range(len(case[1]))]


class _Layer(nn.Module):
    def __init__(self, **_):
        super().__init__()


class _MoELayer(nemotron_h.NemotronHMoEDecoderLayer):
    def __init__(self, **_):
        nn.Module.__init__(self)
        counts = {f"n_{name}_experts": 4 for name in EXPERTS}
        self.mixer = SimpleNamespace(experts=nn.Module(), **counts)


@pytest.mark.parametrize(("pattern", "split", "rank"), STAGES)
def test_stage_is_built_with_what_experts_it_has(pattern, split, rank, monkeypatch):
    group = SimpleNamespace(rank_in_group=rank, world_size=len(split))
    monkeypatch.setattr(parallel_state, "_PP", group)
    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", one)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
    kinds = dict.fromkeys("M*-", _Layer) | {"E": _MoELayer}
    monkeypatch.setattr(nemotron_h, "ALL_DECODER_LAYER_TYPES", kinds)
    config = SimpleNamespace(
        vocab_size=128,
        hidden_size=64,
        layer_norm_epsilon=1e-5,
        hybrid_override_pattern=pattern,
        n_group=1,
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
        model = nemotron_h.NemotronHForCausalLM(vllm_config=vllm_config)

    own = pattern[sum(split[:rank]) : sum(split[: rank + 1])]
    assert is_mixture_of_experts(model) == ("E" in own)
    if "E" in own:
        assert len(model.moe_layers) == model.num_moe_layers == own.count("E")
        assert model.num_logical_experts == 4
