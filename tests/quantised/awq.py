"""AutoAWQ: whole numbers with zero points."""

from __future__ import annotations

from functools import partial

from quantised.form import Format, Refusal, Tensors
from quantised.models import Model


def awq(group: int, out: int, size: int) -> Tensors:
    """AutoAWQ's WQLinear_GEMM: packed along the columns of the transposed weight."""
    return {
        "qweight": ("I32", (size, out // 8)),
        "qzeros": ("I32", (size // group, out // 8)),
        "scales": ("F16", (size // group, out)),
    }


def awq_config(model: Model) -> dict:
    routers = ["gate"] if len(model.kept) > 1 else None
    return {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": routers,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


FORMATS: dict[str, Format] = {
    "awq": Format(
        "awq",
        "AutoAWQ 0.2.9 (awq/modules/linear/gemm.py); Qwen/Qwen2.5-7B-Instruct-AWQ, Qwen/Qwen3-32B-AWQ",
        partial(awq, 128),
        awq_config,
    ),
}

REFUSALS: list[Refusal] = []
