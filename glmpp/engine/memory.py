"""What a rank takes of its GPU: the tensors that its model holds, and its KV cache by vLLM's own account of it."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from glmpp.engine.build import Built, ModelBuilder, Place
from glmpp.engine.kv_cache_configs import kv_cache_configs
from glmpp.engine.left_at_init import SHARED_BY_DRAFTER
from glmpp.engine.targets import tensors_on

PLENTY = 1 << 60  # bytes: more than the square of any block's, so that a quotient gives the block's bytes exactly


def memory(builder: ModelBuilder, place: Place, built: Built, device: str, context: int | None) -> dict:
    """The message about a rank that has been built and loaded. Nothing may come after it: the model is changed.

    Args:
        context: tokens of the longest request; None: what `vllm serve` takes for this model.
    """
    prepare_attention(built, device)
    shared = {storage for name, p in built.model.named_parameters() if name.endswith(_shared(place)) for storage in _of([p])}
    parameters = _of(built.model.parameters()).keys() - shared
    held = _of([*built.model.parameters(), *_others(built.model)])
    layers = layer_list(built.model, builder.num_layers)
    own = [{} if layer is None else _of([*layer.parameters(), *_others(layer)]) for layer in layers.values()]
    several = {storage for storage, times in Counter(storage for one in own for storage in one).items() if times > 1}
    message = {
        "parameters": sum(held[storage] for storage in parameters),
        "others": sum(held[storage] for storage in held.keys() - shared - parameters),
        "layers": [sum(nbytes for storage, nbytes in one.items() if storage not in several) for one in own],
        "kv_cache": None,
        "why": None,
    }
    try:
        config = serving(builder, place, built, context)
        message["utilization"] = config.cache_config.gpu_memory_utilization
        message["kv_cache"] = kv_cache(config, list(layers))
    except Exception as error:  # no verdict on the checkpoint depends on it
        message["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return message


def _shared(place: Place) -> tuple[str, ...]:
    """Ends of the names of parameters that a drafter shares with the main model: the embedding only where that has one."""
    ends = SHARED_BY_DRAFTER if place.drafter else ()
    return tuple(end for end in ends if place.size == 1 or "embed" not in end)


def layer_list(model: torch.nn.Module, num_layers: int) -> dict[str, torch.nn.Module | None]:
    """The main layers by what their names begin with, None for those of other stages; {} if a model has no such list."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return {f"{path}.{at}.": None if isinstance(one, PPMissingLayer) else one for at, one in enumerate(module)}
    return {}


def prepare_attention(built: Built, device: str) -> None:
    """Let attention layers do what they do once all weights are loaded: MLA makes a second copy of `kv_b_proj`, in BF16.

    What linear layers and experts do to their weights needs the kernel that they do it for and is left out: they put others
    in the place of theirs, of the same size up to padding.
    """
    dtype = set_default_torch_dtype(built.model_config.dtype)
    with set_current_vllm_config(built.config), dtype, torch.device(device), tensors_on(device):
        for module in built.model.modules():
            if isinstance(module, AttentionLayerBase) and hasattr(module, "process_weights_after_loading"):
                with contextlib.suppress(Exception):  # a kernel that wants a GPU
                    module.process_weights_after_loading(built.model_config.dtype)


def _others(part: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Buffers, tables, and tensors that layers keep beside their parameters."""
    for module in part.modules():
        values = itertools.chain(module.buffers(recurse=False), vars(module).values())
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage: one counts once, however many tensors or layers share it."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def serving(builder: ModelBuilder, place: Place, built: Built, context: int | None) -> VllmConfig:
    """A built model's config as a server has it: models are built for a nominal context and nobody's use.

    Layers go on reading the cache config that they were built with, so that is brought up to date.
    """
    served = builder.vllm_config(place, context, usage_context=UsageContext.OPENAI_API_SERVER)
    config = built.config
    config.model_config, config.scheduler_config = served.model_config, served.scheduler_config
    vars(config.cache_config).update(vars(served.cache_config))
    return config


def kv_cache(config: VllmConfig, layers: list[str]) -> dict | None:
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
        requests = get_max_concurrency_for_kv_cache_config(config, cache)
    pages = [sum(spec.page_size_bytes for name, spec in specs.items() if name.startswith(layer)) for layer in layers]
    return {
        "caches": len(specs),
        "pages": pages,
        "block_bytes": PLENTY // cache.num_blocks,
        "blocks_per_request": round(cache.num_blocks / requests),
        "context": config.model_config.max_model_len,
        "dtype": config.cache_config.cache_dtype,
    }
