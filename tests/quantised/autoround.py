"""AutoRound: the forms of others under a config of its own."""

from __future__ import annotations

from functools import partial

from quantised.awq import awq
from quantised.form import NEW, OLD, Format, Refusal, grid
from quantised.gptq import gptq
from quantised.models import Model


def autoround(model: Model, form: str, **more) -> dict:
    return {
        "autoround_version": "0.16.1",
        "bits": 4,
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in model.kept if name != "lm_head"},
        "group_size": 128,
        "packing_format": form,
        "quant_method": "auto-round",
        "sym": True,
        **more,
    }


FORMATS: dict[str, Format] = {
    # Four bits, floating.
    "autoround, MXFP4": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/qlinear_fp.py), MXFP4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: autoround(
            model,
            "auto_round:llm_compressor",
            data_type="mx_fp",
            group_size=32,
            act_bits=4,
            act_data_type="mx_fp",
            act_dynamic=True,
            act_group_size=32,
            act_sym=True,
        ),
    ),
    # Eight bits in blocks of 32.
    "autoround, MXFP8": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/qlinear_fp.py), MXFP8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: autoround(
            model,
            "auto_round:llm_compressor",
            bits=8,
            data_type="mx_fp",
            group_size=32,
            act_bits=8,
            act_data_type="mx_fp",
            act_dynamic=True,
            act_group_size=32,
            act_sym=True,
        ),
    ),
    "autoround, FP8 blocks": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/export_to_fp8.py: FP8BlockQLinear)",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale_inv": ("BF16", grid(out, size, 128, 128))},
        lambda model: autoround(
            model,
            "auto_round:fp8",
            activation_scheme="dynamic",
            bits=8,
            data_type="fp",
            fmt="e4m3",
            group_size=[128, 128],
            act_bits=8,
            act_data_type="fp",
            act_dynamic=True,
            act_group_size=128,
            act_sym=True,
        ),
    ),
    # Four and eight bits, whole numbers.
    "autoround": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/export.py), auto_round:auto_gptq; Intel/Qwen3-30B-A3B-int4-AutoRound",
        partial(gptq, 4, 128),
        partial(autoround, form="auto_round:auto_gptq"),
    ),
    "autoround, as awq": Format(
        "inc",
        "auto-round 0.16.1 (export_to_awq), auto_round:auto_awq",
        partial(awq, 128),
        partial(autoround, form="auto_round:auto_awq", sym=False),
    ),
}

REFUSALS: list[Refusal] = [
    Refusal("Unsupported data_type: mx_fp", ("autoround, MXFP4", "autoround, MXFP8"), releases=OLD),
    Refusal("Unsupported data_type: fp", ("autoround, FP8 blocks",), releases=OLD),
    Refusal("INCFp8Scheme does not support MoE layers", ("autoround, FP8 blocks",), ("moe",), releases=NEW),
]
