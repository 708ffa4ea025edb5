"""FP-Quant."""

from __future__ import annotations

from quantised.form import Format, Refusal, Tensors


def fp_quant(out: int, size: int) -> Tensors:
    """FPQuant's FPQuantLinear in NVFP4 after `pre_forward`."""
    return {
        "act_global_scale": ("F32", (1,)),
        "backward_hadamard_matrix": ("BF16", (16, 16)),
        "forward_hadamard_matrix": ("BF16", (16, 16)),
        "qweight": ("U8", (out, size // 2)),
        "scales": ("U8", (out, size // 16)),
        "weight_global_scale": ("F32", (1,)),
    }


FORMATS: dict[str, Format] = {
    "fp_quant, NVFP4": Format(
        "fp_quant",
        "fp_quant 0.3.2 (module/linear.py), transformers' FPQuantConfig; ISTA-DASLab's models",
        fp_quant,
        lambda model: {
            "backward_dtype": "bf16",
            "forward_dtype": "nvfp4",
            "forward_method": "abs_max",
            "hadamard_group_size": 16,
            "modules_to_not_convert": [name.rsplit(".", 1)[-1] for name in model.kept],
            "pseudoquantization": False,
            "quant_method": "fp_quant",
            "store_master_weights": False,
            "transform_init": "hadamard",
        },
    ),
}

REFUSALS: list[Refusal] = [
    Refusal("is deprecated and will be removed in future versions of vLLM", ("fp_quant, NVFP4",)),
]
