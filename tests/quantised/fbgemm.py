"""FBGEMM, as transformers' integration saves it."""

from __future__ import annotations

from quantised.form import Format, Refusal, kept

FORMATS: dict[str, Format] = {
    "fbgemm, FP8": Format(
        "fbgemm_fp8",
        "transformers' FbgemmFp8Config and integrations/fbgemm_fp8.py; meta-llama/Llama-3.1-405B-Instruct-FP8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out, 1))},
        lambda model: {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": [*kept(model), *(name for name in model.linears if ".self_attn." in name)],
            "quant_method": "fbgemm_fp8",
        },
        keeps=lambda name: ".self_attn." in name,
    ),
}

REFUSALS: list[Refusal] = [
    Refusal("is deprecated and will be removed in future versions of vLLM", ("fbgemm, FP8",)),
]
