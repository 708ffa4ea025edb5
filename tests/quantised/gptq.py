"""GPTQModel and AutoGPTQ: whole numbers, with the order of activation or without."""

from __future__ import annotations

from functools import partial

from quantised.form import NEW, Format, Refusal, Tensors
from quantised.models import Model


def gptq(bits: int, group: int, out: int, size: int) -> Tensors:
    """GPTQModel's and AutoGPTQ's QuantLinear: packed along the rows of the transposed weight."""
    return {
        "g_idx": ("I32", (size,)),
        "qweight": ("I32", (size * bits // 32, out)),
        "qzeros": ("I32", (size // group, out * bits // 32)),
        "scales": ("F16", (size // group, out)),
    }


def gptq_config(model: Model, bits: int = 4, order: bool = False, symmetric: bool = True) -> dict:
    config = {
        "bits": bits,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": order,
        "group_size": 128,
        "lm_head": False,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
    }
    if len(model.kept) > 1:  # GPTQModel's way to say that the router is not quantised
        config["dynamic"] = {r"-:.*mlp\.gate$": {}}
    return config


FORMATS: dict[str, Format] = {
    "gptq": Format(
        "gptq",
        "AutoGPTQ, GPTQModel; Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4, Qwen/Qwen3-30B-A3B-GPTQ-Int4",
        partial(gptq, 4, 128),
        gptq_config,
    ),
    "gptq, 8 bits": Format(
        "gptq",
        "AutoGPTQ, GPTQModel; Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8",
        partial(gptq, 8, 128),
        partial(gptq_config, bits=8),
    ),
    "gptq, in the order of activation": Format(
        "gptq",
        "AutoGPTQ, desc_act; TheBloke/Llama-2-7B-Chat-GPTQ, branch gptq-4bit-128g-actorder_True",
        partial(gptq, 4, 128),
        partial(gptq_config, order=True),
    ),
}

REFUSALS: list[Refusal] = [
    Refusal(
        "GPTQ group activation ordering (desc_act=True) is no longer supported",
        ("gptq, in the order of activation",),
        releases=NEW,
    ),
]
