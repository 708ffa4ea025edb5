"""Tensors of a layer that vLLM has been handed and has no parameter for: it drops them and says nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from reports import LLAMA, Tensors, llama, plain, put, qwen3_moe, write

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import CANNOT_TELL

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_partition_variable")]
HIDDEN = LLAMA["hidden_size"]
ROWS = {"q": 512, "k": 256, "v": 256}


def qkv_biases(value: float) -> tuple[Tensors, dict]:
    """Of Qwen2, in a config of Llama's, which has none."""
    into = llama(LLAMA)
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, rows in ROWS.items():
            bias = torch.full((rows,), value, dtype=torch.bfloat16)
            into[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias
    return into, LLAMA


def of_qwen3_moe(leaf: str, *shape: int) -> tuple[Tensors, dict]:
    into, config = qwen3_moe(256, 8, plain, plain)
    for layer in range(config["num_hidden_layers"]):
        put(into, f"model.layers.{layer}.{leaf}", *shape, dtype=torch.float32)
    return into, config


def of_qwen3_moe_and_more(leaf: str, *shape: int) -> tuple[Tensors, dict]:
    into, config = qwen3_moe(256, 8, plain, plain)
    put(into, f"model.layers.{config['num_hidden_layers']}.{leaf}", *shape)
    return into, config


def in_every_layer(leaf: str, *shape: int):
    return lambda: of_qwen3_moe(leaf, *shape), f"model.layers.0.{leaf}"


CASES = {
    "biases": (lambda: qkv_biases(0.5), "model.layers.0.self_attn.k_proj.bias"),
    # names that look like a scale's, or like a mask's, and have no weight beside them
    "layer scale": in_every_layer("layer_scale", 256),
    "router scale": in_every_layer("mlp.router_scale", 256),
    "scale of a norm": in_every_layer("extra_norm.scale", 256),
    "scale of an expert": in_every_layer("mlp.experts.3.per_expert_scale", 1),
    "zero expert": in_every_layer("mlp.zero_expert_gate.weight", 1, 256),
    "bias of the attention": in_every_layer("self_attn.bias", 256),
    "more layers than the config": (
        lambda: of_qwen3_moe_and_more("extra_norm.weight", 256),
        "model.layers.2.extra_norm.weight",
    ),
    "correction": (lambda: of_qwen3_moe("mlp.gate.e_score_correction_bias", 8), "model.layers.0.mlp.gate.e_score_corr"),
}
# Qwen3-MoE of newer releases looks each tensor up, but for biases and what its quantisation may have left.
BY_NAME = {"layer scale", "router scale", "scale of a norm", "zero expert", "more layers than the config"}
SAYS_IT_ITSELF = tuple(map(int, vllm_version().split(".")[:2])) >= (0, 30)
LOADED = {
    "zeros": lambda: qkv_biases(0.0),
    "mask": lambda: of_qwen3_moe("self_attn.bias", 1, 1, 8, 8),
    **({} if SAYS_IT_ITSELF else {"scales of the cache": lambda: of_qwen3_moe("self_attn.k_scale", 1)}),
    "frequencies": lambda: of_qwen3_moe("self_attn.rotary_emb.inv_freq", 64),
    "as they are": lambda: (llama(LLAMA), LLAMA),
}


def check(folder: Path, capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(["check", str(folder), "--gpu", "h100", *arguments])
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize("split", [(), ("--pp", "2"), ("--tp", "2")])
@pytest.mark.parametrize("case", CASES)
def test_it_is_no_complete_load(tmp_path, capsys, case, split):
    make, name = CASES[case]
    code, out = check(write(tmp_path / "model", *make()), capsys, *split)
    assert code == 1, out
    if SAYS_IT_ITSELF and case in BY_NAME:
        assert f"    ValueError: There is no module or parameter named {'.'.join(name.split('.')[1:3])!r}"[:-1] in out, out
        return
    why = "the config says 2 layers" if case.startswith("more layers") else "the model has no parameter for it"
    assert f"    dropped: {name}" in out and " dropped\n" in out and f"        dropped: {why}\n" in out, out


@pytest.mark.parametrize("split", [(), ("--pp", "2"), ("--tp", "2")])
@pytest.mark.parametrize("case", LOADED)
def test_what_no_model_needs_is_none(tmp_path, capsys, case, split):
    code, out = check(write(tmp_path / "model", *LOADED[case]()), capsys, *split)
    assert code == 0 and re.search(r"(PP|TP)=\d.*: loads, complete", out), out


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_whether_a_bias_is_needed_only_its_values_tell(tmp_path, value):
    """Of a repository on the Hub the headers are read, and no values."""
    folder = write(tmp_path / "model", *qkv_biases(value))
    headers = Checkpoint(Checkpoint.from_directory(folder).values(), LLAMA)
    (stage,) = dry_run(headers, Deployment(1, gpu="h100"), control=False, progress=False).stages
    assert stage.verdict == CANNOT_TELL and "its values would tell whether it is needed" in stage.why
