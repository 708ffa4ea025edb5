"""Which files of a folder are read: those that vLLM opens. The table is what 0.22.1 and 0.33.0 listed of such folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.weights import weight_files

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TABLE = {  # names in the folder -> what is opened where no index says otherwise
    "shards": ([TWO, ONE, "config.json"], [ONE, TWO]),
    "leftovers": (["optimizer.safetensors", "model.safetensors"], ["model.safetensors", "optimizer.safetensors"]),
    "pickles beside": ([ONE, "pytorch_model.bin", "model.pt"], [ONE]),
    "pickles": (["pytorch_model.bin", "training_args.bin", "model.pt"], ["pytorch_model.bin"]),
    "pickles of training": (["training_args.bin", "model.pt"], []),
    "pt": (["model.pt", "optimizer.pt"], ["model.pt"]),
    "consolidated": ([ONE, "consolidated.safetensors"], ["consolidated.safetensors"]),
    "consolidated below": ([ONE, "original/consolidated.00.safetensors"], []),
    "below": (["sub/model.safetensors"], []),
    "hidden": ([ONE, ".old.safetensors"], [ONE]),
    "shard 10": (["m-10.safetensors", "m-9.safetensors"], ["m-9.safetensors", "m-10.safetensors"]),
    "nothing": (["config.json", "model.gguf"], []),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_files_are_those_that_vllm_lists(case):
    names, opened = TABLE[case]
    found = weight_files(names)
    assert found.files == opened and found.index is None


def test_of_each_format_its_own_index_counts():
    assert weight_files([ONE, INDEX_FILE]).index == INDEX_FILE
    assert weight_files([ONE, "consolidated.safetensors", INDEX_FILE]).index is None
    assert weight_files([ONE, "other.safetensors.index.json"]).index is None


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    for name, tensor in ((ONE, "a"), (TWO, "b")):
        save_file({tensor: torch.zeros(2)}, tmp_path / name)
    return tmp_path


def test_shards_without_an_index_are_all_read_and_told(folder):
    checkpoint = Checkpoint.from_directory(folder)
    assert list(checkpoint) == ["a", "b"]
    assert checkpoint.notes == [f"without an index vLLM opens every *.safetensors of the folder: {ONE}, {TWO}"]


def test_of_two_tensors_of_one_name_the_last_counts(folder):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "z.safetensors")
    checkpoint = Checkpoint.from_directory(folder)
    assert {name: tensor.tolist() for name, tensor in checkpoint.read()} == {"a": [1, 1], "b": [1, 1]}
    assert "'a' (2 such) lies in " in checkpoint.notes[-1] and checkpoint.twins == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "the shard is missing; the index places 1 tensors in it, e.g. 'b'"),
        (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
    ],
    ids=["missing", "empty"],
)
def test_a_shard_that_cannot_be_read_is_an_error_unless_vllm_is_to_judge(folder, spoil, said):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO}}))
    spoil(folder / TWO)
    with pytest.raises(GlmppError, match=said):
        Checkpoint.from_directory(folder)
    checkpoint = Checkpoint.from_directory(folder, judged=True)
    assert list(checkpoint) == ["a"] and said in checkpoint.notes[0]


def test_a_link_that_leads_nowhere_is_told_without_an_index(folder):
    (folder / "z.safetensors").symlink_to("nowhere")
    with pytest.raises(GlmppError, match=r"z\.safetensors: is a link that leads nowhere"):
        Checkpoint.from_directory(folder)


def test_an_adapter_is_told_with_its_base_model(tmp_path, capsys):
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert cli.main(["plan", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is an adapter (adapter_config.json, peft_type 'LORA')" in err and "'org/base'" in err


def test_a_drafter_in_the_speculators_format_is_told_with_its_model(folder, capsys):
    config = {"speculators_model_type": "eagle3", "speculators_config": {"verifier": {"name_or_path": "org/verifier"}}}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "is a drafter in the speculators format ('eagle3')" in err and "'org/verifier'" in err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "pytorch_model.bin"], "vLLM would open pytorch_model.bin (*.bin); glmpp reads safetensors only"),
        (["config.json", "model.pt"], "vLLM would open model.pt (*.pt); glmpp reads safetensors only"),
        (["config.json", "q4.gguf"], "vLLM finds no weights here"),
        (["params.json", "consolidated.safetensors"], "holds params.json and no config.json"),
        (["config.json"], "holds no weights that vLLM opens"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_other_formats_are_told_with_what_vllm_would_open(tmp_path, capsys, files, said):
    for name in files:
        (tmp_path / name).write_text('{"num_hidden_layers": 1}')
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
