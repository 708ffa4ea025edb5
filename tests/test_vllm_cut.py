"""What the ranks of a layout hold of a checkpoint, read off the values that they have loaded, beside what the kit says.

The oracle knows nothing of views and storages. All four layers of a model have the same tensors. Each element has a number;
layers 0, 1 and 2 hold its digits and layer 3 a checksum, so what a rank has loaded in the four layers says which element it
is. A tensor is cut if the ranks together hold a part of it, or if a rank's kernel, which finds the scale of its k-th row
or column by division, finds one that belongs to another group of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import quantised as forms
import reports
import torch
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint, TensorSpec
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.ledger import ABSENT, LOADED

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEWER = tuple(map(int, vllm_version().split(".")[:2])) >= (0, 32)
BASE = 240  # every dtype has as many values that survive a load: FP8 by its codes, BF16 as whole numbers up to 256
LAYER = re.compile(r"(.*layers\.)(\d+)(\..*)")
WHOLE, CUT = "whole", "cut"
HALF_A_BLOCK = WHOLE if NEWER else "divisible by weight quantization block"
HALF_A_GROUP = "divisible by group_size (128)" if NEWER else CUT
GIVEN_BY_LIBRARIES = ("bitsandbytes", "torchao", "fbgemm", "fp_quant")


# --- numbers as values, and back ------------------------------------------------------------------------------------


def digit(numbers: np.ndarray, layer: int) -> np.ndarray:
    """What an element holds in one of the layers."""
    digits = [numbers // BASE**place % BASE for place in range(3)]
    return digits[layer] if layer < 3 else (7 * digits[0] + 13 * digits[1] + 31 * digits[2] + 5) % BASE


def as_dtype(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    if dtype is torch.float8_e4m3fn:
        return (tensor + (tensor > 126).long()).to(torch.uint8).view(dtype)  # code 127 is NaN
    return tensor.to(torch.uint8).view(dtype) if dtype is torch.int8 else tensor.to(dtype)


def as_digits(tensor: torch.Tensor) -> np.ndarray:
    if tensor.element_size() == 1:
        codes = tensor.contiguous().view(torch.uint8).long()
        return (codes - (codes > 127).long() if tensor.dtype is torch.float8_e4m3fn else codes).numpy()
    if tensor.is_floating_point():
        wide = tensor.double()
        return torch.where(wide.isfinite() & (wide == wide.round()) & (wide.abs() < BASE), wide, -1).long().numpy()
    return tensor.long().numpy()


def first_layer(checkpoint: Checkpoint) -> dict[str, tuple[int, TensorSpec]]:
    """Its tensors -> number of the first element, and the tensor."""
    found, at = {}, 0
    for name, spec in checkpoint.items():
        if (match := LAYER.match(name)) and match[2] == "0":
            found[name] = (at, spec)
            at += math.prod(spec.shape)
    assert at < BASE**3
    return found


def write(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with numbers for values."""
    firsts, tensors = first_layer(checkpoint), {}
    for name, spec in checkpoint.items():
        values = np.arange(math.prod(spec.shape)) % BASE
        if len(values) == 1:
            values += 1  # some loaders refuse scales of a whole tensor that differ
        elif match := LAYER.match(name):
            values = digit(firsts[f"{match[1]}0{match[3]}"][0] + np.arange(len(values)), int(match[2]))
        tensors[name] = as_dtype(values, spec.torch_dtype).reshape(spec.shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return Checkpoint.from_directory(folder)


def held(parameters: dict[str, torch.Tensor], firsts: dict, left: set[str]) -> dict[str, np.ndarray]:
    """Tensor of the first layer -> how often a rank holds each of its elements. Args: left: parameters without a value."""
    seen = np.zeros(sum(math.prod(spec.shape) for _, spec in firsts.values()), int)
    for name, parameter in parameters.items():
        if (match := LAYER.match(name)) and match[2] == "0" and name not in left and parameter.numel():
            digits = [as_digits(parameters[f"{match[1]}{layer}{match[3]}"]) for layer in range(4)]
            numbers = sum(one * BASE**place for place, one in enumerate(digits[:3]))
            right = np.logical_and.reduce([(one >= 0) & (one < BASE) for one in digits]) & (numbers < len(seen))
            seen += np.bincount(numbers[right & (digit(numbers, 3) == digits[3])], minlength=len(seen))
    return {name: seen[at : at + math.prod(spec.shape)].reshape(spec.shape) for name, (at, spec) in firsts.items()}


# --- which scale is whose -------------------------------------------------------------------------------------------

# Pattern of a format's name -> name of the weight; of a scale -> elements of the weight, as stored, that share one: in each
# dimension; None: all of it.
SHARE = {
    r"modelopt, FP8 blocks": ("weight", {"weight_scale": (128, None)}),
    r"blocks": ("weight", {"weight_scale_inv": (128, 128), "weight_scale": (128, 128)}),
    r"compressed-tensors, NVFP4": ("weight_packed", {"weight_scale": (1, 8)}),
    r"NVFP4|mixed": ("weight", {"weight_scale": (1, 8)}),
    r"(compressed-tensors|autoround), MXFP4": ("weight_packed", {"weight_scale": (1, 16)}),
    r"MXFP4": ("weight", {"weight_scale": (1, 16)}),
    r"MXFP8": ("weight", {"weight_scale": (1, 32)}),
    r"W4A16 channel": ("weight_packed", {"weight_scale": (1, None)}),
    r"W8A16": ("weight_packed", {"weight_scale": (1, 32)}),
    r"Kimi": ("weight_packed", {"weight_scale": (1, 4)}),
    r"W4A(16|8)": ("weight_packed", {"weight_scale": (1, 16), "weight_zero_point": (8, 16)}),
    r"gptq, 8 bits": ("qweight", {"scales": (32, 1), "qzeros": (32, 4)}),
    r"gptq|autoround$": ("qweight", {"scales": (16, 1), "qzeros": (16, 8)}),
    r"awq": ("qweight", {"scales": (128, Fraction(1, 8)), "qzeros": (128, 1)}),
    r"int4": ("weight", {"weight_scale": (128, Fraction(1, 8)), "weight_zero_point": (128, 1)}),
    r"": ("weight", {"weight_scale": (1, None)}),
}


def along(times: np.ndarray, dimension: int) -> list[int]:
    """Indices along a dimension that a rank holds; one of two or more as often as it comes for each time of the others."""
    found = times.max(axis=tuple(other for other in range(times.ndim) if other != dimension))
    return np.repeat(np.arange(len(found)), found // max(np.gcd.reduce(found), 1)).tolist()


def fits(own: list[int], scales: list[int], share: Fraction | int, count: int) -> bool:
    """Whether a kernel finds the right scales. Args: own, scales: indices that a rank holds, in order; count: of scales."""
    if share < 1:
        return scales == [int(at / share) + more for at in own for more in range(int(1 / share))]
    if len(set(scales)) < len(scales):
        each = Fraction(len(own), len(scales))  # vLLM 0.33 repeats scales so that smaller blocks fit a rank's part
        return [scales[int(k / each)] for k in range(len(own))] == [at // share for at in own]
    if len(scales) == count:
        return True  # a rank that has them all is told which is whose
    return all(k // share < len(scales) and scales[k // share] == at // share for k, at in enumerate(own))


def wrong_scales(form: str, masks: dict[str, np.ndarray]) -> set[tuple[str, str]]:
    weight, shares = next(found for pattern, found in SHARE.items() if re.search(pattern, form))
    found = set()
    for name, mask in masks.items():
        stem, _, suffix = name.rpartition(".")
        for kind, share in shares.items():
            scales = masks.get(f"{stem}.{kind}")
            if suffix != weight or not mask.any() or scales is None or scales.ndim < 2:
                continue
            if "zero" in kind and not scales.any():
                continue  # of symmetric weights zero points say nothing, and vLLM may have no place for them
            scales = scales.squeeze(1) if scales.ndim > 2 else scales
            for dimension, each in enumerate(share):
                size, count = mask.shape[dimension], scales.shape[dimension]
                one_for_all = each is None or (count == 1 and size <= each)
                if not one_for_all and not fits(along(mask, dimension), along(scales, dimension), each, count):
                    found.add((name, f"{stem}.{kind}"))
    return found


# --- the kit beside it ----------------------------------------------------------------------------------------------


def sized(monkeypatch, **sizes: int) -> None:
    """Sizes of the models in `quantised/models.py`; an MLP has an expert's."""
    sizes = {"HIDDEN": 128, "HEADS": 16, "KV_HEADS": 2, "HEAD": 64, "VOCABULARY": 512, **sizes}
    for name, size in {"INTERMEDIATE": sizes["EXPERT"], **sizes}.items():
        monkeypatch.setattr(forms.models, name, size)
    fields = {"hidden_size": "HIDDEN", "num_attention_heads": "HEADS", "num_key_value_heads": "KV_HEADS"}
    for field, name in fields.items():
        monkeypatch.setitem(forms.models.COMMON, field, sizes[name])


def kits(report: DryRunReport) -> tuple[set[str], dict[tuple, set]]:
    """Tensors that no rank reads as a whole, and of each rank weights and scales that do not belong together; layer 0's."""
    cuts = {one.rank: [cut for cut in one.cuts if ".layers.0." in cut.tensor] for one in report.stages}
    wrong = {rank: {(cut.tensor, cut.scales) for cut in found if cut.scales is not None} for rank, found in cuts.items()}
    return {cut.tensor for found in cuts.values() for cut in found if cut.scales is None}, wrong


def outcome(form: str, model: str, layout: Deployment, folder: Path) -> str:
    """WHOLE, CUT, or what vLLM says; kit and oracle agree on every tensor, or it is an error."""
    checkpoint = forms.quantised(form, model)
    report = dry_run(checkpoint, layout, progress=False)
    if failed := [one for one in report.stages if one.verdict in (CANNOT_BUILD, CANNOT_TELL, DIES)]:
        assert failed[0].place.startswith("vllm/"), failed[0].message
        return f"{failed[0].exception}: {failed[0].message}"
    ranks = folder / "ranks"
    ranks.mkdir()
    written = write(checkpoint, folder / "model")
    full = dry_run(written, layout, weights="real", ranks="all", control=False, keep=ranks, progress=False)
    if [one for one in full.stages if "re-initialize CUDA" in (one.message or "")]:
        return "moe_wna16 puts real bytes on a GPU"
    if form.startswith("quark, int4") and any("HUMMING" in moe for moe in full.stages[0].backends.get("moe", ())):
        return "0.33.0 packs these anew while it loads: no element can be told"
    firsts, masks = first_layer(checkpoint), {}
    for one in full.stages:
        left = {name for name, (written, _) in one.ledger.parameters.items() if not written}
        masks[one.rank] = held(torch.load(ranks / "{}-{}-{}.pt".format(*one.rank)), firsts, left)
    together = {name: sum(times[name] for times in masks.values()) for name in firsts}
    unread = {name for name, times in together.items() if times.any() and not times.all()}
    wrong = {rank: wrong_scales(form, mask) for rank, mask in masks.items()}
    assert kits(full) == (unread, wrong)
    assert kits(report) == (unread, {one.rank: wrong[one.rank] for one in report.stages})
    columns = [one.ledger.tensors for one in full.stages]
    loaded = {name for name in firsts if any(column[name] == LOADED for column in columns)}
    loaded -= {name for name in loaded if together[name].size == 1 or name.endswith(("g_idx", "weight_shape"))}
    assert not {name for name in loaded if not together[name].any()}
    share_a_block = any(left.kind == CUT for one in full.stages for left in one.left.values())  # has a test of its own
    found = CUT if unread or any(wrong.values()) or share_a_block else WHOLE
    assert {one.verdict for one in report.stages} == {INCOMPLETE if found == CUT else LOADS}
    return found


# A rank's part of an expert, or of an MLP: how many of the groups of 16, 32 or 128 of the format.
CASES = [
    ("modelopt, NVFP4", "moe", {"tp": 8}, {"EXPERT": 256}, WHOLE),  # 2
    ("modelopt, NVFP4", "moe", {"tp": 8}, {"EXPERT": 320}, CUT),  # 2.5
    ("modelopt, NVFP4", "moe", {"tp": 4, "ep": True}, {"EXPERT": 320, "EXPERTS": 6}, WHOLE),  # dealt out: 2, 2, 1, 1
    ("modelopt, NVFP4", "dense", {"tp": 8}, {"EXPERT": 320}, "in features size is not multiple of 16"),  # 2.5
    ("compressed-tensors, MXFP4", "moe", {"tp": 4}, {"EXPERT": 320}, CUT),  # 2.5
    ("compressed-tensors, W4A16", "moe", {"tp": 2}, {"EXPERT": 640, "HEAD": 128}, HALF_A_GROUP),  # 2.5
    ("compressed-tensors, W4A16", "moe", {"tp": 8}, {"EXPERT": 640, "HEAD": 128}, HALF_A_GROUP),  # 0.6: no rank has a scale
    ("compressed-tensors, W4A16", "moe", {"tp": 4}, {"EXPERT": 512, "HEAD": 128}, WHOLE),  # 1
    ("fp8, blocks", "moe", {"tp": 2}, {"EXPERT": 640, "HEAD": 128}, HALF_A_BLOCK),  # 2.5
    ("fp8, blocks", "moe", {"tp": 4}, {"EXPERT": 512, "HEAD": 128}, WHOLE),  # 1
    ("compressed-tensors, FP8 channel", "moe", {"tp": 4}, {"EXPERT": 320}, WHOLE),
    ("gptq", "dense", {"tp": 4}, {"EXPERT": 512, "HEAD": 128}, WHOLE),  # 1
    ("awq", "dense", {"tp": 4}, {"EXPERT": 512, "HEAD": 128}, WHOLE),  # 1
]


def wanted() -> list[tuple]:
    """In `make test-cuts` all formats, too: kit and oracle agree, whatever it is."""
    if os.environ.get("GLMPP_EVERY_CUT") != "1":
        return CASES
    found = [*CASES]
    for form, model in forms.cases():
        if model not in ("dense", "moe") or form.startswith(GIVEN_BY_LIBRARIES):
            continue
        by_128 = re.search("W4A|W8A16|gptq|awq|int4|autoround$", form)
        in_groups = by_128 or re.search("blocks|NVFP4|MXFP|mixed", form)
        head, whole = {"HEAD": 128 if by_128 or "blocks" in form else 64}, 1920 if by_128 else 1856  # whose groups are full
        for size, tp in ((640, 2), (640, 8), (whole, 8), (1024, 16)) if in_groups else ((640, 8),):
            found.append((form, model, {"tp": tp}, {"EXPERT": size, **head}, ""))
        if model == "moe":
            found.append((form, model, {"tp": 4, "ep": True}, {"EXPERT": 640, "EXPERTS": 6, **head}, ""))
    return found


@pytest.mark.parametrize(("form", "model", "layout", "sizes", "expected"), wanted())
def test_what_ranks_hold_is_what_the_kit_says(form, model, layout, sizes, expected, tmp_path, monkeypatch):
    sized(monkeypatch, **{"EXPERTS": layout["tp"], **sizes})
    assert expected in outcome(form, model, Deployment(gpu="h100", **layout), tmp_path)


@pytest.mark.parametrize(("tp", "experts", "configured"), [(1, 6, 4), (2, 6, 4), (4, 10, 8), (8, 12, 12)])
def test_an_expert_that_no_rank_holds_is_cut(tp, experts, configured, monkeypatch):
    """The checkpoint has more of them than the config: to every rank they are another's."""
    sized(monkeypatch, EXPERT=256, EXPERTS=experts)
    checkpoint = forms.quantised("compressed-tensors, FP8 channel", "moe")
    routers = {
        f"model.layers.{layer}.mlp.gate.weight": (configured, forms.models.HIDDEN) for layer in range(forms.models.LAYERS)
    }
    specs = [TensorSpec(spec.name, spec.dtype, routers.get(spec.name, spec.shape)) for spec in checkpoint.values()]
    checkpoint = Checkpoint(specs, {**checkpoint.config, "num_experts": configured})
    report = dry_run(checkpoint, Deployment(tp=tp, ep=tp > 1, gpu="h100"), progress=False)
    numbers = {int(cut.tensor.split(".experts.")[1].split(".")[0]) for one in report.stages for cut in one.cuts}
    assert numbers == set(range(configured, experts))
    assert {one.verdict for one in report.stages} == {INCOMPLETE if numbers else LOADS}
    assert len(report.stages) == (tp if numbers else 2)


# --- places, not only elements --------------------------------------------------------------------------------------


def by_block(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each element times the scale of the block that it lies in, as a kernel finds it."""
    grid = scale.repeat_interleave(reports.BLOCK, 0)[: len(weight)].repeat_interleave(reports.BLOCK, 1)
    return weight.float() * grid[:, : weight.shape[1]]


@pytest.mark.parametrize(("inner", "is_right"), [(1152, True), (1120, False)])
def test_a_block_that_gate_and_up_share_has_the_scale_of_one_of_them(inner, is_right, tmp_path):
    """9 blocks of 128, and 8.75."""
    config = reports.LLAMA | {"intermediate_size": inner, "num_hidden_layers": 1}
    tensors = reports.llama(config, linear=reports.fp8)
    config["quantization_config"] = reports.fp8_config(["lm_head"])
    checkpoint = Checkpoint.from_directory(reports.write(tmp_path / "model", tensors, config))
    (tmp_path / "ranks").mkdir()
    report = dry_run(checkpoint, Deployment(gpu="h100"), weights="real", keep=tmp_path / "ranks", progress=False)
    held, at = torch.load(tmp_path / "ranks" / "0-0-0.pt"), "model.layers.0.mlp"
    fused = by_block(*(held[f"{at}.gate_up_proj.{name}"] for name in ("weight", "weight_scale_inv")))
    parts = [
        [tensors[f"{at}.{part}.{name}"] for name in ("weight", "weight_scale_inv")] for part in ("gate_proj", "up_proj")
    ]
    assert torch.equal(fused, torch.cat([by_block(*part) for part in parts])) == is_right
    assert report.stages[0].loads == is_right
    assert report.stages[0].unaccounted == ([] if is_right else [f"{at}.gate_up_proj.weight_scale_inv"])


@pytest.mark.parametrize("inner", [1120, 1152])
def test_blocks_of_what_the_checkpoint_has_fused_are_those_of_the_whole(inner, tmp_path):
    config = reports.LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "intermediate_size": inner}
    config |= {"num_hidden_layers": 1, "pad_token_id": 0, "original_max_position_embeddings": 4096, "head_dim": 32}
    tensors: reports.Tensors = {}
    reports.norms(tensors, "model.layers.0", 256)
    for name, rows, columns in (("qkv_proj", 512, 256), ("o_proj", 256, 256)):
        reports.fp8(tensors, f"model.layers.0.self_attn.{name}", rows, columns)
    for name, rows, columns in (("gate_up_proj", 2 * inner, 256), ("down_proj", 256, inner)):
        reports.fp8(tensors, f"model.layers.0.mlp.{name}", rows, columns)
    reports.ends(tensors, "model", 256)
    config["quantization_config"] = reports.fp8_config(["lm_head"])
    report = dry_run(
        Checkpoint.from_directory(reports.write(tmp_path / "model", tensors, config)), Deployment(gpu="h100"), progress=False
    )
    assert report.stages[0].loads, report.stages[0].left


def test_weights_whose_scales_are_dropped_are_cut_and_no_others(tmp_path):
    """The config says that a layer is not quantised, and the file has it in FP8."""
    config = reports.LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 1}
    tensors = reports.llama(config, linear=reports.fp8)
    reports.norms(tensors, "model.layers.0.self_attn", 64, "q_norm", "k_norm")
    config["quantization_config"] = reports.fp8_config(["lm_head", "model.layers.0.mlp.down_proj"])
    checkpoint = Checkpoint.from_directory(reports.write(tmp_path / "model", tensors, config))
    (stage,) = dry_run(checkpoint, Deployment(gpu="h100"), progress=False).stages
    if stage.verdict == DIES:  # newer releases look the scale up
        assert "weight_scale_inv" in (stage.key or stage.message)
        return
    assert [cut.tensor for cut in stage.cuts] == ["model.layers.0.mlp.down_proj.weight"] and stage.verdict == INCOMPLETE


@pytest.mark.parametrize("gpu", ["h100", "b200", "a100"])
def test_the_last_rank_of_gpt_oss_has_fewer_blocks_and_is_complete(gpu, monkeypatch):
    """9 blocks of 32 over 2 ranks: 5 and 4."""
    sized(monkeypatch, EXPERT=288)
    report = dry_run(forms.quantised("mxfp4", "gpt_oss"), Deployment(tp=2, gpu=gpu), ranks="all", progress=False)
    assert [stage.loads for stage in report.stages] == [True, True], [stage.left for stage in report.stages]


def test_a_bias_of_experts_that_the_checkpoint_lacks_is_absent():
    checkpoint = forms.quantised("mxfp4", "gpt_oss")
    lacks = "model.layers.1.mlp.experts.gate_up_proj_bias"
    assert lacks in checkpoint
    without = Checkpoint([spec for spec in checkpoint.values() if spec.name != lacks], checkpoint.config)
    (stage,) = dry_run(without, Deployment(gpu="h100"), progress=False).stages
    assert [(name.split(".")[2], one.kind) for name, one in stage.left.items()] == [("1", ABSENT)]
