# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model with ``tie_word_embeddings`` can be built and loaded on every stage.

Only the first pipeline stage has the embedding and only the last one the head. These
classes tie one to the other all the same: ``AttributeError: 'PPMissingLayer' object
has no attribute 'weight'``, or ``'tie_weights'``. The last stage has to load its head
from ``model.embed_tokens.weight``, the only one there is.

Real: the model classes, their ``__init__``, embedding, head, ``load_weights``. Stubs,
on the CPU: the process groups; decoder layers are left out (all of them are
``PPMissingLayer``).
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.models import utils
from vllm.model_executor.models.registry import ModelRegistry

VOCAB, HIDDEN = 128, 64
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STAGES = [(rank, size) for size in (1, 2, 3) for rank in range(size)]
STAGE_IDS = [f"PP{size}-rank{rank}" for rank, size in STAGES]
ARCHITECTURES = ["Ernie4_5_MoeForCausalLM", "FalconH1ForCausalLM"]


@pytest.fixture
def build_stage(monkeypatch):
    """A stage with its embedding, head and norm, and no decoder layer."""

    def no_layers(count, layer_fn, prefix):
        return 0, 0, torch.nn.ModuleList(utils.PPMissingLayer() for _ in range(count))

    def build(architecture, rank, size, tied):
        cls = ModelRegistry.models[architecture].load_model_cls()
        monkeypatch.setattr(sys.modules[cls.__module__], "make_layers", no_layers)
        sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
        config_class = getattr(transformers, architecture).config_class
        config = config_class(tie_word_embeddings=tied, **sizes)
        stage = {"is_first_rank": rank == 0, "is_last_rank": rank == size - 1}
        pp = SimpleNamespace(rank_in_group=rank, world_size=size, **stage)
        monkeypatch.setattr(parallel_state, "_PP", pp)
        vllm_config = VllmConfig(device_config=DeviceConfig("cpu"))
        vllm_config.cache_config = CacheConfig()
        vllm_config.model_config = SimpleNamespace(
            hf_config=config,
            hf_text_config=config,
            dtype=torch.float32,
            head_dtype=torch.float32,
        )
        with set_current_vllm_config(vllm_config), torch.device("cpu"):
            return cls(vllm_config=vllm_config)

    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", one)
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    return build


def _load(model, *names: str) -> dict[str, torch.Tensor]:
    """Load tensors of these names, and return what they hold."""
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(VOCAB, HIDDEN, generator=generator) for n in names}
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    return tensors


@pytest.mark.parametrize("names", [(EMBEDDING,), (EMBEDDING, HEAD)])
@pytest.mark.parametrize(("rank", "size"), STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_stage_has_the_embedding(architecture, rank, size, names, build_stage):
    """Some tuning frameworks store the head of a tied model, too (vLLM PR 6758)."""
    model = build_stage(architecture, rank, size, tied=True)

    tensors = _load(model, *names)

    if rank == 0:
        embedded = model.embed_input_ids(torch.arange(VOCAB))
        assert torch.equal(embedded, tensors[EMBEDDING])
    if rank == size - 1:
        assert torch.equal(model.lm_head.weight[:VOCAB], tensors[EMBEDDING])


@pytest.mark.parametrize(("rank", "size"), STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untied_stage_has_its_own_head(architecture, rank, size, build_stage):
    """The control: both tensors are in the file, and each goes to its place."""
    model = build_stage(architecture, rank, size, tied=False)

    tensors = _load(model, EMBEDDING, HEAD)

    if rank == size - 1:
        assert torch.equal(model.lm_head.weight[:VOCAB], tensors[HEAD])
