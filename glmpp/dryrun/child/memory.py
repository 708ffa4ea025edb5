"""What a rank takes of its GPU: the tensors that its model holds, and its KV cache by vLLM's own account of it."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch.nn.parameter import is_lazy
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import set_default_torch_dtype

from glmpp.dryrun.child.build import Built, ModelBuilder
from glmpp.dryrun.child.built_model import layer_list
from glmpp.dryrun.fit import Memory
from glmpp.dryrun.messages import Run
from glmpp.dryrun.pretend.failures import REFUSAL, is_kits, kind_of
from glmpp.dryrun.pretend.targets import tensors_on
from glmpp.serving import contract
from glmpp.serving.left_at_init import SHARED_BY_DRAFTER


def memory(builder: ModelBuilder, run: Run, built: Built, device: str, context: int | None) -> Memory:
    """What a rank takes that has been built and loaded. Nothing may come after it: the model is changed.

    Args:
        context: tokens of the longest request; None: what `vllm serve` takes for this model.
    """
    prepare_attention(built, device)
    shared = {storage for name, p in built.model.named_parameters() if name.endswith(_shared(run)) for storage in _of([p])}
    parameters = _of(built.model.parameters()).keys() - shared
    held = _of([*built.model.parameters(), *_others(built.model)])
    layers = layer_list(built.model, builder.num_layers)
    own = [{} if layer is None else _of([*layer.parameters(), *_others(layer)]) for layer in layers.values()]
    several = {storage for storage, times in Counter(storage for one in own for storage in one).items() if times > 1}
    found = Memory(
        parameters=sum(held[storage] for storage in parameters),
        others=sum(held[storage] for storage in held.keys() - shared - parameters),
        layers=tuple(sum(nbytes for storage, nbytes in one.items() if storage not in several) for one in own),
        kv_cache=None,
    )
    refused = False
    try:
        contract.require(contract.KV_CACHE)
        from glmpp.dryrun.child.kv_cache import kv_cache, serving

        try:
            config = serving(builder, run, built, context)
        except Exception as error:
            refused = kind_of(error) == REFUSAL
            raise
        found = replace(found, utilization=config.cache_config.gpu_memory_utilization)
        return replace(found, kv_cache=kv_cache(config, list(layers)))
    except Exception as error:  # no verdict on the checkpoint depends on it
        whose = "a fault of glmpp, please report it: " if is_kits(error) else ""
        said = f"{whose}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return replace(found, why=said, refused=refused)


def _shared(run: Run) -> tuple[str, ...]:
    """Ends of the names of parameters that a drafter shares with the main model: the embedding only where that has one."""
    ends = SHARED_BY_DRAFTER if run.drafter else ()
    return tuple(end for end in ends if run.pp_size == 1 or "embed" not in end)


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
    return {
        storage._cdata: storage.nbytes() for storage in (each.untyped_storage() for each in tensors if not is_lazy(each))
    }
