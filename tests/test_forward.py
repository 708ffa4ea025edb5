"""Stages, loaded one by one and run one after another, compute what the unsplit model does."""

from __future__ import annotations

import pytest
import torch

from glmpp import GlmppError
from glmpp.loader import load_stage
from glmpp.partition import make_stages

transformers = pytest.importorskip("transformers", minversion="5.6")

from glmpp.lab.forward import run_stages, stage_model, unsplit_model  # noqa: E402


@pytest.fixture(scope="module")
def tokens(tiny):
    return torch.randint(0, tiny.config["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(tiny, tokens):
    return run_stages([unsplit_model(tiny, index_topk=8)], tokens)


def staged(checkpoint, stages, tokens, change=lambda name, tensor: tensor, **overrides):
    models = []
    for stage in stages:
        weights = ((name, change(name, tensor)) for name, tensor in checkpoint.read())
        models.append(stage_model(checkpoint.config, stage, load_stage(checkpoint, stage, weights=weights)[0], **overrides))
    return run_stages(models, tokens)


@pytest.mark.parametrize("counts", [[12], [6, 6], [3, 3, 3, 3], [1, 9, 2], [1] * 12], ids=str)
def test_logits_of_the_stages_are_those_of_the_unsplit_model_bit_for_bit(tiny, tokens, whole, counts):
    stages = make_stages(tiny.config, len(counts), counts)
    assert torch.equal(staged(tiny, stages, tokens, index_topk=8), whole)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.self_attn.indexer.wk.weight_scale_inv",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.5.mlp.experts.3.down_proj.weight_scale_inv",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "model.layers.11.mlp.gate.e_score_correction_bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_any_other_value_of_any_tensor_shows_in_the_logits(tiny, tokens, whole, name):
    def reversed_rows(which, tensor):
        if which != name:
            return tensor
        turned = tensor.view(torch.uint8).flip(0) if tensor.dtype == torch.float8_e4m3fn else tensor.flip(0)
        return turned.view(tensor.dtype) if len(tensor) > 1 else tensor.flip(-1)  # k_norm hides a common factor

    assert not torch.equal(staged(tiny, make_stages(tiny.config, 2), tokens, reversed_rows, index_topk=8), whole)


def test_the_indexer_takes_part_only_if_it_has_something_to_leave_out(tiny, tokens, whole):
    assert not torch.equal(staged(tiny, make_stages(tiny.config, 2), tokens, index_topk=40), whole)


def test_a_parameter_that_was_not_loaded_is_named(tiny):
    stage = make_stages(tiny.config, 4)[2]
    params = load_stage(tiny, stage)[0]
    del params["model.layers.7.self_attn.o_proj.weight"]
    with pytest.raises(GlmppError, match=r"stage 2 of 4.*model\.layers\.7\.self_attn\.o_proj\.weight"):
        stage_model(tiny.config, stage, params)
