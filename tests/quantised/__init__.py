"""Tiny checkpoints in every published way of quantising: names, dtypes, shapes and config.json; no data.

A `Format` turns a linear weight [out, in] into the tensors that its writer stores for it, and gives the entry
`quantization_config` of config.json. Its `source` names what the form was taken from: the program that writes it (name and
release, file) and, where there is one, a public model that has it. A file for each tool holds its formats, and the words in
which vLLM refuses them.
"""

from __future__ import annotations

import copy

from glmpp.checkpoint import Checkpoint, TensorSpec
from quantised import (
    autoround,
    awq,
    bitsandbytes,
    compressed_tensors,
    fbgemm,
    fp8,
    fp_quant,
    gptq,
    modelopt,
    quark,
    torchao,
)
from quantised.form import NEW, OLD, Format, Refusal, Tensors
from quantised.fp8 import fp8_tensor
from quantised.models import MODELS, Model, gpt_oss

__all__ = ["ELSEWHERE", "FORMATS", "MODELS", "NEW", "OLD", "REFUSALS", "Model", "Refusal", "cases", "gpt_oss", "quantised"]
TOOLS = (fp8, compressed_tensors, modelopt, quark, gptq, awq, autoround, fbgemm, bitsandbytes, torchao, fp_quant)
FORMATS: dict[str, Format] = {name: form for tool in TOOLS for name, form in tool.FORMATS.items()}
REFUSALS: list[Refusal] = [refusal for tool in TOOLS for refusal in tool.REFUSALS]

# vLLM's other methods: why there is no checkpoint of their own. What is in FORMATS is read off there.
ELSEWHERE: dict[str, str] = {
    "auto_awq": "reads awq",
    "auto_gptq": "reads gptq",
    "awq_marlin": "reads awq",
    "gptq_marlin": "reads gptq",
    "gpt_oss_mxfp4": "reads mxfp4 of GPT-OSS: `gpt_oss` of the models",
    "mxfp4": "GPT-OSS is its one published checkpoint: `gpt_oss` of the models",
    "moe_wna16": "reads gptq and awq when asked to",
    "humming": "another kernel for the checkpoints of other methods, when asked for",
    "cpu_awq": "reads awq on a CPU",
    "gguf": "a file format of its own, not safetensors",
    "deepseek_v4_fp8": "DeepSeek-V4 alone; its class is part of the sweep",
    "online": "no checkpoint: quantised while an unquantised one is loaded",
    "experts_int8": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_tensor": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_block": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_channel": "no checkpoint: quantised while an unquantised one is loaded",
    "int8_per_channel_weight_only": "no checkpoint: quantised while an unquantised one is loaded",
    "nvfp4_per_token": "no checkpoint: quantised while an unquantised one is loaded",
    "mxfp8": "no checkpoint: quantised while an unquantised one is loaded; as a word in a config it means modelopt_mxfp8",
}


def quantised(form: str, model: str) -> Checkpoint:
    """A checkpoint of a format of FORMATS and a model of MODELS, or of "mxfp4" and "gpt_oss"."""
    if (form, model) == ("mxfp4", "gpt_oss"):
        return gpt_oss()
    chosen, made = FORMATS[form], MODELS[model]()
    specs = [TensorSpec(name, "BF16", shape) for name, shape in made.plain.items()]
    specs += [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in made.kept.items()]
    mixed = chosen.method == "modelopt_mixed"
    for name, (out, size) in made.linears.items():
        if chosen.keeps(name):
            tensors: Tensors = {"weight": ("BF16", (out, size))}
        elif mixed and ".self_attn." in name:
            tensors = fp8_tensor(True, out, size)
        else:
            tensors = chosen.linear(out, size)
        specs += [TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in tensors.items()]
    for name in made.attentions:
        specs += [TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in chosen.cache.items()]
    # A deep copy, for formats that say a part of it twice.
    return Checkpoint(specs, {**made.config, "quantization_config": copy.deepcopy(chosen.config(made))})


def cases() -> list[tuple[str, str]]:
    """Every format with each of its models."""
    return [("mxfp4", "gpt_oss"), *((name, model) for name, form in FORMATS.items() for model in form.models)]
