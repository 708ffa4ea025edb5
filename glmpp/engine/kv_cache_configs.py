"""vLLM's plan of the KV cache: from the layers of every worker, and the bytes that each has for them, to blocks."""

from __future__ import annotations

import importlib
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils

# From 0.3x on it is made in two steps, of which the first also wants to know in which order blocks lie in memory.
PLANNING = "vllm.v1.core.kv_cache_planning"


def kv_cache_configs(config: VllmConfig, specs: list[dict[str, Any]], available: list[int]) -> list[Any]:
    """vLLM's `KVCacheConfig` of each worker.

    Args:
        specs: of each worker, layer -> what it keeps for a token.
        available: bytes of each worker.
    """
    if hasattr(kv_cache_utils, "get_kv_cache_configs"):
        return kv_cache_utils.get_kv_cache_configs(config, specs, available)
    planning = importlib.import_module(PLANNING)
    importlib.import_module("vllm.v1.core.single_type_kv_cache_manager").register_all_kvcache_specs(config)
    layouts, workers = map(importlib.import_module, ("vllm.v1.attention.backends.utils", "vllm.v1.worker.worker_base"))
    supported = layouts.get_supported_kv_cache_layouts(workers.get_current_attn_backends(config))
    names = [layout.name for layout in supported]
    layouts.resolve_kv_cache_layout(config, [names] * len(specs), [spec for one in specs for spec in one.values()])
    groups = planning.get_global_kv_cache_groups(config, specs)
    return planning.get_kv_cache_configs(config, specs, available, groups)
