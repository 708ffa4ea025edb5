"""What may stay at init: the parameters that no checkpoint has to hold, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from glmpp.engine.selection import is_drafter

# Parameters of an MTP drafter that its checkpoint need not hold, and where vLLM takes them from after loading
# (`vllm/v1/spec_decode/llm_base_proposer.py` in 0.22.1).
SHARED_BY_DRAFTER = {
    "shared_head.head.weight": "the main model's lm_head, shared after loading",
    "model.embed_tokens.weight": "the main model's embedding, shared after loading",
}


def accounted(left: Iterable[str], model: torch.nn.Module, model_config: ModelConfig) -> dict[str, str]:
    """Of the parameters left at init those that no checkpoint has to hold -> why."""
    why = {}
    scales = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for name, _ in module.named_parameters()
    }
    for name in left:
        if name in scales:
            why[name] = "a scale of the KV cache, 1 unless the checkpoint has one"
        elif is_drafter(model_config):
            why.update((name, reason) for suffix, reason in SHARED_BY_DRAFTER.items() if name.endswith(suffix))
    return why


def quantises_online(model: torch.nn.Module) -> bool:
    """Whether vLLM replaces parameters while it loads (`--quantization fp8` on a BF16 checkpoint)."""
    return any(getattr(getattr(m, "quant_method", None), "uses_meta_device", False) for m in model.modules())
