"""Files from strangers: an error that names file and tensor, before any tensor is read; nothing is unpickled or run."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.index import INDEX_FILE, shard_path
from glmpp.partition import make_stages, stage_bytes

spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards, an index, a config."""
    place = tmp_path / "model"
    place.mkdir()
    for name, data in fuzz.valid().items():
        (place / name).write_bytes(data)
    return place


def with_index(folder: Path, change) -> Path:
    """Change the index's weight_map."""
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def test_the_folder_is_good_until_it_is_tampered_with(folder):
    assert len(list(Checkpoint.from_directory(folder).read())) == 6


@pytest.mark.parametrize(
    "file", ["../out.safetensors", "a/../../out.safetensors", "", ".", "a\0b", "ABSOLUTE", "link", "sub/link"]
)
def test_an_index_cannot_lead_out_of_the_folder(folder, file):
    outside = folder.parent / "out.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    (folder / "link").symlink_to(outside)
    (folder / "sub").symlink_to(folder.parent)
    (folder.parent / "link").symlink_to(outside)
    file = str(outside) if file == "ABSOLUTE" else file
    with pytest.raises(GlmppError, match="which is not a file of this folder") as error:
        Checkpoint.from_directory(with_index(folder, lambda weight_map: weight_map.update(x=file)))
    assert repr(file) in str(error.value) and str(folder) in str(error.value)


@given(st.text(st.sampled_from("./\\ab\0~"), max_size=12))
@settings(max_examples=300, deadline=None)
def test_whatever_an_index_names_lies_in_the_folder_or_is_refused(tmp_path_factory, file):
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    try:
        path = shard_path(home, file)
    except GlmppError:
        return
    assert path.resolve().is_relative_to(home.resolve()) and path.resolve() != home.resolve()


def test_a_shard_of_the_folder_that_an_index_names_by_its_whole_path_is_told_as_that(folder):
    """vLLM compares the names as they are written, so it depends on how the folder is given whether it finds it."""
    index = folder / "model.safetensors.index.json"
    weight_map = {name: str(folder / file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(GlmppError, match=r"model-00001-of-00002.safetensors' by its whole path: vLLM finds it only where"):
        Checkpoint.from_directory(folder)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(folder):
    cache = folder.parent / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert list(Checkpoint.from_directory(snapshot)) == list(Checkpoint.from_directory(folder))
    victim = snapshot / "model-00001-of-00002.safetensors"
    victim.unlink()
    victim.symlink_to(folder / victim.name)  # out of the cache
    with pytest.raises(GlmppError, match="which is not a file of this folder"):
        Checkpoint.from_directory(snapshot)


def test_a_shard_that_the_index_does_not_name_is_left_out_and_told(folder):
    before = list(Checkpoint.from_directory(folder))
    for name in ("adapter_model", "model-00003-of-00003"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    checkpoint = Checkpoint.from_directory(folder)
    assert list(checkpoint) == before
    said = "not opened by vLLM, as model.safetensors.index.json does not name them: "
    assert checkpoint.notes == [f"{said}adapter_model.safetensors, model-00003-of-00003.safetensors"]


def test_a_name_in_two_shards_is_told(folder):
    name = next(name for name, spec in Checkpoint.from_directory(folder).items() if "00002-of" in spec.file)
    save_file({name: torch.zeros(3, 5, 7)}, folder / "model-00001-of-00002.safetensors")
    checkpoint = Checkpoint.from_directory(folder)
    (twin,) = checkpoint.twins  # of another shape: vLLM is handed both
    (line,) = (line for line in checkpoint.notes if "vLLM keeps the last" in line)
    assert f"{twin.name!r} (1 such)" in line and twin.file != checkpoint[twin.name].file


@pytest.mark.parametrize("shape", [[2**63], [0, 2**63], [2**32, 2**32], [0, 2**32, 2**32]])
def test_a_shape_whose_product_overflows_is_an_error(tmp_path, shape):
    header = json.dumps({"big": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GlmppError, match="'big'"):
        Checkpoint.from_directory(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(GlmppError, match=r"glmpp reads safetensors only|not a complete safetensors file"):
            Checkpoint.from_directory(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.vllm
@pytest.mark.usefixtures("no_partition_variable")
def test_code_that_comes_with_a_checkpoint_is_not_run(tiny, tmp_path, capsys):
    pytest.importorskip("vllm")
    from glmpp import cli

    shutil.copytree(tiny.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "configuration_evil.EvilConfig"}
    config = {**tiny.config, "model_type": "evil", "architectures": ["EvilForCausalLM"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for gpu, ends, verdict in (("cpu", 2, "cannot tell"), ("h200", 1, "cannot be built")):
        assert cli.main(["check", str(tmp_path), "--pp", "2", "--gpu", gpu]) == ends
        assert verdict in capsys.readouterr().out and not (tmp_path / "ran").exists()


def test_control_characters_in_a_name_are_escaped_in_errors(folder):
    with pytest.raises(GlmppError) as error:
        Checkpoint.from_directory(with_index(folder, lambda weight_map: weight_map.update({"a\x1b[2J": "none.safetensors"})))
    assert "\x1b" not in str(error.value) and r"a\x1b[2J" in str(error.value)


def test_numbers_of_more_digits_than_python_takes_and_names_too_long_for_a_file_are_names_like_others(folder):
    digits = "9" * 5000
    name = f"model.layers.{digits}.mlp.experts.{digits}.w"
    save_file({name: torch.zeros(1)}, folder / "x.safetensors")
    with_index(folder, lambda weight_map: weight_map.update({name: "x.safetensors"}))
    checkpoint = Checkpoint.from_directory(folder)
    assert len(checkpoint) == 7 and stage_bytes(checkpoint, make_stages({"num_hidden_layers": 1}, 1))
    for file in (f"{digits}.safetensors", f"sub/{digits}"):
        with pytest.raises(GlmppError, match=r"a name of 5,\d+ characters|is missing"):
            Checkpoint.from_directory(with_index(folder, lambda weight_map, file=file: weight_map.update(y=file)))


WITHOUT_VLLM = [kind for kind in fuzz.KINDS if kind not in fuzz.WITH_VLLM]


@pytest.mark.parametrize("kind", WITHOUT_VLLM)
@pytest.mark.usefixtures("no_partition_variable")
def test_input_by_every_way_in_works_or_is_refused_and_nothing_else(kind):
    """A short run of `make fuzz`, with another seed each time it is changed here."""
    outcomes = fuzz.run(1500 if kind == "folder" else 100, seed=2, progress=False, kinds=[kind])
    assert set(outcomes) <= {(kind, "refused"), (kind, "works")} and outcomes[kind, "refused"] > 20
    assert (outcomes[kind, "works"] > 0) == (kind != "no files")


@pytest.mark.vllm
@pytest.mark.parametrize(("kind", "runs"), [("load format", 100), ("check", 8)])
def test_hostile_input_to_vllm_is_told_or_refused_and_nothing_else(kind, runs):
    pytest.importorskip("vllm")
    outcomes = fuzz.run(runs, seed=2, progress=False, kinds=[kind])
    assert len(outcomes) > 1


def test_a_dtype_that_is_not_a_string_is_refused(tmp_path):
    """Found by the fuzzer: an unhashable dtype was a TypeError."""
    header = json.dumps({"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GlmppError, match=r"tensor 'a' is not described by .* got `array`"):
        Checkpoint.from_directory(tmp_path)
