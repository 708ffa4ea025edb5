"""vLLM's own "fp8": the names of DeepSeek's blocks, and those of AutoFP8."""

from __future__ import annotations

from functools import partial

from quantised.form import Format, Refusal, Tensors, grid, kept
from quantised.models import Model


def fp8_block(scale: str, out: int, size: int) -> Tensors:
    return {"weight": ("F8_E4M3", (out, size)), "weight_scale_inv": (scale, grid(out, size, 128, 128))}


def fp8_block_config(model: Model, **more) -> dict:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [*kept(model), *(name.removesuffix(".weight") for name in model.plain if "norm" in name)],
        **more,
    }


def fp8_tensor(static: bool, out: int, size: int) -> Tensors:
    scales: Tensors = {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", ())}
    return {**scales, "input_scale": ("F32", ())} if static else scales


def fp8_tensor_config(model: Model, scheme: str, **more) -> dict:
    return {"activation_scheme": scheme, "ignored_layers": kept(model), "quant_method": "fp8", **more}


OUTPUT_SCALES: Tensors = {"k_proj.output_scale": ("F32", ()), "v_proj.output_scale": ("F32", ())}


FORMATS: dict[str, Format] = {
    "fp8, blocks": Format(
        "fp8",
        "Qwen/Qwen3-8B-FP8, Qwen/Qwen3-30B-A3B-FP8: scales in BF16",
        partial(fp8_block, "BF16"),
        fp8_block_config,
    ),
    "fp8, blocks of DeepSeek": Format(
        "fp8",
        "deepseek-ai/DeepSeek-V3: scales in F32; convert.py and kernel.py of its inference folder",
        partial(fp8_block, "F32"),
        fp8_block_config,
        models=("deepseek_v3",),
    ),
    "fp8, blocks with rounded scales": Format(
        "fp8",
        "deepseek-ai/DeepSeek-V3.1: scale_fmt says that the scales are powers of two; stored in F32",
        partial(fp8_block, "F32"),
        partial(fp8_block_config, scale_fmt="ue8m0"),
        models=("dense", "moe", "deepseek_v3"),
    ),
    "fp8, tensor": Format(
        "fp8",
        "AutoFP8 (quantize.py), activation_scheme static; neuralmagic/Meta-Llama-3-8B-Instruct-FP8",
        partial(fp8_tensor, True),
        partial(fp8_tensor_config, scheme="static"),
        models=("dense", "moe", "mixtral"),
    ),
    "fp8, tensor, dynamic": Format(
        "fp8",
        "AutoFP8 (quantize.py), activation_scheme dynamic",
        partial(fp8_tensor, False),
        partial(fp8_tensor_config, scheme="dynamic"),
        models=("dense", "moe", "mixtral"),
    ),
    "fp8, tensor, cache": Format(
        "fp8",
        "AutoFP8 (quantize.py), kv_cache_quant_layers; neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV",
        partial(fp8_tensor, True),
        partial(fp8_tensor_config, scheme="static", kv_cache_scheme="static"),
        cache=OUTPUT_SCALES,
    ),
}

REFUSALS: list[Refusal] = []
