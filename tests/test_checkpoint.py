"""What a checkpoint holds, from its config and from its files; and what a bad folder is told."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmpp.synthetic
from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize
from glmpp.errors import GlmppError
from glmpp.formats.config import layer_count
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.index import INDEX_FILE
from glmpp.partition import make_stages
from glmpp.synthetic import synthetic_original, write_checkpoint


def test_glm_5_1_fp8_has_the_published_size(full):
    assert len(full) == pytest.approx(119_000, rel=1e-3)
    assert full.num_parameters == pytest.approx(753.9e9, rel=1e-3)
    assert full.nbytes == pytest.approx(756e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.indexer.wk.weight", "F8_E4M3", (128, 6144)),
        ("model.layers.0.self_attn.indexer.wk.weight_scale_inv", "F32", (1, 48)),
        ("model.layers.77.self_attn.indexer.weights_proj.weight", "BF16", (32, 6144)),
        ("model.layers.5.self_attn.kv_a_proj_with_mqa.weight", "F8_E4M3", (576, 6144)),
        ("model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", (5, 48)),
        ("model.layers.2.mlp.down_proj.weight", "F8_E4M3", (6144, 12288)),
        ("model.layers.3.mlp.experts.255.up_proj.weight", "F8_E4M3", (2048, 6144)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "F32", (256,)),
        ("model.layers.78.eh_proj.weight", "BF16", (6144, 12288)),
        ("lm_head.weight", "BF16", (154880, 6144)),
    ],
)
def test_tensors_of_glm_5_1_fp8(full, name, dtype, shape):
    """The facts of the published file metadata."""
    assert (full[name].dtype, full[name].shape) == (dtype, shape)


def test_the_mtp_layer_has_no_lm_head_of_its_own(full):
    mtp = [name for name in full if name.startswith("model.layers.78.")]
    assert len(mtp) == 1569
    assert not any("shared_head.head" in name or "embed_tokens" in name for name in mtp)


def test_glm_5_2_has_the_published_names_and_bytes(config_52):
    """118,629 names; `total_size` of the indices of GLM-5.2-FP8, and of GLM-5.3, which is the same in BF16."""
    fp8 = Checkpoint.from_config(config_52)
    assert (len(fp8), fp8.nbytes) == (118_629, 755_617_140_416)
    bf16 = {key: value for key, value in config_52.items() if key != "quantization_config"}
    assert Checkpoint.from_config(bf16).nbytes == 1_506_659_919_872
    having = {int(name.split(".")[2]) for name in fp8 if ".indexer." in name}
    assert having == {0, 1, *range(2, 78, 4), 78}  # 57 of 78 have none, the MTP layer does
    assert len([name for name in fp8 if name.startswith("model.layers.78.")]) == 1569


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def test_which_layers_have_an_indexer_is_said_in_four_ways(config_52, config):
    expected = Checkpoint.from_config(config_52).keys()
    kinds = config_52["indexer_types"]
    rest = without(config_52, "indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")
    letters = "".join("F" if kind == "full" else "S" for kind in kinds)
    for said in (
        {"indexer_types": [*kinds, "full"]},  # the MTP layer's, too
        {"indexer_types": kinds, "index_topk_freq": 1},  # the list decides
        {"index_topk_pattern": letters, "index_topk_freq": 1},
        {"index_topk_pattern": kinds},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
    ):
        assert Checkpoint.from_config({**rest, **said}).keys() == expected
    assert Checkpoint.from_config(rest).keys() == Checkpoint.from_config(config).keys()
    tiny = Checkpoint.from_config(reduced_config({**rest, "index_topk_pattern": letters}))
    assert {int(name.split(".")[2]) for name in tiny if ".indexer." in name} == {0, 1, 2, 6, 10, 12}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"swiglu_limit": 10.0, "hc_mult": 4}, r"does not know 'swiglu_limit', 'hc_mult', .*give the folder .* or the Hub"),
        ({"use_index_cache": True}, "does not know 'use_index_cache'"),
        ({"num_experts": 8}, "does not know 'num_experts'"),
        ({"indexer_types": ["full"] * 77}, "indexer_types has 77 entries, expected one for each of 78 layers"),
        ({"indexer_types": ["shared"] * 78}, "the first layer has no indexer of its own"),
        ({"indexer_types": ["full"] * 78 + ["shared"]}, "or an MTP layer has none"),
        ({"mlp_layer_types": ["sparse"] * 78}, "mlp_layer_types is not what first_k_dense_replace says, 3 dense"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantization_config: quant_method is 'modelopt'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: weight_block_size is missing"),
    ],
    ids=str,
)
def test_what_may_decide_about_tensors_and_is_not_known_is_an_error(config, change, said):
    with pytest.raises(GlmppError, match=said):
        Checkpoint.from_config({**config, **change})


def test_unknown_fields_that_ask_for_nothing_or_are_transformers_own_change_nothing(config, full):
    nothing = {"swiglu_limit": None, "use_index_cache": False, "mtp_extra": [], "num_local_experts": 256}
    generic = {"_name_or_path": "x", "temperature": 0.7, "id2label": {"0": "A"}, "bos_token_id": 1, "auto_map": {"a": "b"}}
    published = {"moe_router_dtype": "float32", "head_dim": 192, "layer_types": ["indexed_attention"] * 78}
    assert Checkpoint.from_config({**config, **nothing, **generic, **published}).keys() == full.keys()


@pytest.mark.vllm  # transformers comes with the vllm extra
@pytest.mark.parametrize("name", ["config", "config_52"])
def test_all_names_and_shapes_are_those_of_transformers_class_and_its_config_is_taken(name, request):
    """Full size, on meta. transformers has the experts of a layer as one tensor each for two of theirs."""
    transformers = pytest.importorskip("transformers", minversion="5.6")
    config = request.getfixturevalue(name)
    bf16 = without(config, "quantization_config")
    theirs = transformers.GlmMoeDsaConfig(**without(bf16, "architectures", "model_type"))
    if name == "config_52" and not hasattr(theirs, "indexer_types"):
        pytest.skip("this transformers does not know GLM-5.2")
    with torch.device("meta"):
        model = transformers.GlmMoeDsaForCausalLM(theirs)
    held = {name: tuple(value.shape) for name, value in model.state_dict().items() if ".mlp.experts." not in name}
    ours = {name: spec.shape for name, spec in Checkpoint.from_config(bf16).items()}
    main = {name: shape for name, shape in ours.items() if not name.startswith("model.layers.78.")}
    assert held == {name: shape for name, shape in main.items() if ".mlp.experts." not in name}
    saved = json.loads(theirs.to_json_string(use_diff=False))
    assert Checkpoint.from_config({**saved, "num_nextn_predict_layers": 1}).keys() == ours.keys()


@pytest.mark.vllm  # transformers comes with the vllm extra
@pytest.mark.parametrize("name", ["config", "config_52"])
def test_names_and_shapes_equal_what_transformers_saves(name, request, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.6")
    config = request.getfixturevalue(name)
    bf16 = {key: value for key, value in reduced_config(config).items() if key != "quantization_config"}
    fields = {key: value for key, value in bf16.items() if key not in ("architectures", "model_type")}
    model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**fields))
    model.save_pretrained(tmp_path)
    saved = {name: spec.shape for name, spec in Checkpoint.from_directory(tmp_path).items()}
    ours = {name: spec.shape for name, spec in Checkpoint.from_config(bf16).items()}
    assert saved == {name: shape for name, shape in ours.items() if not name.startswith("model.layers.12.")}
    fp8 = Checkpoint.from_config(reduced_config(config))
    assert {name: spec.shape for name, spec in fp8.items() if not spec.is_scale} == ours


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"model_type": None}])
def test_from_config_of_another_model_is_an_error(tiny_config, change):
    with pytest.raises(GlmppError, match="glm_moe_dsa"):
        Checkpoint.from_config({**tiny_config, **change})


def test_from_config_names_the_missing_field(tiny_config):
    del (broken := dict(tiny_config))["kv_lora_rank"]
    with pytest.raises(GlmppError, match="kv_lora_rank"):
        Checkpoint.from_config(broken)


def test_from_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(GlmppError, match=r"config\.json: not readable as JSON"):
        Checkpoint.from_config(tmp_path)


# --- how many layers ---


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 5}, 5),
        ({"n_layer": 5}, 5),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "mlp"]}, 4),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-ME"}, 7),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-ME", "num_hidden_layers": 7}, 7),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-ME", "num_hidden_layers": 52}, 7),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba"] * 3, "hybrid_override_pattern": "M-"}, 3),
        ({"model_type": "nemotron_h", "num_hidden_layers": 6}, 6),
        ({"layer_types": ["full_attention"] * 4}, 4),
        ({"layer_types": ["full_attention"] * 4, "num_hidden_layers": 3}, 3),  # a list may go on with the MTP layers
        ({"block_configs": [{}, {}]}, 2),
        ({"model_type": "longcat_flash", "num_layers": 28, "num_hidden_layers": 56}, 28),
        ({"model_type": "omni", "text_config": {"model_type": "nemotron_h", "layers_block_type": ["mlp"]}}, 1),
        ({"num_hidden_layers": None, "model_type": ["x"], "layer_types": ["mlp"]}, 1),
    ],
    ids=str,
)
def test_layers_are_counted_by_number_or_by_list(config, layers):
    assert layer_count(config) == layers
    assert [stage.layers for stage in make_stages(config, 1)] == [range(layers)]


@pytest.mark.parametrize("config", [{}, {"layers_block_type": []}, {"layer_types": 3}, {"num_hidden_layers": "3"}], ids=str)
def test_a_config_that_does_not_say_how_many_layers_is_an_error(config):
    with pytest.raises(GlmppError, match=r"says none of num_hidden_layers, .*layers_block_type.*cannot be dealt out"):
        layer_count(config)


@pytest.mark.vllm  # transformers comes with the vllm extra
def test_layers_of_every_language_model_are_those_that_transformers_counts():
    transformers = pytest.importorskip("transformers", minversion="5.6")
    from transformers.models.auto import modeling_auto

    kinds = {
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    seen, wrong = 0, {}
    for kind in sorted(kinds):
        try:
            config = transformers.CONFIG_MAPPING[kind]()
        except Exception:  # not every class has defaults that it accepts
            continue
        expected = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        stored = config.to_json_string(use_diff=False)
        # Encoder-decoders count those of the decoder, under other names; vLLM does not split them into stages.
        if not isinstance(expected, int) or re.search('"(num_)?decoder_layers"|"model_type": "kosmos', stored):
            continue
        seen += 1
        if (found := layer_count(json.loads(stored))) != expected // (2 if kind == "longcat_flash" else 1):
            wrong[kind] = found, expected
    assert seen > 150 and wrong == {}


# --- synthetic checkpoints ---


def test_written_checkpoint_holds_what_its_config_promises(tiny):
    promised = Checkpoint.from_config(tiny.config)
    assert {n: (s.dtype, s.shape) for n, s in tiny.items()} == {n: (s.dtype, s.shape) for n, s in promised.items()}
    assert len({spec.file for spec in tiny.values()}) > 1
    index = json.loads((tiny.directory / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == tiny.nbytes


def test_written_weights_are_quantised_originals(tiny):
    name = "model.layers.7.self_attn.indexer.wk.weight"
    stored = dict(tiny.read([name, f"{name}_scale_inv"]))
    original = synthetic_original(tiny[name])
    codes, scale = quantize(original)
    assert torch.equal(stored[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(stored[f"{name}_scale_inv"], scale)
    restored = dequantize(stored[name], stored[f"{name}_scale_inv"])
    assert (restored.float() - original).norm() < 0.04 * original.norm()


def test_same_seed_same_bytes(tiny, tmp_path):
    again = write_checkpoint(tiny.config, tmp_path / "again")
    other = write_checkpoint(tiny.config, tmp_path / "other", seed=1)
    for file in {spec.file for spec in tiny.values()}:
        assert (again.directory / file).read_bytes() == (tiny.directory / file).read_bytes()
    name = "model.embed_tokens.weight"
    assert not torch.equal(dict(other.read([name]))[name], dict(tiny.read([name]))[name])


def test_read_yields_every_tensor_once_in_checkpoint_order(tiny):
    assert [name for name, _ in tiny.read()] == list(tiny)


def test_a_failed_write_leaves_nothing(tiny_config, tmp_path, monkeypatch):
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(glmpp.synthetic, "save_file", full_disk)
    with pytest.raises(GlmppError, match="nothing is left of it: No space left"):
        write_checkpoint(tiny_config, tmp_path / "half")
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_the_folder_appears_only_when_it_is_complete(tiny_config, tmp_path, monkeypatch):
    seen = []

    def watch(tensors, path, metadata):
        seen.append((tmp_path / "new").exists())
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(glmpp.synthetic, "save_file", watch)
    write_checkpoint(tiny_config, tmp_path / "new")
    assert seen and not any(seen) and (tmp_path / "new" / INDEX_FILE).exists()


def test_an_existing_folder_is_not_overwritten_unasked(tiny_config, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(GlmppError, match="exists already"):
        write_checkpoint(tiny_config, tmp_path / "mine")
    assert len(write_checkpoint(tiny_config, tmp_path / "mine", overwrite=True)) == 618


# --- folders that are not in order ---


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A checkpoint folder to break, its first shard, and a tensor in that shard."""
    directory = write_checkpoint(tiny_config, tmp_path / "model").directory
    shard = sorted(directory.glob("*.safetensors"))[1]
    return directory, shard, sorted(load_file(shard))[0]


def test_a_missing_shard_is_named_with_a_tensor_it_should_hold(folder):
    directory, shard, tensor = folder
    shard.unlink()
    with pytest.raises(GlmppError) as error:
        Checkpoint.from_directory(directory)
    assert shard.name in str(error.value) and tensor in str(error.value) and "missing" in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(folder, keep):
    directory, shard, _ = folder
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(GlmppError, match=shard.name):
        Checkpoint.from_directory(directory)


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(folder):
    directory, shard, tensor = folder
    tensors = load_file(shard)
    del tensors[tensor]
    save_file(tensors, shard)
    (said,) = Checkpoint.from_directory(directory).notes
    assert shard.name in said and tensor in said and "which does not hold it" in said


def test_a_tensor_that_the_index_does_not_name(folder):
    directory, shard, _ = folder
    save_file({**load_file(shard), "stray": torch.zeros(1)}, shard)
    checkpoint = Checkpoint.from_directory(directory)
    assert "stray" in checkpoint and "holds 'stray' (1 such)" in checkpoint.notes[0]


def test_a_folder_without_weights(folder):
    directory, *_ = folder
    for file in [*directory.glob("*.safetensors"), directory / INDEX_FILE]:
        file.unlink()
    with pytest.raises(GlmppError, match=r"vLLM finds no weights here \(it opens \*\.safetensors, \*\.bin, \*\.pt"):
        Checkpoint.from_directory(directory)


def test_an_index_without_a_weight_map(folder):
    directory, *_ = folder
    (directory / INDEX_FILE).write_text("{}")
    with pytest.raises(GlmppError, match="weight_map"):
        Checkpoint.from_directory(directory)


def test_a_shard_that_is_broken_after_the_headers_were_read(folder):
    directory, shard, _ = folder
    checkpoint = Checkpoint.from_directory(directory)
    shard.write_bytes(b"")
    with pytest.raises(GlmppError, match=shard.name):
        list(checkpoint.read())
