"""ModelOpt: hf_quant_config.json as `convert_hf_quant_config_format` turns it into the entry of config.json."""

from __future__ import annotations

import math
from functools import partial

from glmpp.dryrun.stage_report import DIES
from quantised.form import OLD, Format, Refusal, Tensors, kept
from quantised.fp8 import fp8_tensor
from quantised.models import Model


def modelopt(model: Model, algorithm: str, groups: dict | None = None, cache: bool = False, **more) -> dict:
    """What it writes for an algorithm; the newer ones come without groups."""
    config = {
        "ignore": kept(model),
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
        **more,
    }
    if groups is not None:
        config["config_groups"] = groups
    if cache:
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


def group(weights: dict, inputs: dict | None, targets: list[str]) -> dict:
    activations = {} if inputs is None else {"input_activations": {"dynamic": False, **inputs}}
    return {**activations, "weights": {"dynamic": False, **weights}, "targets": targets}


FLOAT8, FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float", "group_size": 16}
OF_FP8 = {"group_0": group(FLOAT8, FLOAT8, ["Linear"])}
OF_NVFP4 = {"group_0": group(FLOAT4, FLOAT4, ["Linear"])}
PROJECTION_SCALES: Tensors = {"k_proj.k_scale": ("F32", ()), "v_proj.v_scale": ("F32", ())}


def nvfp4(inputs: bool, out: int, size: int) -> Tensors:
    tensors: Tensors = {
        "weight": ("U8", (out, size // 2)),
        "weight_scale": ("F8_E4M3", (out, size // 16)),
        "weight_scale_2": ("F32", ()),
    }
    return {**tensors, "input_scale": ("F32", ())} if inputs else tensors


def modelopt_mixed(model: Model) -> dict:
    """Attention in FP8, the rest in NVFP4; every layer is listed."""
    layers = {
        name: {"quant_algo": "FP8"} if ".self_attn." in name else {"quant_algo": "NVFP4", "group_size": 16}
        for name in model.linears
    }
    attention = [name for name in layers if ".self_attn." in name]
    groups = {
        "group_0": group(FLOAT8, FLOAT8, sorted(attention)),
        "group_1": group(FLOAT4, FLOAT4, sorted(layers.keys() - set(attention))),
    }
    return modelopt(model, "MIXED_PRECISION", groups, quantized_layers=layers)


FORMATS: dict[str, Format] = {
    # FP8.
    "modelopt, FP8": Format(
        "modelopt",
        "modelopt 0.47.0 (export/unified_export_hf.py), FP8; nvidia/Llama-3.1-8B-Instruct-FP8 without its KV scales",
        partial(fp8_tensor, True),
        lambda model: modelopt(model, "FP8", OF_FP8),
    ),
    "modelopt, FP8, cache": Format(
        "modelopt",
        "modelopt 0.47.0 (export/quant_utils.py: k_proj.k_scale), FP8 and its KV cache; nvidia/Llama-3.1-8B-Instruct-FP8",
        partial(fp8_tensor, True),
        lambda model: modelopt(model, "FP8", OF_FP8, cache=True),
        cache=PROJECTION_SCALES,
    ),
    "modelopt, FP8 channel": Format(
        "modelopt",
        "modelopt 0.47.0, FP8_PER_CHANNEL_PER_TOKEN: one scale per row, none of the inputs",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out,))},
        lambda model: modelopt(model, "FP8_PER_CHANNEL_PER_TOKEN"),
    ),
    "modelopt, FP8 blocks": Format(
        "modelopt",
        "modelopt 0.47.0, FP8_PB_WO: scales keep the dimensions of the blocks, [rows, 1, columns, 1]",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("F32", (math.ceil(out / 128), 1, math.ceil(size / 128), 1)),
        },
        lambda model: modelopt(model, "FP8_PB_WO"),
    ),
    # Four bits, floating.
    "modelopt, NVFP4": Format(
        "modelopt_fp4",
        "modelopt 0.47.0 (qtensor/nvfp4_tensor.py), NVFP4; nvidia/Llama-3.3-70B-Instruct-FP4, nvidia/Qwen3-30B-A3B-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4),
        models=("dense", "moe", "mixtral"),
    ),
    "modelopt, NVFP4, cache": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, NVFP4 with an FP8 KV cache; nvidia/Llama-3.1-8B-Instruct-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4, cache=True),
        cache=PROJECTION_SCALES,
    ),
    "modelopt, NVFP4 of DeepSeek": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, NVFP4 with attention left in BF16; nvidia/DeepSeek-R1-0528-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4, ignore=[*kept(model), *(f"{name}*" for name in model.attentions)]),
        keeps=lambda name: ".self_attn." in name,
        models=("deepseek_v3",),
    ),
    "modelopt, NVFP4 weights": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, W4A16_NVFP4: no scale of the inputs",
        partial(nvfp4, False),
        lambda model: modelopt(model, "W4A16_NVFP4", {"group_0": group(FLOAT4, None, ["Linear"])}),
    ),
    "modelopt, mixed": Format(
        "modelopt_mixed",
        "modelopt 0.47.0 (export/convert_hf_config.py), MIXED_PRECISION: FP8 attention, NVFP4 elsewhere",
        partial(nvfp4, True),
        modelopt_mixed,
    ),
    # Eight bits in blocks of 32.
    "modelopt, MXFP8": Format(
        "modelopt_mxfp8",
        "modelopt 0.47.0 (qtensor/mxfp8_tensor.py), MXFP8: scales E8M0 in U8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: modelopt(model, "MXFP8"),
    ),
}

OF_EIGHT_BITS = ("modelopt, FP8", "modelopt, FP8, cache", "modelopt, FP8 channel", "modelopt, FP8 blocks")
REFUSALS: list[Refusal] = [
    Refusal(
        "quantization method modelopt is not supported for the current GPU. Minimum capability: 89. Current capability: 80",
        OF_EIGHT_BITS,
        gpus=("a100",),
        releases=OLD,
    ),
    Refusal(
        "modelopt_mixed is not supported for the current GPU. Minimum capability: 89. Current capability: 80",
        ("modelopt, mixed",),
        gpus=("a100",),
        releases=OLD,
    ),
    # Not refused: an expert of ModelOpt's has one scale for each matrix in vLLM, whatever the algorithm; more are a death.
    Refusal("RuntimeError: ", ("modelopt, FP8 channel", "modelopt, FP8 blocks"), ("moe",), verdict=DIES),
]
