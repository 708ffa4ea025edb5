"""compressed-tensors: the presets of its quant_scheme.py, compressed by its compressors, as llm-compressor saves them."""

from __future__ import annotations

from functools import partial

from quantised.form import NEW, OLD, Format, Refusal, Tensors, grid, kept
from quantised.models import Model


def args(bits: int, kind: str, strategy: str, dynamic: bool | str = False, **more) -> dict:
    """One QuantizationArgs as it is written to config.json."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": bits,
        "observer": None if dynamic is True else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
        **more,
    }


def compressed(model: Model, form: str, weights: dict, inputs: dict | None = None, cache: dict | None = None) -> dict:
    group = {
        "format": form,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": kept(model),
        "kv_cache_scheme": cache,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",
    }


def packed(
    bits: int, group: int | None, out: int, size: int, zero_point: bool = False, order: bool = False, scale: str = "BF16"
) -> Tensors:
    """Integers in I32 along the columns (`pack_to_int32`); zero points along the rows."""
    groups = 1 if group is None else size // group
    tensors: Tensors = {
        "weight_packed": ("I32", (out, size * bits // 32)),
        "weight_scale": (scale, (out, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if zero_point:
        tensors["weight_zero_point"] = ("I32", (out * bits // 32, groups))
    if order:
        tensors["weight_g_idx"] = ("I32", (size,))
    return tensors


FP8_CACHE = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
ATTENTION_SCALES: Tensors = {"k_scale": ("BF16", (1,)), "v_scale": ("BF16", (1,))}
NVFP4 = partial(args, 4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
MX4 = partial(args, 4, "float", "group", group_size=32, scale_dtype="torch.uint8")
MX8 = partial(args, 8, "float", "group", group_size=32, scale_dtype="torch.uint8")
TOKEN8 = args(8, "int", "token", True)
TOKEN_FP8 = args(8, "float", "token", True)


FORMATS: dict[str, Format] = {
    # FP8.
    "compressed-tensors, FP8 tensor": Format(
        "compressed-tensors",
        "preset FP8, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("BF16", (1,)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(model, "float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor")),
    ),
    "compressed-tensors, FP8 channel": Format(
        "compressed-tensors",
        "preset FP8_DYNAMIC, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "float-quantized", args(8, "float", "channel"), TOKEN_FP8),
        models=("dense", "moe", "mixtral", "deepseek_v3"),
    ),
    "compressed-tensors, FP8 blocks": Format(
        "compressed-tensors",
        "preset FP8_BLOCK, naive_quantized; RedHatAI/Qwen3-8B-FP8-block",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", grid(out, size, 128, 128))},
        lambda model: compressed(
            model,
            "float-quantized",
            args(8, "float", "block", block_structure=[128, 128]),
            args(8, "float", "group", True, group_size=128),
        ),
    ),
    "compressed-tensors, FP8 weights": Format(
        "compressed-tensors",
        "FP8_DYNAMIC without input_activations, naive_quantized (W8A16)",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "float-quantized", args(8, "float", "channel")),
    ),
    "compressed-tensors, FP8 tensor, cache": Format(
        "compressed-tensors",
        "preset FP8 with kv_cache_scheme; RedHatAI/Llama-3.3-70B-Instruct-FP8-KV",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("BF16", (1,)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(
            model, "float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor"), FP8_CACHE
        ),
        cache=ATTENTION_SCALES,
    ),
    # Four bits, floating.
    "compressed-tensors, NVFP4": Format(
        "compressed-tensors",
        "preset NVFP4, compressors/nvfp4; RedHatAI/Qwen3-30B-A3B-NVFP4, RedHatAI/Llama-3.1-8B-Instruct-NVFP4",
        lambda out, size: {
            "weight_packed": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_global_scale": ("F32", (1,)),
            "input_global_scale": ("F32", (1,)),
        },
        lambda model: compressed(model, "nvfp4-pack-quantized", NVFP4(), NVFP4("local")),
    ),
    "compressed-tensors, NVFP4 weights": Format(
        "compressed-tensors",
        "preset NVFP4A16, compressors/nvfp4; RedHatAI/Llama-3.1-8B-Instruct-NVFP4A16",
        lambda out, size: {
            "weight_packed": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_global_scale": ("F32", (1,)),
        },
        lambda model: compressed(model, "nvfp4-pack-quantized", NVFP4()),
    ),
    "compressed-tensors, MXFP4": Format(
        "compressed-tensors",
        "preset MXFP4, compressors/mxfp4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4(), MX4(True)),
    ),
    "compressed-tensors, MXFP4 weights": Format(
        "compressed-tensors",
        "preset MXFP4A16, compressors/mxfp4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4()),
    ),
    "compressed-tensors, MXFP4, FP8 inputs": Format(
        "compressed-tensors",
        "MXFP4 weights of preset MXFP4, inputs of preset FP8_DYNAMIC (W4A8)",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4(), TOKEN_FP8),
    ),
    # Eight bits in blocks of 32.
    "compressed-tensors, MXFP8": Format(
        "compressed-tensors",
        "preset MXFP8, compressors/mxfp8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp8-quantized", MX8(), MX8(True)),
    ),
    # Four and eight bits, whole numbers.
    "compressed-tensors, W4A16": Format(
        "compressed-tensors",
        "preset W4A16, compressors/pack_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128)),
        models=("dense", "moe", "mixtral"),
    ),
    "compressed-tensors, W4A16 of Kimi": Format(
        "compressed-tensors",
        "moonshotai/Kimi-K2-Thinking: the routed experts alone, in groups of 32",
        partial(packed, 4, 32),
        lambda model: {
            **compressed(model, "pack-quantized", args(4, "int", "group", group_size=32)),
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        },
        keeps=lambda name: ".experts." not in name,
        models=("deepseek_v3",),
    ),
    "compressed-tensors, W4A16 channel": Format(
        "compressed-tensors",
        "W4A16 with strategy channel, compressors/pack_quantized",
        partial(packed, 4, None),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "channel")),
    ),
    "compressed-tensors, W4A16 with zero points": Format(
        "compressed-tensors",
        "preset W4A16_ASYM, compressors/pack_quantized, as llm-compressor's AWQModifier saves it",
        partial(packed, 4, 128, zero_point=True),
        lambda model: compressed(
            model,
            "pack-quantized",
            args(4, "int", "group", group_size=128, symmetric=False, zp_dtype="torch.int8"),
        ),
    ),
    "compressed-tensors, W4A16 in the order of activation": Format(
        "compressed-tensors",
        "preset W4A16 with actorder group (llm-compressor's GPTQModifier): weight_g_idx",
        partial(packed, 4, 128, order=True),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128, actorder="group")),
    ),
    "compressed-tensors, W8A16": Format(
        "compressed-tensors",
        "preset W8A16, compressors/pack_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a16",
        partial(packed, 8, 128),
        lambda model: compressed(model, "pack-quantized", args(8, "int", "group", group_size=128)),
    ),
    "compressed-tensors, W4A8 FP8": Format(
        "compressed-tensors",
        "preset W4AFP8, compressors/pack_quantized",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128), TOKEN_FP8),
    ),
    "compressed-tensors, W4A8 int": Format(
        "compressed-tensors",
        "preset W4A8, compressors/pack_quantized",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128), TOKEN8),
    ),
    "compressed-tensors, W8A8 int8": Format(
        "compressed-tensors",
        "preset W8A8, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        lambda out, size: {"weight": ("I8", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "int-quantized", args(8, "int", "channel"), TOKEN8),
    ),
    "compressed-tensors, W8A8 int8, static": Format(
        "compressed-tensors",
        "W8A8 with static inputs per tensor, naive_quantized",
        lambda out, size: {
            "weight": ("I8", (out, size)),
            "weight_scale": ("BF16", (out, 1)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(model, "int-quantized", args(8, "int", "channel"), args(8, "int", "tensor")),
    ),
}

REFUSALS: list[Refusal] = [
    Refusal(
        "To apply FP8 Marlin on high-capability GPUs",
        ("compressed-tensors, FP8 weights",),
        gpus=("h100", "b200"),
        releases=OLD,
    ),
    Refusal("No compressed-tensors compatible scheme was found", ("compressed-tensors, W4A8 FP8",), gpus=("a100", "b200")),
    Refusal(
        "No compressed-tensors compatible scheme was found",
        ("compressed-tensors, W4A8 int",),
        gpus=("a100", "b200"),
        releases=OLD,
    ),
    Refusal(
        "group/dynamic activation ordering (actorder='group') is no longer supported",
        ("compressed-tensors, W4A16 in the order of activation",),
        releases=NEW,
    ),
    Refusal("For Fused MoE layers, only format: ", ("compressed-tensors, FP8 weights",), ("moe",), releases=NEW),
    Refusal("For Fused MoE layers, only format: ", ("compressed-tensors, FP8 weights",), ("moe",), ("a100",), OLD),
    Refusal("Unsupported FusedMoe scheme", ("compressed-tensors, W8A8 int8, static",), ("moe",)),
    Refusal("W4A8 Int8 MoE is only supported on CPU", ("compressed-tensors, W4A8 int",), ("moe",), releases=NEW),
    Refusal(
        "Only symmetric quantization is supported for MoE",
        ("compressed-tensors, W4A16 with zero points",),
        ("moe",),
        releases=("0.22.1",),
    ),
    # These two say nothing: a kernel that wants groups, and one that wants 4 bits.
    Refusal("AssertionError: ", ("compressed-tensors, W4A16 channel",), ("moe",), ("h100",), NEW),
    Refusal("AssertionError: ", ("compressed-tensors, W8A16",), ("moe",), releases=("0.23.0",)),
]
