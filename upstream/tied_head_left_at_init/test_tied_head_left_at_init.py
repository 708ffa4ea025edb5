# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""With ``tie_word_embeddings`` the head that a stage computes logits with is the
embedding of the checkpoint.

A tied checkpoint has no ``lm_head.weight``. A model class that builds a
``ParallelLMHead`` and does not tie it keeps whatever the memory held: no error,
random logits. The last of several pipeline stages has a head and no embedding, so
it has to load ``model.embed_tokens.weight`` all the same.

Real: the model classes, their ``__init__``, embedding, head, ``load_weights``.
Stubs, on the CPU: the process groups; decoder layers are left out (all of them are
``PPMissingLayer``), and so is what looks for experts in them.
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
from vllm.platforms import current_platform

VOCAB, HIDDEN = 128, 64
ARCHITECTURES = [
    "AfmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "LongcatFlashForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiniMaxM2ForCausalLM",
    "OlmoeForCausalLM",
    "Qwen3NextForCausalLM",
]
# Fields of the published configs that not every class of transformers has; Afmoe
# wants an MoE layer on every stage unless it has none.
OF_THE_HUB = {"n_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 99}
OF_THE_HUB |= {"layernorm_epsilon": 1e-5}

STAGES = [(rank, size) for size in (1, 2, 3) for rank in range(size)]
STAGE_IDS = [f"PP{size}-rank{rank}" for rank, size in STAGES]


@pytest.fixture
def build_stage(monkeypatch):
    """A stage of a model with its embedding, head and norm, and no decoder layer."""

    def no_layers(count, layer_fn, prefix):
        return 0, 0, torch.nn.ModuleList(utils.PPMissingLayer() for _ in range(count))

    def build(architecture, rank, size, tied):
        cls = ModelRegistry.models[architecture].load_model_cls()
        for base in cls.__mro__:
            if hasattr(module := sys.modules[base.__module__], "make_layers"):
                monkeypatch.setattr(module, "make_layers", no_layers)
        sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
        config_class = getattr(transformers, architecture).config_class
        config = config_class(tie_word_embeddings=tied, **(OF_THE_HUB | sizes))
        for name in ("set_moe_parameters", "extract_moe_parameters"):  # want a layer
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, lambda self, *args: None)
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

    one = SimpleNamespace(rank=0, rank_in_group=0, world_size=1)
    one.device_group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    for group in ("_TP", "_EP", "_DP", "_PCP"):
        monkeypatch.setattr(parallel_state, group, one)
    if not current_platform.device_type:  # a machine without any
        monkeypatch.setattr(current_platform, "device_type", "cpu", raising=False)
    # vLLM caches missing layers by id(model); a later model can have the same id.
    utils._model_to_pp_missing_layer_names.clear()
    return build


def _checkpoint(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(VOCAB, HIDDEN, generator=generator) for name in names}


def _load(model, checkpoint) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_weights((name, t.clone()) for name, t in checkpoint.items())


def _is_last(stage: tuple[int, int]) -> bool:
    return stage[0] == stage[1] - 1


@pytest.mark.parametrize("stage", STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_head_is_the_embedding(architecture, stage, build_stage):
    checkpoint = _checkpoint("model.embed_tokens.weight")
    model = build_stage(architecture, *stage, tied=True)

    _load(model, checkpoint)

    if _is_last(stage):
        expected = checkpoint["model.embed_tokens.weight"]
        assert torch.equal(model.lm_head.weight[:VOCAB], expected)
    if stage[0] == 0:
        ids = torch.arange(VOCAB)
        expected = checkpoint["model.embed_tokens.weight"]
        assert torch.equal(model.embed_input_ids(ids), expected)


@pytest.mark.parametrize("stage", STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untied_head_is_its_own(architecture, stage, build_stage):
    """The control: both tensors are in the file, and each goes to its place."""
    checkpoint = _checkpoint("model.embed_tokens.weight", "lm_head.weight")
    model = build_stage(architecture, *stage, tied=False)

    _load(model, checkpoint)

    if _is_last(stage):
        expected = checkpoint["lm_head.weight"]
        assert torch.equal(model.lm_head.weight[:VOCAB], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_copy_in_the_file_is_not_loaded(architecture, build_stage):
    """Some tuning frameworks store the head of a tied model, too (vLLM PR 6758)."""
    checkpoint = _checkpoint("model.embed_tokens.weight", "lm_head.weight")
    for stage in ((0, 1), (1, 2)):
        model = build_stage(architecture, *stage, tied=True)
        _load(model, checkpoint)
        expected = checkpoint["model.embed_tokens.weight"]
        assert torch.equal(model.lm_head.weight[:VOCAB], expected)
