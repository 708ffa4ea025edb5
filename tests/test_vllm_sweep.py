"""The sweep over architectures: it must find the bug that is known, and count nothing that PP=1 does not load."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from sweep.block_fp8 import block_fp8
from sweep.cases import NUMBER, Sweep
from sweep.releases import try_release
from sweep.run import sweep, tiny_checkpoint
from sweep.same_bytes import EQUAL, NOT_COMPARABLE, REFUSED, compare
from sweep.tiny_models import rename

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import quantize
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.releases import NOT_THERE, Known, record
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.errors import GlmppError
from glmpp.formats.tensor import TensorSpec
from glmpp.ledger import UNTIED

affected = pytest.mark.skipif(vllm_version() != "0.22.1", reason="pins what the last affected release does")


@pytest.mark.vllm
@affected
def test_it_finds_the_known_bug_in_block_fp8_only_and_the_load_format_cures_it():
    found = sweep(["GlmMoeDsaForCausalLM", "LlamaForCausalLM"], ("plain", "fp8"), progress=False)
    glm, glm_fp8, llama, llama_fp8 = found.cases
    for case in (glm, llama, llama_fp8):
        assert (case.why, case.verdicts, case.findings) == ("", {1: LOADS, 2: LOADS, 3: LOADS}, [])
    assert glm_fp8.verdicts == {1: LOADS, 2: DIES, 3: DIES}
    assert {finding.place for finding in glm_fp8.findings} == {"vllm/model_executor/models/deepseek_v2.py:774"}
    assert glm_fp8.findings[0].key == "layers.3.self_attn.indexer.wk_weights_proj.weight"
    assert all(finding.cured for finding in glm_fp8.findings)
    assert {part for case in found.cases for part in case.stand_ins} <= {"platform", "driver", "class inspection"}
    assert found.classes == {
        "vllm.model_executor.models.deepseek_v2.GlmMoeDsaForCausalLM",
        "vllm.model_executor.models.llama.LlamaForCausalLM",
    }


@pytest.mark.vllm
@affected
def test_tied_embeddings_are_a_case_of_their_own_and_a_stage_that_cannot_be_built_is_not_cured():
    (case,) = sweep(["Ernie4_5_MoeForCausalLM"], ("tied",), progress=False).cases
    assert case.verdicts == {1: LOADS, 2: CANNOT_BUILD, 3: CANNOT_BUILD}
    assert "'PPMissingLayer' object has no attribute 'weight'" in case.findings[0].message
    assert case.findings[0].place.startswith("vllm/model_executor/models/ernie45_moe.py:")
    assert not any(finding.cured for finding in case.findings)


@pytest.mark.vllm
@affected
def test_a_head_that_is_not_tied_counts_and_its_bytes_are_shown_at_every_size():
    """DeepSeek-V2 leaves its head at init where the config ties it: PP=1 loads, and is not complete."""
    found = sweep(["DeepseekV2ForCausalLM"], ("plain", "tied"), progress=False)
    plain, tied = found.cases
    assert (plain.verdicts, plain.left) == ({1: LOADS, 2: LOADS, 3: LOADS}, {})
    assert tied.verdicts == {1: INCOMPLETE, 2: INCOMPLETE, 3: INCOMPLETE} and tied.findings == []
    (row,) = found.incomplete().to_dict("records")
    assert (row["parameter"], row["kind"], row["tensor"]) == ("lm_head.weight", UNTIED, "model.embed_tokens.weight")
    assert row["in the file"] != row["in the model"] and row["in the model"]


@pytest.mark.vllm
@affected
def test_in_block_fp8_the_bytes_have_the_last_word():
    (case,) = sweep(["GraniteMoeForCausalLM"], ("fp8",), progress=False).cases
    assert case.verdicts[1] == INCOMPLETE
    assert {NUMBER.sub(".*.", name) for name in case.left} == {
        "model.layers.*.block_sparse_moe.experts.w13_weight_scale_inv",
        "model.layers.*.block_sparse_moe.experts.w2_weight_scale_inv",
    }


@pytest.mark.vllm
@affected
def test_with_real_bytes_the_load_format_agrees_with_stock_or_the_bytes_confirm_its_refusal():
    """A dense model, experts, a head that is not tied, scales that come to nothing, the known bug, and a foreign tie."""
    cases = [("LlamaForCausalLM", "plain"), ("Qwen3MoeForCausalLM", "fp8"), ("DeepseekV2ForCausalLM", "tied")]
    cases += [("GraniteMoeForCausalLM", "fp8"), ("GlmMoeDsaForCausalLM", "fp8"), ("Ernie4_5_MoeForCausalLM", "tied")]
    told = [(case.outcome, case.why) for case in compare(cases, progress=False).cases.values()]
    assert told[:5] == [(EQUAL, ""), (EQUAL, ""), (REFUSED, "1 untied"), (REFUSED, "12 lost"), (EQUAL, "")]
    assert told[5][0] == NOT_COMPARABLE and "cannot be built: AttributeError" in told[5][1]


@pytest.mark.vllm
@affected
def test_a_releases_share_of_the_record_is_made_from_tiny_checkpoints():
    """Gemma's head is its embedding or vLLM 0.22.1 does not build it: only tied it has a verdict."""
    cases = [
        ("GlmMoeDsaForCausalLM", "plain"),
        ("GlmMoeDsaForCausalLM", "fp8"),
        ("GemmaForCausalLM", "plain"),
        ("New", "plain"),
    ]
    found = try_release(cases, "h100", progress=False)
    assert found.versions["vllm"] == "0.22.1" and found.architectures == {
        "GemmaForCausalLM": Known(LOADS),
        "GlmMoeDsaForCausalLM": record().releases["0.22.1"].architectures["GlmMoeDsaForCausalLM"],
        "New": Known(NOT_THERE),
    }


@pytest.mark.vllm
def test_what_does_not_count_says_why(tmp_path):
    found = sweep(["BertForSequenceClassification", "AquilaModel"], ("plain",), progress=False)
    assert [case.counts for case in found.cases] == [False, False]
    assert found.cases[0].why == "does not declare pipeline support"
    assert found.cases[1].why == "transformers has no class of this name"
    assert found.uncounted().sum() == 2
    found.save(tmp_path / "sweep.json")
    again = Sweep.load(tmp_path / "sweep.json")
    assert again.cases == found.cases and again.recorded.startswith("on 20") and found.recorded is None


@pytest.mark.vllm
def test_a_tiny_checkpoint_has_the_names_of_the_hub(tmp_path):
    """google/gemma-3-4b-it: transformers 5 saves vision_tower.embeddings, which vLLM does not know."""
    names = {name for name in tiny_checkpoint("Gemma3ForConditionalGeneration", "plain", tmp_path / "model", "h100")}
    towers = {name for name in names if name.startswith("vision_tower.")}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in towers
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)


@pytest.mark.vllm
def test_where_the_hub_ties_every_head_the_plain_variant_has_none_either(tmp_path):
    gemma = tiny_checkpoint("Gemma2ForCausalLM", "plain", tmp_path / "gemma", "h100")
    llama = tiny_checkpoint("LlamaForCausalLM", "plain", tmp_path / "llama", "h100")
    assert gemma.config["tie_word_embeddings"] and "lm_head.weight" not in gemma
    assert not llama.config["tie_word_embeddings"] and "lm_head.weight" in llama


@pytest.mark.vllm
def test_a_model_without_a_head_is_a_folder_of_sentence_transformers(tmp_path):
    assert "layers.0.mlp.up_proj.weight" in tiny_checkpoint("LlamaModel", "plain", tmp_path / "llama", "h100")
    tiny_checkpoint("GPT2LMHeadModel", "plain", tmp_path / "gpt2", "h100")
    assert (tmp_path / "llama" / "modules.json").exists() and (tmp_path / "llama" / "1_Pooling" / "config.json").exists()
    assert not (tmp_path / "gpt2" / "modules.json").exists()


def test_tensors_that_the_hub_does_not_have_are_left_out_and_its_layout_is_restored(tmp_path):
    experts, shard = "model.layers.0.mlp.experts", tmp_path / "model.safetensors"
    save_file({f"{experts}.{number}.up_proj.weight": torch.ones(2, 3) for number in (3, 4, 12)}, shard)
    rename(shard, "longcat_flash")
    assert set(load_file(shard)) == {f"{experts}.3.up_proj.weight"}
    down, head = torch.rand(4, 2, 3), torch.rand(2, 3)
    save_file({f"{experts}.down_proj": down, "lm_head.weight": head}, shard)
    rename(shard, "qwen3_vl_moe")
    on_hub = load_file(shard)
    assert on_hub[f"{experts}.down_proj"].equal(down.transpose(1, 2)) and on_hub["lm_head.weight"].equal(head)


@pytest.mark.vllm
def test_an_architecture_that_vllm_does_not_have_is_an_error():
    with pytest.raises(GlmppError, match="has no architecture 'NobodysForCausalLM'"):
        sweep(["NobodysForCausalLM"])


@pytest.mark.parametrize("shape", [(256, 256), (64, 256), (576, 200)])
def test_block_fp8_has_the_names_and_grids_that_quantize_gives(shape):
    at = "model.layers.0"
    names = [f"{at}.self_attn.kv_a_proj_with_mqa.weight", f"{at}.mlp.experts.1.up_proj.weight"]
    kept = ["model.embed_tokens.weight", f"{at}.mlp.gate.weight", f"{at}.self_attn.indexer.weights_proj.weight"]
    kept += ["visual.layers.0.q_proj.weight", f"{at}.mamba.dt_proj.weight", "lm_head.weight"]
    specs = [TensorSpec(name, "BF16", shape) for name in names + kept]
    specs.append(TensorSpec(f"{at}.self_attn.q_proj.bias", "BF16", (64,)))
    variant = block_fp8(Checkpoint(specs, {"model_type": "x"}))
    codes, scale = quantize(torch.zeros(shape))
    for name in names:
        assert (variant[name].torch_dtype, variant[name].shape) == (codes.dtype, tuple(codes.shape))
        assert (variant[f"{name}_scale_inv"].torch_dtype, variant[f"{name}_scale_inv"].shape) == (
            scale.dtype,
            tuple(scale.shape),
        )
    assert len(variant) == len(specs) + len(names)
    quantization = variant.config["quantization_config"]
    assert {name.removesuffix(".weight") for name in kept} < set(quantization["modules_to_not_convert"])
    assert not {name.removesuffix(".weight") for name in names} & set(quantization["modules_to_not_convert"])


def test_block_fp8_of_nothing_is_an_error():
    with pytest.raises(GlmppError, match="nothing to quantise"):
        block_fp8(Checkpoint([TensorSpec("lm_head.weight", "BF16", (8, 8))], {}))


@pytest.mark.vllm
@affected
def test_what_stands_in_on_a_cpu_is_listed_by_case():
    (case,) = sweep(["GlmMoeDsaForCausalLM"], ("fp8",), gpu="cpu", progress=False).cases
    assert "FP8 linear kernel" in case.stand_ins and case.verdicts == {1: LOADS, 2: DIES, 3: DIES}


@pytest.mark.parametrize(("gpu", "classes"), [("cpu", 100), ("h100", 100)])
def test_the_recorded_sweep_of_the_newest_release_has_an_answer_for_every_finding(gpu, classes):
    (path,) = (ROOT / "data" / "recorded").glob(f"sweep-*-{gpu}.json")
    recorded = Sweep.load(path)
    assert recorded.versions["vllm"] in path.name and recorded.gpu == gpu and len(recorded.classes) >= classes
    assert {case.variant for case in recorded.counted} == {"plain", "tied", "fp8"}
    for case in recorded.counted:
        assert case.verdicts[1] == (INCOMPLETE if case.left else LOADS) and case.model_class.startswith("vllm.")
        for finding in case.findings:
            assert re.fullmatch(r"vllm/[\w/]+\.py:\d+", finding.place) or finding.left_at_init
            assert finding.with_load_format != "cannot tell"
