"""What may stay at init: the parameters that no checkpoint has to hold, and why. What may not is sorted in `losses`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from glmpp.serving.stage_filter import is_drafter

# Parameters of an MTP drafter that its checkpoint need not hold, and where vLLM takes them from after loading
# (`vllm/v1/spec_decode/llm_base_proposer.py` in 0.22.1).
SHARED_BY_DRAFTER = {
    "shared_head.head.weight": "the main model's lm_head, shared after loading",
    "model.embed_tokens.weight": "the main model's embedding, shared after loading",
}


def accounted(left: Iterable[str], model: torch.nn.Module, model_config: ModelConfig) -> dict[str, str]:
    """Of the parameters left at init those that no checkpoint has to hold -> why."""
    why = {}
    modules = dict(model.named_modules())
    for name in left:
        path, _, leaf = name.rpartition(".")
        if reason := optional(modules[path], leaf):
            why[name] = reason
        elif is_drafter(model_config):
            why.update((name, reason) for suffix, reason in SHARED_BY_DRAFTER.items() if name.endswith(suffix))
    return why


def optional(module: torch.nn.Module, leaf: str) -> str | None:
    """Why a checkpoint need not hold a module's parameter; None if it must.

    Source: create_weights and process_weights_after_loading of vLLM's quantisation methods, 0.22.1 to 0.33.0.
    """
    method = getattr(module, "quant_method", None)
    if isinstance(method, BaseKVCacheMethod):
        return "a scale of the KV cache, 1 unless the checkpoint has one"
    if leaf.endswith("_g_idx_sort_indices"):
        return "made after loading, from the order of activation"
    if leaf.endswith("_weight_chan_scale"):
        return "made after loading, from the scales of the groups"
    if leaf.endswith("_weight_g_idx") and getattr(method, "actorder", None) != "group":
        return "the order of activation, which this checkpoint does without"
    if leaf.endswith(("input_scale", "input_global_scale")) and is_weight_only_nvfp4(method):
        return "a scale of inputs that are not quantised"
    if leaf == "g_idx" and getattr(getattr(method, "quant_config", None), "desc_act", None) is False:
        return "the order of activation, which this checkpoint does without"
    takes_away = type(method).__module__.endswith(".auto_gptq")  # others go on with what lies there
    if takes_away and leaf in ("w13_bias", "w2_bias") and leaf not in getattr(module, "_loaded_expert_biases", {leaf}):
        return "taken away after loading unless the checkpoint has one"
    return None


def is_weight_only_nvfp4(method: object) -> bool:
    """Whether a method of NVFP4 leaves the inputs of its layer as they are; vLLM has a place for their scale even so."""
    spec = getattr(method, "spec", None)
    return (
        getattr(method, "use_a16", False)  # experts
        or "W4A16" in type(method).__name__  # linear layers before 0.33
        or (spec is not None and getattr(spec, "activation", True) is None)
        or getattr(getattr(method, "nvfp4_backend", None), "name", "") == "MARLIN"  # multiplies in BF16
    )


def quantises_online(model: torch.nn.Module) -> bool:
    """Whether vLLM replaces parameters while it loads (`--quantization fp8` on a BF16 checkpoint)."""
    return any(getattr(getattr(m, "quant_method", None), "uses_meta_device", False) for m in model.modules())
