"""Layers to stages, against the installed vLLM's own `get_pp_indices` and placeholders."""

from __future__ import annotations

import pytest
import torch

from glmpp.checkpoint import Checkpoint
from glmpp.cli.report_json import as_json
from glmpp.cli.report_text import as_text
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_pp_indices
from glmpp.dryrun.stage_report import LOADS
from glmpp.errors import GlmppError
from glmpp.ledger import LOADED
from glmpp.partition import make_stages, partition_layers

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_equals_get_pp_indices_for_every_layer_count_to_128_and_stage_count_to_32():
    cases = [(num_layers, pp_size) for num_layers in range(1, 129) for pp_size in range(1, 33)]
    for (num_layers, pp_size), indices in zip(cases, vllm_pp_indices(cases), strict=True):
        ours = partition_layers(num_layers, pp_size)
        assert [(layers.start, layers.stop) for layers in ours] == indices, (num_layers, pp_size)


def test_equals_get_pp_indices_under_vllm_pp_layer_partition(monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")  # of the one who asks: no part of the question
    split = "3,0, 5 ,4"
    assert [(layers.start, layers.stop) for layers in partition_layers(12, 4, split)] == vllm_pp_indices([(12, 4)], split)[0]
    assert [(layers.start, layers.stop) for layers in partition_layers(12, 4)] == vllm_pp_indices([(12, 4)])[0]


@pytest.mark.parametrize("value", ["6,6", "4,4,5", "4,four,4", "6,,6", ""])
def test_what_get_pp_indices_refuses_we_refuse(value):
    with pytest.raises(GlmppError, match="VLLM_PP_LAYER_PARTITION"):
        partition_layers(12, 3, value)
    with pytest.raises(GlmppError, match="ValueError"):
        vllm_pp_indices([(12, 3)], value)


def test_vllm_takes_a_stage_without_layers(tiny):
    """So does the kit: its table, its text and its JSON."""
    report = dry_run(tiny, Deployment(pp=3, layer_counts=[6, 0, 6], guard="loader"), control=False, progress=False)
    assert [stage.stage.span for stage in report.stages] == ["0-5", "none", "6-11"]
    assert report.table().layers.tolist() == ["0-5", "none", "6-11"]
    assert [stage["layers"] for stage in as_json(tiny, report, None)["stages"]] == [[0, 5], [], [6, 11]]
    assert "PP=3: loads, complete" in as_text(tiny, report, True)


@pytest.mark.parametrize("counts", [None, [1, 4, 2, 5]])
def test_missing_prefixes_are_vllms_placeholders(tiny, counts):
    report = dry_run(tiny, Deployment(pp=4, layer_counts=counts), control=False, progress=False)
    for one, stage in zip(report.stages, make_stages(tiny.config, 4, counts), strict=True):
        assert one.missing_prefixes == stage.missing_prefixes()


def test_the_last_stage_of_a_tied_model_owns_the_embedding(tmp_path):
    """vLLM's Llama, with and without `tie_word_embeddings`, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        folder = tmp_path / f"tied-{tied}"
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            **shape, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"]
        )
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        checkpoint = Checkpoint.from_directory(folder)
        assert ("lm_head.weight" in checkpoint) != tied
        report = dry_run(checkpoint, 3, progress=False)
        assert [one.verdict for one in [*report.stages, report.control]] == [LOADS] * 4
        for one, stage in zip(report.stages, make_stages(checkpoint.config, 3), strict=True):
            assert sorted(one.missing_prefixes) == sorted(stage.missing_prefixes())
            one.ledger.check(checkpoint, stage)
        embedding = [one.ledger.tensors["model.embed_tokens.weight"] == LOADED for one in report.stages]
        assert embedding == ([True, False, True] if tied else [True, False, False])
