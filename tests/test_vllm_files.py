"""The verdict is that of the files that vLLM opens: each is proven by vLLM's own reader on real bytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import write_model
from safetensors.torch import load_file, save_file

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.dry_run import dry_run
from glmpp.formats.index import INDEX_FILE

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_partition_variable")]
NO_WEIGHTS = "Cannot find any model weights|Weight files referenced in index but missing"  # before 0.33, and since
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("files") / "llama")


class Folder:
    """A copy of the model, and what is done to it."""

    def __init__(self, path: Path):
        self.path, self.weight_map = path, json.loads((path / INDEX_FILE).read_text())["weight_map"]
        self.shard = path / self.weight_map[NORM]

    def add(self, name: str, **tensors: torch.Tensor) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, self.path / name)

    def index(self, weight_map: dict | None) -> None:
        (self.path / INDEX_FILE).unlink()
        if weight_map is not None:
            (self.path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    def adapter(self) -> None:
        self.add("adapter_model.safetensors", base_model__model__x__lora_A__weight=torch.ones(2, 2))

    def older(self) -> None:
        for file in [*self.path.glob("model-*")]:
            shutil.copy(file, file.with_name(file.name.replace("-of-", "-of-9")))

    def all_in(self, name: str) -> None:
        every = {key: one for file in self.path.glob("model-*.safetensors") for key, one in load_file(file).items()}
        save_file(every, self.path / name)

    def lose_all(self) -> None:
        for file in self.path.glob("*.safetensors"):
            file.unlink()

    def break_link(self) -> None:
        self.shard.unlink()
        self.shard.symlink_to("nowhere")

    def without_index(self, change) -> None:
        self.index(None)
        change()


CASES = {  # what is done -> what an exception of vLLM says, or "" where it loads
    "nothing": (lambda one: None, ""),
    "no index": (lambda one: one.index(None), ""),
    "older shards beside an index": (Folder.older, ""),
    "an adapter beside an index": (Folder.adapter, ""),
    "an adapter and no index": (lambda one: one.without_index(one.adapter), "no module or parameter named 'base_model'"),
    "a consolidated copy": (lambda one: one.all_in("consolidated.safetensors"), ""),
    "Mistral's names": (lambda one: one.add("consolidated.safetensors", tok=torch.ones(1)), "no module .* named 'tok'"),
    "consolidated below": (lambda one: one.add("sub/consolidated.safetensors", x=torch.ones(1)), NO_WEIGHTS),
    "an index that lacks a tensor": (lambda one: one.index({k: v for k, v in one.weight_map.items() if k != NORM}), ""),
    "an index of more": (lambda one: one.index({**one.weight_map, "model.x": one.shard.name}), ""),
    "an index of ./": (lambda one: one.index({k: f"./{v}" for k, v in one.weight_map.items()}), NO_WEIGHTS),
    "twins": (lambda one: one.without_index(lambda: one.add("z.safetensors", model__norm__weight=torch.ones(128))), ""),
    "twins of other shapes": (
        lambda one: one.without_index(lambda: one.add("z.safetensors", model__norm__weight=torch.ones(3))),
        "Attempted to load weight",
    ),
    "a missing shard": (lambda one: one.shard.unlink(), f"were not initialized from checkpoint|{NO_WEIGHTS}"),
    "no shard": (Folder.lose_all, NO_WEIGHTS),
    "a link to nothing": (Folder.break_link, "No such file or directory"),
    "an empty shard": (lambda one: one.shard.write_bytes(b""), "header too small"),
    "a folder": (lambda one: one.without_index(lambda: (one.path / "x.safetensors").mkdir()), "No such device"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_that_of_the_files_that_vllm_opens(model, tmp_path, case):
    change, words = CASES[case]
    change(Folder(Path(shutil.copytree(model, tmp_path / "model"))))
    checkpoint = Checkpoint.from_directory(tmp_path / "model", judged=True)
    for weights in ("meta", "real"):
        (stage,) = dry_run(checkpoint, 1, weights=weights, progress=False).stages
        assert stage.verdict == ("dies" if words else "loads")
        assert not words or re.search(words, stage.failures[0].message)


def test_check_tells_what_is_left_out_and_a_missing_shard_is_a_verdict(model, tmp_path, capsys):
    one = Folder(Path(shutil.copytree(model, tmp_path / "model")))
    one.adapter()
    assert cli.main(["check", str(one.path), "--gpu", "cpu"]) == 0
    assert "not opened by vLLM, as model.safetensors.index.json does not name them: adapter_" in capsys.readouterr().out
    one.shard.unlink()
    assert cli.main(["check", str(one.path), "--gpu", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "the shard is missing; the index places" in out and "PP=1: does not load" in out
