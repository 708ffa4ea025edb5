"""Quark: `QConfig.to_dict`, with `export` as its exporter adds it."""

from __future__ import annotations

from functools import partial

from quantised.form import NEW, OLD, Format, Refusal, grid, kept
from quantised.fp8 import OUTPUT_SCALES, fp8_tensor
from quantised.models import Model


def tensor_config(dtype: str, scheme: str, dynamic: bool = False, **more) -> dict:
    """One QTensorConfig as it is written to config.json."""
    return {
        "dtype": dtype,
        "is_dynamic": dynamic,
        "qscheme": scheme,
        "ch_axis": None,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerTensorMinMaxObserver",
        "is_scale_quant": False,
        **more,
    }


def quark(model: Model, weight: dict | list, inputs: dict | list | None, cache: bool = False) -> dict:
    everywhere = {
        "input_tensors": inputs,
        "output_tensors": None,
        "weight": weight,
        "bias": None,
        "target_device": None,
    }
    of_cache = {**everywhere, "output_tensors": tensor_config("fp8_e4m3", "per_tensor")}
    cached = ["*k_proj", "*v_proj"] if cache else []
    return {
        "algo_config": None,
        "exclude": kept(model),
        "export": {
            "kv_cache_group": cached,
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": everywhere,
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {name: of_cache for name in cached},
        "layer_quant_config": {name: of_cache for name in cached},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": "0.13",
    }


E4M3 = partial(tensor_config, "fp8_e4m3")
MX = {"ch_axis": -1, "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even", "symmetric": None}
MX_FP4 = partial(tensor_config, "fp4", "per_group", **MX)


FORMATS: dict[str, Format] = {
    # FP8.
    "quark, FP8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), FP8E4M3PerTensorSpec; amd/Llama-3.1-8B-Instruct-FP8-KV without its KV scales",
        partial(fp8_tensor, True),
        lambda model: quark(model, E4M3("per_tensor"), E4M3("per_tensor")),
        models=("dense", "moe", "mixtral"),
    ),
    "quark, FP8, cache": Format(
        "quark",
        "amd-quark 0.13 (torch/export), kv_cache_group; amd/Llama-3.1-8B-Instruct-FP8-KV",
        partial(fp8_tensor, True),
        lambda model: quark(model, E4M3("per_tensor"), E4M3("per_tensor"), cache=True),
        cache=OUTPUT_SCALES,
    ),
    "quark, FP8 channel": Format(
        "quark",
        "amd-quark 0.13 (torch/export), ptpc_fp8: per channel, inputs per token",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out,))},
        lambda model: quark(model, E4M3("per_channel", ch_axis=0), E4M3("per_channel", True, ch_axis=1)),
    ),
    "quark, FP8 blocks": Format(
        "quark",
        "amd-quark 0.13 (torch/export), FP8E4M3PerBlockSpec with inputs per group of 128",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", grid(out, size, 128, 128))},
        lambda model: quark(
            model,
            E4M3("per_block", ch_axis=-1, block_size=[128, 128]),
            E4M3("per_group", True, ch_axis=-1, group_size=128),
        ),
    ),
    # Four bits, floating.
    "quark, NVFP4": Format(
        "quark",
        "amd-quark 0.13 (torch/export), NVFP4: two stages, of which the scales of the second are named _2",
        lambda out, size: {
            "weight": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_scale_2": ("F32", ()),
            "input_scale_2": ("F32", ()),
        },
        lambda model: quark(
            model,
            [tensor_config("fp4", "per_group", ch_axis=-1, group_size=16), E4M3("per_tensor", is_scale_quant=True)],
            [tensor_config("fp4", "per_group", True, ch_axis=-1, group_size=16), E4M3("per_tensor", is_scale_quant=True)],
        ),
    ),
    "quark, MXFP4": Format(
        "quark",
        "amd-quark 0.13 (torch/export), OCP_MXFP4Spec; amd/DeepSeek-R1-0528-MXFP4-Preview",
        lambda out, size: {"weight": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: quark(model, MX_FP4(), MX_FP4(True)),
    ),
    # Eight bits in blocks of 32.
    "quark, MXFP8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), OCP_MXFP8E4M3Spec",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: quark(
            model, tensor_config("fp8_e4m3", "per_group", **MX), tensor_config("fp8_e4m3", "per_group", True, **MX)
        ),
    ),
    # Four and eight bits, whole numbers.
    "quark, int8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), Int8PerTensorSpec weights and static inputs",
        lambda out, size: {
            "weight": ("I8", (out, size)),
            "weight_scale": ("F32", ()),
            "weight_zero_point": ("I32", ()),
            "input_scale": ("F32", ()),
            "input_zero_point": ("I32", ()),
        },
        lambda model: quark(model, tensor_config("int8", "per_tensor"), tensor_config("int8", "per_tensor")),
    ),
    "quark, int4 weights": Format(
        "quark",
        "amd-quark 0.13 (torch/export), Int4PerGroupSpec, pack_method reorder",
        lambda out, size: {
            "weight": ("I32", (size, out // 8)),
            "weight_scale": ("BF16", (size // 128, out)),
            "weight_zero_point": ("I32", (size // 128, out // 8)),
        },
        lambda model: quark(model, tensor_config("int4", "per_group", ch_axis=-1, group_size=128), None),
    ),
}

OF_EIGHT_BITS = ("quark, FP8", "quark, FP8, cache", "quark, FP8 channel", "quark, FP8 blocks")
REFUSALS: list[Refusal] = [
    Refusal(
        "Quantization scheme is not supported for the current GPU. Min capability: 89. Current capability: 80",
        OF_EIGHT_BITS,
        gpus=("a100",),
        releases=NEW,
    ),
    Refusal("No quark compatible scheme was found", OF_EIGHT_BITS, gpus=("a100",), releases=OLD),
    Refusal(
        "No quark compatible scheme was found", ("quark, FP8 blocks", "quark, MXFP8", "quark, int4 weights"), releases=OLD
    ),
    Refusal("No MXFP4 MoE backend supports the deployment", ("quark, MXFP4",), ("moe",), releases=OLD),
]
