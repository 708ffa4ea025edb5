"""What is read from a model that vLLM has built: the kernels that it chose, and what its layers hand each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from enum import Enum
from typing import Any

import torch
from vllm.model_executor.models.utils import PPMissingLayer

from glmpp.dryrun.messages import Holder
from glmpp.serving.read_tracking import storage_of

KERNELS, METHODS = "vllm.model_executor.kernels.", "vllm.model_executor.layers.quantization."


def selected_kernels(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Number of layers for each choice, by vLLM's own names.

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


def layer_list(model: torch.nn.Module, num_layers: int) -> dict[str, torch.nn.Module | None]:
    """The main layers by what their names begin with, None for those of other stages; {} if a model has no such list."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return {f"{path}.{at}.": None if isinstance(one, PPMissingLayer) else one for at, one in enumerate(module)}
    return {}


def carried(model: torch.nn.Module, num_layers: int) -> dict[str, dict[int, list[Holder]]]:
    """Tensors of several places of a model that are no parameter and no buffer -> main layer -> modules that refer to them.

    One layer writes such a tensor and a later one reads it: it is handed on beside the hidden states. A layer that computes
    it has a module more that refers to it than one that reads it alone, which otherwise has modules like its own.
    """
    layers = layer_list(model, num_layers).values()
    place = {id(module): at for at, layer in enumerate(layers) if layer is not None for module in layer.modules()}
    held: dict[int, dict[int | None, list[torch.nn.Module]]] = defaultdict(lambda: defaultdict(list))
    names: dict[int, str] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and (storage := storage_of(value)) is not None:
                held[storage][place.get(id(module))].append(module)
                names.setdefault(storage, name)
    found: dict[str, dict[int, list[Holder]]] = {}
    for storage, modules in held.items():
        if len(modules) > 1:
            found[names[storage]] = {at: [*map(_holder, those)] for at, those in modules.items() if at is not None}
    return found


def _holder(module: torch.nn.Module) -> Holder:
    return Holder(type(module).__name__, {name: value for name, value in vars(module).items() if type(value) is int})
