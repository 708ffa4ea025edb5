"""What vLLM chose for a model that it has built: attention backends, kernels of the linear layers, MoE backends.

Names are vLLM's own. Nothing is chosen here: what is there is read from the built modules.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any

import torch

KERNELS, METHODS = "vllm.model_executor.kernels.", "vllm.model_executor.layers.quantization."


def selected_kernels(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Number of layers for each choice.

    Returns:
        attention: name of the backend, e.g. "FLASHMLA_SPARSE".
        linear: method or scheme of quantisation, and the kernel if it has one:
            "Fp8LinearMethod: CutlassFp8BlockScaledMMKernel", "UnquantizedLinearMethod".
        moe: method, and its backend or its class of experts: "Fp8MoEMethod: DEEPGEMM".
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase

    found: dict[str, Counter] = {"attention": Counter(), "linear": Counter(), "moe": Counter()}
    for module in model.modules():
        if isinstance(module, AttentionLayerBase):
            found["attention"][module.get_attn_backend().get_name()] += 1
        method = vars(module).get("quant_method")
        if isinstance(method, LinearMethodBase):
            scheme = vars(module).get("scheme") or vars(method).get("scheme") or method
            found["linear"][_said(scheme, _kernel(scheme))] += 1
        elif isinstance(method, FusedMoEMethodBase):
            found["moe"][_said(method, _moe_backend(method))] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}


def _said(method: Any, choice: str | None) -> str:
    name = type(method).__name__
    return name if choice is None else f"{name}: {choice}"


def _kernel(method: Any, depth: int = 3) -> str | None:
    """The class of the kernel object that a method or a scheme holds, or what it passes the work on to."""
    held = [one for one in vars(method).values() if hasattr(one, "__dict__")]
    for one in held:
        if type(one).__module__.startswith(KERNELS):
            return type(one).__name__
    inner = (one for one in held if type(one).__module__.startswith(METHODS) and not isinstance(one, (type, Enum)))
    return next(filter(None, (_kernel(one, depth - 1) for one in inner)), None) if depth else None


def _moe_backend(method: Any) -> str | None:
    """The name in the enumeration of backends that the method chose from; otherwise the class of its experts."""
    for one in vars(method).values():
        if isinstance(one, Enum) and type(one).__name__.endswith("Backend"):
            return one.name
    return getattr(vars(method).get("experts_cls"), "__name__", None)
