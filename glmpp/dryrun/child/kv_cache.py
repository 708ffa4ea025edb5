"""vLLM's plan of a rank's KV cache: what one block takes, and how many of them a request needs.

Nothing else of the kit needs what is imported here: where vLLM has moved a name of it, verdicts do without.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from glmpp.dryrun.child.build import Built, ModelBuilder
from glmpp.dryrun.fit import KVCache
from glmpp.dryrun.messages import Run

ANY_LENGTH = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
PLENTY = 1 << 60  # bytes: more than the square of any block's, so that a quotient gives the block's bytes exactly
# From 0.3x on the plan is made in two steps, of which the first also wants to know in which order blocks lie in memory.
PLANNING = "vllm.v1.core.kv_cache_planning"


def serving(builder: ModelBuilder, run: Run, built: Built, context: int | None) -> VllmConfig:
    """A built model's config as a server has it: models are built for a nominal context and nobody's use.

    Layers go on reading the cache config that they were built with, so that is brought up to date.

    Raises:
        Exception: vLLM refuses a context that is longer than the model's, in its words.
    """
    allowed = os.environ.pop(ANY_LENGTH, None)  # of a nominal length: this one is meant
    try:
        served = builder.vllm_config(run, context, usage_context=UsageContext.OPENAI_API_SERVER)
    finally:
        if allowed is not None:
            os.environ[ANY_LENGTH] = allowed
    config = built.config
    config.model_config, config.scheduler_config = served.model_config, served.scheduler_config
    vars(config.cache_config).update(vars(served.cache_config))
    return config


def kv_cache(config: VllmConfig, layers: list[str]) -> KVCache | None:
    """What one block of the KV cache takes on this rank, and how many of them a request of the longest context needs.

    vLLM makes the blocks of all layers together one pool, whatever their kinds, and gives every rank as many blocks as the
    rank with the least memory has. Hybrid models: vLLM groups the layers of all stages, here it is shown one stage's.

    Args:
        layers: what the names in each main layer begin with.

    Returns:
        None for a rank without attention layers.
    """
    with set_current_vllm_config(config):
        current_platform.update_block_size_for_backend(config)  # as the workers do once the model is loaded
        specs = get_kv_cache_spec(config)
        if not specs:
            return None
        (cache,) = kv_cache_configs(config, [specs], [PLENTY])
        requests = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, cache)
    pages = [sum(spec.page_size_bytes for name, spec in specs.items() if name.startswith(layer)) for layer in layers]
    return KVCache(
        caches=len(specs),
        pages=tuple(pages),
        block_bytes=PLENTY // cache.num_blocks,
        blocks_per_request=round(cache.num_blocks / requests),
        context=config.model_config.max_model_len,
        dtype=config.cache_config.cache_dtype,
    )


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
    layouts = importlib.import_module("vllm.v1.attention.backends.utils")
    workers = importlib.import_module("vllm.v1.worker.worker_base")
    supported = layouts.get_supported_kv_cache_layouts(workers.get_current_attn_backends(config))
    names = [layout.name for layout in supported]
    layouts.resolve_kv_cache_layout(config, [names] * len(specs), [spec for one in specs for spec in one.values()])
    groups = planning.get_global_kv_cache_groups(config, specs)
    return planning.get_kv_cache_configs(config, specs, available, groups)
