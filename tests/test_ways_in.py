"""Every way in has a type and a budget: configs, files, options. What is refused is named; what is valid passes."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.cli.model import open_checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import chosen_ranks, dry_run
from glmpp.errors import GlmppError, positive, short, whole
from glmpp.formats.files import MAX_CONFIG_BYTES, MAX_JSON_BYTES, parse_json
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.glm5_config import FIELDS, QUANTIZATION
from glmpp.formats.header import read_header
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.shard import read_shard
from glmpp.formats.tensor import TensorSpec
from glmpp.formats.weights import weight_files
from glmpp.layouts.search import layouts
from glmpp.layouts.split import balance
from glmpp.partition import MAX_GPUS, make_stages, parse_counts, partition_layers, stage_sizes
from glmpp.synthetic import write_checkpoint

CONFIG = ROOT / "data" / "glm-5.1-fp8" / "config.json"
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def nobody_waits():
    """A test that waits for a FIFO fails."""

    def enough(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, enough)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny.directory, tmp_path / "model")


def with_config(folder: Path, change: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


# --- a bare config ------------------------------------------------------------------------------------------------

SIZES = [name for name, (expected, _) in FIELDS.items() if expected.startswith("a whole number")]
WRONG = {
    **{name: [[1], "6144", NAN, INF, -5, 6144.5, 6144.0, True, 10**9 * 2, 10**300, {}] for name in SIZES},
    **{name: ["float13", 5, ["bfloat16"], NAN, {}] for name in ("dtype", "torch_dtype")},
    "architectures": ["GlmMoeDsaForCausalLM", [1], 5, {}],
    "tie_word_embeddings": ["no", 5, [True], NAN],
    "quantization_config": [[1], "fp8", 5, True],
    "indexer_types": ["full", [], ["full", "half"], [1], 5],
    "index_topk_pattern": ["FSX", ["F"], "", 5],
    "mlp_layer_types": ["sparse", ["dense", 1], 5],
    "layer_types": [["linear_attention"] * 78, 5],
    "topk_method": ["greedy", 5],
    **{name: [True, 1] for name in ("attention_bias", "mlp_bias")},
}
WRONG_WITHIN = {
    "quant_method": ["compressed-tensors", 5],
    "activation_scheme": ["static", 5],
    "fmt": ["e5m2", 5],
    "weight_block_size": [[0, 0], [128], 128, "128", ["a", "b"], [128, -1], [128.0, 128], [True, True], [10**9, 128]],
    "modules_to_not_convert": ["lm_head", [1], {"lm_head": 1}, 5],
}


@pytest.mark.parametrize("name", [*FIELDS, *QUANTIZATION])
def test_a_field_of_a_bare_config_has_a_type_and_a_range(config, name, tmp_path):
    path = tmp_path / "config.json"
    within = name in QUANTIZATION
    for wrong in (WRONG_WITHIN if within else WRONG)[name]:
        change = {"quantization_config": {**config["quantization_config"], name: wrong}} if within else {name: wrong}
        path.write_text(json.dumps({**config, **change}))
        for read in (Checkpoint.from_config, reduced_config):
            with pytest.raises(GlmppError) as error:
                read(path)
            said = str(error.value)
            assert str(path) in said and f"{name} is {short(json.loads(json.dumps(wrong)))}, expected " in said, wrong


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("rms_norm_eps", {"rms_norm_eps": "HERE"}),
        ("rope_parameters.rope_theta", {"rope_parameters": {"rope_theta": "HERE"}}),
        ("unknown.0.a", {"unknown": [{"a": "HERE"}]}),
    ],
)
def test_nothing_in_a_bare_config_is_nan_or_infinite(config, where, more, tmp_path):
    for number in ("NaN", "-Infinity", "1e999"):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}).replace('"HERE"', number))
        with pytest.raises(GlmppError, match=rf"config\.json: {where} is -?(nan|inf), expected a finite number"):
            Checkpoint.from_config(tmp_path)


def test_what_a_bare_config_may_leave_out_or_say_as_null(config):
    whole_list = Checkpoint.from_config(config)
    for change in ({"tie_word_embeddings": None}, {"dtype": None}, {"dtype": None, "torch_dtype": "bfloat16"}):
        assert list(Checkpoint.from_config({**config, **change}).values()) == list(whole_list.values())
    for name in ("architectures", "num_key_value_heads", "max_position_embeddings"):
        Checkpoint.from_config({key: value for key, value in config.items() if key != name})
    without = Checkpoint.from_config({**config, "num_nextn_predict_layers": None, "quantization_config": None})
    assert not any(name.startswith("model.layers.78.") or spec.is_scale for name, spec in without.items())
    for quantization in (None, {**config["quantization_config"], "modules_to_not_convert": None}):
        Checkpoint.from_config(reduced_config({**config, "quantization_config": quantization}))


def test_a_bare_config_has_a_budget_of_experts_in_all(config):
    with pytest.raises(GlmppError, match="times n_routed_experts is 2,052,096, expected at most 200,000"):
        Checkpoint.from_config({**config, "num_hidden_layers": 500, "n_routed_experts": 4096})


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_a_name_that_is_read_has_one_value(config, folder, tmp_path):
    raw = json.dumps(config)
    twice = tmp_path / "twice.json"
    twice.write_text(raw[:-1] + ', "hidden_size": 6144}')
    Checkpoint.from_config(twice)
    twice.write_text(raw[:-1] + ', "hidden_size": 7}')
    with pytest.raises(GlmppError, match=r"twice\.json: .*hidden_size occurs twice, as 6144 and 7: expected one value"):
        Checkpoint.from_config(twice)
    path = folder / "config.json"
    whole_config = path.read_text().rstrip()
    path.write_text(whole_config[:-1] + ', "hidden_size": 7}')  # vLLM's to read, and it takes the last
    assert Checkpoint.from_directory(folder).config["hidden_size"] == 7
    path.write_text(whole_config[:-1] + ', "num_hidden_layers": 7}')
    with pytest.raises(GlmppError, match=r"config\.json: .*num_hidden_layers occurs twice, as 12 and 7"):
        Checkpoint.from_directory(folder)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('{"hidden_size": %s}' % ("9" * 5000), "'hidden_size' is a number of 5,000 digits, expected at most 1,000"),
        ('{"a": [-%s]}' % ("9" * 5000), "'a' is a number of 5,001 digits"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "at most 100 objects and lists in each other"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not readable as JSON"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "config.json"),
        ("[1]", "expected a JSON object, found list"),
        ("", "not readable as JSON"),
    ],
    ids=["digits", "digits in a list", "deep", "too deep", "deep objects", "a list", "nothing"],
)
def test_json_that_is_no_config_is_refused(raw, said):
    with pytest.raises(GlmppError, match=said):
        parse_json(raw.encode(), "config.json")


# --- a folder's config: what the kit reads -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_nextn_predict_layers": [1]},
        {"num_nextn_predict_layers": "1"},
        {"num_nextn_predict_layers": -1},
        {"num_nextn_predict_layers": NAN},
        {"text_config": {"num_nextn_predict_layers": 1.5}},
        {"architectures": "GlmMoeDsaForCausalLM"},
        {"architectures": [None]},
        {"tie_word_embeddings": "false"},
    ],
    ids=str,
)
def test_what_the_kit_reads_of_a_folders_config_is_checked(folder, change):
    name = next(iter(change.get("text_config", change)))
    with pytest.raises(GlmppError, match=rf"config\.json: (text_config: )?{name} is .*, expected "):
        Checkpoint.from_directory(with_config(folder, change))
    with pytest.raises(GlmppError, match=rf"config\.json: (text_config: )?{name} is .*, expected "):
        make_stages({"num_hidden_layers": 4, **change}, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": [1, 2], "intermediate_size": [1], "num_experts": [64, 64], "num_key_value_heads": "x"},
        {"time_step_limit": [0.0, INF], "rope_theta": NAN, "text_config": [1], "vision_config": "clip", "dtype": 5},
        {"hidden_size": "6144", "quantization_config": [1], "layer_types": 3, "depths": [2, 2, 18, 2]},
        {"architectures": None, "tie_word_embeddings": None, "num_nextn_predict_layers": None},
        {"num_hidden_layers": 900},  # fewer layers than the config says: a verdict of vLLM's
    ],
    ids=str,
)
def test_the_rest_of_a_folders_config_is_vllms_to_read(folder, change):
    assert len(Checkpoint.from_directory(with_config(folder, change))) == 618


@pytest.mark.vllm  # transformers comes with the vllm extra
def test_the_config_of_every_model_passes():
    transformers = pytest.importorskip("transformers", minversion="5.6")
    seen = 0
    tensor = TensorSpec("model.embed_tokens.weight", "BF16", (32_000, 8))
    for kind in sorted(transformers.CONFIG_MAPPING):
        try:
            raw = transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False)
        except Exception:  # not every class has defaults that it accepts
            continue
        Checkpoint([tensor], parse_json(raw.encode(), kind))
        seen += 1
    assert seen > 300


# --- numbers of layers and experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        *({name: 10**7} for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_nextn_predict_layers")),
        *({name: 10**7} for name in ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")),
        {"layer_types": ["full_attention"] * 10_000},
        {"hybrid_override_pattern": "M" * 10_000},
        {"num_experts": [64, 10**7]},
        {"text_config": {"num_hidden_layers": 10**300}},
        {"thinker_config": {"text_config": {"num_experts": 10**7}}},
        {"vision_config": {"depth": 10**7}},
        {"audio_config": {"encoder_layers": 10**7}},
        {"ffn_config": {"moe_num_experts": 10**7}},
    ],
    ids=lambda said: str(said)[:60],
)
def test_far_more_layers_or_experts_than_names_are_refused_before_anything_is_built(folder, said):
    expected = r"config\.json: \S+ is \d[\d,]+, and the longest list .* has 13: expected at most (1,000|4,096)"
    with pytest.raises(GlmppError, match=expected):
        Checkpoint.from_directory(with_config(folder, said))


@given(st.integers(1, 400), st.integers(1, 2000))
def test_a_list_of_modules_makes_four_times_its_length_believable(length, said):
    specs = [TensorSpec(f"h.{number}.w", "U8", (1,)) for number in range(length)]
    if said <= max(1000, 4 * length):
        Checkpoint(specs, {"text_config": {"n_layer": said}})
    else:
        with pytest.raises(GlmppError, match=f"has {length:,}: expected at most {max(1000, 4 * length):,}"):
            Checkpoint(specs, {"text_config": {"n_layer": said}})


def test_experts_in_one_tensor_are_counted_by_its_shape():
    config = {"num_hidden_layers": 1, "num_experts": 10_000}
    Checkpoint([TensorSpec("model.layers.0.mlp.experts.w1", "U8", (10_000, 2, 2))], config)
    Checkpoint([TensorSpec(f"model.layers.0.mlp.experts.{n}.w1", "U8", (1,)) for n in range(2_500)], config)
    with pytest.raises(GlmppError, match="num_experts is 10,000"):
        Checkpoint([TensorSpec("model.layers.0.mlp.experts.w1", "U8", (9_999, 2, 2))], config)


# --- files --------------------------------------------------------------------------------------------------------

SHARD = "model-00001-of-00004.safetensors"
PLACES = ["config.json", INDEX_FILE, SHARD, "generation_config.json", "tokenizer.json"]


def put(path: Path, make) -> None:
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_with_a_fifo_or_a_device_is_refused_whatever_it_is_called(folder, place):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        put(folder / place, make)
        for read in (Checkpoint.from_directory, lambda path: open_checkpoint(str(path))):
            with pytest.raises(GlmppError, match=rf"{place}: is a (FIFO|device)"):
                read(folder)


def test_what_an_index_names_is_a_file(folder):
    (folder / "sub").mkdir()
    os.mkfifo(folder / "sub" / "fifo")
    index = json.loads((folder / INDEX_FILE).read_text())
    for file in ("sub/fifo", "sub"):
        index["weight_map"]["x"] = file
        (folder / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(GlmppError, match=f"{file}: lies where vLLM does not look for shards"):
            Checkpoint.from_directory(folder)
    with pytest.raises(GlmppError, match="is a FIFO, expected a regular file"):
        next(read_shard(folder / "sub" / "fifo"))


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "is a folder, expected a regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("x" * 300), "(too long|no such file|missing)"),
        (lambda path: path.symlink_to("nowhere"), "(no such file|No such file|missing)"),
        (Path.touch, "not (readable as JSON|a complete safetensors file)"),
    ],
    ids=["a folder", "a loop", "a long link", "a link to nothing", "an empty file"],
)
def test_what_is_no_file_is_told_in_a_sentence(folder, place, make, said):
    put(folder / place, make)
    with pytest.raises(GlmppError, match=said) as error:
        Checkpoint.from_directory(folder)
    assert place in str(error.value)


@pytest.mark.parametrize("place", ["config.json", INDEX_FILE, "generation_config.json"])
def test_a_json_file_has_a_limit_before_it_is_read(folder, place):
    (folder / place).touch()
    os.truncate(folder / place, 60 * 10**9)  # a hole
    most = MAX_CONFIG_BYTES if place == "config.json" else MAX_JSON_BYTES
    with pytest.raises(GlmppError, match=f"{place}: has 60,000,000,000 bytes, expected a JSON file of at most {most:,}"):
        Checkpoint.from_directory(folder)


def test_what_takes_time_with_its_square_does_not(tmp_path):
    """Each took more than ten seconds, or does at ten times the size."""
    started = time.process_time()
    twice = ",".join(f'"k{at}":null,"k{at}":null' for at in range(30_000))
    config = CONFIG.read_text().rstrip()[:-1] + f",{twice}}}"
    assert Checkpoint.from_config(written(tmp_path / "twice.json", config))
    with pytest.raises(GlmppError, match="'a' is a number of 2,000,000 digits"):
        Checkpoint.from_config(written(tmp_path / "long.json", '{"a":' + "1" * 2_000_000 + "}"))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2] * 300_000, "data_offsets": [0, 1]}}).encode()
    with pytest.raises(GlmppError, match="has 300,000 dimensions"):
        read_header(io.BytesIO(len(header).to_bytes(8, "little") + header + b"x"), 9 + len(header), "it")
    with pytest.raises(GlmppError, match="expected at most 2,000"):
        names = [TensorSpec(f"model.layers.{at}.a.weight", "F32", (1,)) for at in range(5_000)]
        Checkpoint(names, {"num_hidden_layers": 5_000})
    names = [TensorSpec(f"a.{at % 300}.w{at}", "F32", (1,)) for at in range(20_000)]
    assert Checkpoint(names, {f"a{at}_layers": 1001 for at in range(20_000)} | {"num_hidden_layers": 300})
    deep = "a." * 5_000
    (stage,) = make_stages({"num_hidden_layers": 30}, 1, layer_list=f"{deep}layers")
    assert all(stage.owns(f"{deep}norm.weight{at}") for at in range(200))
    assert time.process_time() - started < 30


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_folder_within_a_snapshot_of_the_hubs_cache_is_read(folder, tmp_path):
    """As `hf download` makes it: each file a link to its blob."""
    cache = tmp_path / "models--org--name"
    held = cache / "snapshots" / "0123" / "llm" / "text"
    (cache / "blobs").mkdir(parents=True)
    held.mkdir(parents=True)
    for at, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(at))
        (held / file.name).symlink_to(Path("../../../../blobs") / str(at))
    assert dict(Checkpoint.from_directory(held)) == dict(Checkpoint.from_directory(folder))


@pytest.mark.usefixtures("no_partition_variable")
def test_a_plan_asks_for_no_gpu(folder, monkeypatch, capsys):
    monkeypatch.setattr("glmpp.gpus._nvidia_smi", lambda *_: pytest.fail("it has no part in it"))
    assert cli.main(["plan", str(folder)]) == 0


@pytest.mark.usefixtures("no_partition_variable")
def test_words_that_are_no_options_are_shown_escaped(capsys):
    assert cli.main(["plan", "x", "--foo\nglmpp: loads\x1b[2J"]) == 2
    assert r"--foo\nglmpp: loads\x1b[2J" in capsys.readouterr().err.splitlines()[-1]


def test_numbers_of_layers_of_thousands_of_digits_are_refused():
    digits = "9" * 4300
    with pytest.raises(GlmppError, match="expected 2 numbers"):
        parse_counts(f"{digits},{digits}", 2)


def test_a_hub_variable_that_is_no_number_is_named():
    program = "import sys; from glmpp import cli; sys.exit(cli.main(['plan', 'org/name']))"
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "abc"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "a variable HF_HUB_… is no number" in done.stderr, done.stderr


def test_a_shard_of_nothing_but_a_hole_is_told_at_once(folder):
    os.truncate(folder / SHARD, 0)
    os.truncate(folder / SHARD, 10**12)
    with pytest.raises(GlmppError, match=f"{SHARD}: not a complete safetensors file"):
        Checkpoint.from_directory(folder)


@pytest.mark.parametrize("file", ["y" * 300, "y" * 10_000, "a/" * 3000 + "y", f"model-{'1' * 5000}-of-2.safetensors"])
def test_a_name_that_no_file_can_have_is_told_in_a_sentence(folder, file):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["x"] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(GlmppError, match=r"too long|a name of [\d,]+ characters"):
        Checkpoint.from_directory(folder)


@pytest.mark.parametrize("model", ["x" * 5000, "a/" * 3000 + "x", "org/" + "n" * 300, "a\0b", "LOOP", "LOOP/x"])
def test_a_model_that_cannot_be_looked_at_is_told_in_a_sentence(model, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(GlmppError):
        open_checkpoint(model.replace("LOOP", str(tmp_path / "loop")))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["file/x", "loop", "n" * 300, "no access/x"])
def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tiny_config, tmp_path, place, overwrite):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "no access").mkdir(mode=0)
    if place.startswith("no access") and os.access(tmp_path / "no access", os.W_OK):
        pytest.skip("for root there is access")
    with pytest.raises(GlmppError, match=r"cannot be (written|looked at)"):
        write_checkpoint(tiny_config, tmp_path / place, overwrite=overwrite)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(GlmppError, match=r"cannot be written: it takes 75\d\.\d+ GB, and 0\.000 GB are free"):
        write_checkpoint(config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_long_name_of_a_folder_is_a_name(tiny_config, tmp_path):
    assert len(write_checkpoint(tiny_config, tmp_path / ("n" * 250))) == 618


def test_what_vllm_opens_is_found_among_twenty_thousand_files():
    files = [f"model-{number:05d}-of-20000.safetensors" for number in range(20_000)]
    found = weight_files([*files, "pytorch_model.bin", "config.json"])
    assert found.files == files and found.opened(files[5:9]) == files[5:9] and found.others == ["pytorch_model.bin"]


# --- numbers ------------------------------------------------------------------------------------------------------


@given(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.none(), st.lists(st.integers())))
def test_a_number_is_taken_exactly_if_it_is_one_in_the_range(value):
    is_whole = type(value) is int and 1 <= value <= 100
    is_positive = type(value) in (int, float) and 0 < value <= 100
    for check, taken in ((lambda: whole("it", value, 1, 100), is_whole), (lambda: positive("it", value, 100), is_positive)):
        if taken:
            assert check() == value
        else:
            with pytest.raises(GlmppError, match=r"it=.*: expected a (whole )?number"):
                check()


@pytest.mark.parametrize("name", ["tp", "pp", "dp"])
@pytest.mark.parametrize("wrong", ["8", True, 1.5, None, 0, -1, MAX_GPUS + 1, 10**12, [8], NAN])
def test_what_is_no_number_of_gpus_is_refused_by_name(name, wrong):
    with pytest.raises(GlmppError, match=f"{name}=.*: expected a whole number from 1 to 16,384"):
        Deployment(gpu="h200", **{name: wrong})
    with pytest.raises(GlmppError, match="TP=129 PP=128 takes 16,512 GPUs: expected at most 16,384"):
        Deployment(tp=129, pp=128, gpu="h200")
    assert len(Deployment(tp=128, pp=16, dp=8, gpu="h200").all_ranks) == MAX_GPUS


def test_a_number_of_numpys_is_one():
    deployment = Deployment(numpy.int64(2), gpu="h200")
    assert type(deployment.pp) is int and json.dumps(deployment.pp) == "2"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda full: Deployment(ep="no"), "ep='no': expected True or False"),
        (lambda full: Deployment(gpu=5), "gpu=5: expected a name"),
        (lambda full: Deployment(fixes=5), "fix 5 is unknown"),
        (lambda full: Deployment(fixes=None), "fix None is unknown"),
        (lambda full: dry_run(full, 2, context=-5), "context=-5: expected a whole number from 1"),
        (lambda full: dry_run(full, 2, context="x"), "context='x': expected a whole number from 1"),
        (lambda full: dry_run(full, "2"), "pp='2': expected a whole number"),
        (lambda full: balance(full, "2"), "pp_size='2': expected a whole number"),
        (lambda full: balance(full, 2.5), r"pp_size=2\.5: expected a whole number"),
        (lambda full: make_stages(full.config, True), "pp_size=True: expected a whole number"),
        (lambda full: make_stages(full.config, 10**12), "pp_size=1000000000000: expected a whole number"),
        (lambda full: partition_layers(10**12, 10**9), "expected a whole number"),
        (lambda full: partition_layers("78", 2), "num_layers='78': expected a whole number"),
        (lambda full: layouts(full, 10**12, "h200"), "(gpus=1000000000000: expected a whole number|vllm)"),
        (lambda full: write_checkpoint(full.config, "x", seed="a"), "seed='a': expected a whole number"),
        (
            lambda full: write_checkpoint(full.config, "x", max_shard_bytes=NAN),
            "max_shard_bytes=nan: expected a number",
        ),
    ],
)
def test_what_is_no_number_is_refused_from_python(full, ask, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GlmppError, match=said):
        ask(full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        *(
            f"check M --{name} {wrong}"
            for name in ("pp", "tp", "dp")
            for wrong in ("0", "-1", "x", "1.5", "20000", "9" * 5000)
        ),
        *(f"plan M --tp {wrong}" for wrong in ("0", "nan")),
        *(f"layouts M --gpus {wrong}" for wrong in ("0", "1000000000000", "8.0")),
        *(f"check M --context {wrong}" for wrong in ("-5", "0", "1e3", "nan")),
        *(f"check M --gpu-memory-utilization {wrong}" for wrong in ("0", "1.1", "nan", "-0.5", "x")),
        *(f"plan M --gpu-gb {wrong}" for wrong in ("nan", "inf", "0", "-1", "1e30")),
        *(f"make-checkpoint M D --shard-mb {wrong}" for wrong in ("nan", "inf", "0", "-1", "x")),
        *(f"make-checkpoint M D --seed {wrong}" for wrong in ("x", "1.5", "9" * 30)),
    ],
    ids=lambda words: words[:60],
)
def test_an_option_that_is_no_number_is_refused_with_what_is_expected(words, capsys):
    assert cli.main(words.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {words.split()[-2]}: " in last and ": expected a " in last and len(last) < 250


@pytest.mark.usefixtures("no_partition_variable")
def test_more_gpus_than_there_are_is_a_sentence(capsys):
    assert cli.main(["check", str(CONFIG), "--tp", "40", "--pp", "78", "--dp", "8"]) == 2
    assert capsys.readouterr().err == "glmpp: TP=40 PP=78 DP=8 takes 24,960 GPUs: expected at most 16,384\n"


def test_ranks_are_looked_up_at_once_and_what_is_none_is_an_error():
    deployment = Deployment(tp=128, pp=128, gpu="h200")
    everyone = deployment.all_ranks
    assert chosen_ranks(deployment, everyone) == everyone
    assert chosen_ranks(deployment, range(128)) == deployment.representative_ranks == chosen_ranks(deployment, None)
    assert chosen_ranks(deployment, [5, [1, 2, 0]]) == [(5, 0, 0), (5, 127, 0), (1, 2, 0)]
    for wrong in (
        5,
        "some",
        [128],
        [-1],
        [True],
        [1.5],
        ["all"],
        [(0, 128, 0)],
        [(0, 0)],
        [(0, 0, 0.0)],
        [(-1, 0, 0)],
        [None],
    ):
        with pytest.raises(GlmppError, match=r"there is no (stage|rank)|expected 'all'"):
            chosen_ranks(deployment, wrong)


# --- stages without layers -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.parametrize("split", ["12,0", "0,12", "0,6,0,6,0", "0,0,12"])
def test_a_stage_may_hold_no_layer(tiny, split, capsys):
    counts = [int(count) for count in split.split(",")]
    assert cli.main(["plan", str(tiny.directory), "--pp", str(len(counts)), "--layer-partition", split]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    stages = make_stages(tiny.config, len(counts), counts)
    assert [row[1] for row in rows] == [stage.span for stage in stages]
    assert [stage.span == "none" for stage in stages] == [count == 0 for count in counts]
    held = [[spec for spec in tiny.values() if stage.owns(spec.name)] for stage in stages]
    assert stage_sizes(tiny, stages) == [(len(specs), sum(spec.nbytes for spec in specs)) for specs in held]


def test_a_single_file_without_an_index_is_read(tmp_path):
    save_file({"model.layers.0.w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"n_layer": 1}')
    assert list(open_checkpoint(str(tmp_path))) == ["model.layers.0.w"]
