"""bitsandbytes, a library that vLLM calls and does not bring."""

from __future__ import annotations

import math
from functools import partial

from glmpp.dryrun.stage_report import CANNOT_TELL
from quantised.form import NEW, OLD, Format, Refusal, Tensors
from quantised.models import Model


def bitsandbytes_4bit(out: int, size: int) -> Tensors:
    """`Params4bit` with double quantisation: blocks of 64, their scales in blocks of 256."""
    return {
        "weight": ("U8", (out * size // 2, 1)),
        "weight.absmax": ("U8", (out * size // 64,)),
        "weight.nested_absmax": ("F32", (math.ceil(out * size / 64 / 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (87,)),
    }


def bitsandbytes_config(model: Model, bits: int) -> dict:
    return {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [name.rsplit(".", 1)[-1] for name in model.kept],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }


FORMATS: dict[str, Format] = {
    "bitsandbytes, 4 bits": Format(
        "bitsandbytes",
        "bitsandbytes (functional.QuantState.as_dict), transformers' BitsAndBytesConfig; unsloth/Llama-3.1-8B-bnb-4bit",
        bitsandbytes_4bit,
        partial(bitsandbytes_config, bits=4),
    ),
    "bitsandbytes, 8 bits": Format(
        "bitsandbytes",
        "bitsandbytes (nn.Linear8bitLt), transformers' BitsAndBytesConfig",
        lambda out, size: {"weight": ("I8", (out, size)), "SCB": ("F32", (out,)), "weight_format": ("U8", ())},
        partial(bitsandbytes_config, bits=8),
    ),
}

REFUSALS: list[Refusal] = [
    Refusal("Unknown quantization method: bitsandbytes", tuple(FORMATS), releases=NEW),
    Refusal("ImportError: Please install bitsandbytes>=", tuple(FORMATS), releases=OLD, verdict=CANNOT_TELL),
]
