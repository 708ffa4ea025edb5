"""The indexer in plain torch: its paged cache of keys, the scores of all earlier tokens, and the choice of the best."""

from __future__ import annotations

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend

from glmpp_reference import wrong_fixes
from glmpp_reference.attention import BatchBuilder, ReferenceBackend, write_rows


class IndexerBackend(DeepseekV32IndexerBackend):
    """For the cache of the indexer's keys: index_head_dim numbers for each token and layer."""

    get_supported_kernel_block_sizes = staticmethod(lambda *_: ReferenceBackend.get_supported_kernel_block_sizes())

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder


def unquantised(q: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's `per_token_group_quant_fp8` is replaced by: queries as they are, and a scale of one for each row."""
    return q, q.new_ones(q.shape[0], 1)


class Indexer(SparseAttnIndexer):
    """vLLM makes this where it would make its own operator, and calls it with queries, keys and head weights."""

    def __init__(self, k_cache, *args, **kwargs):
        from vllm.model_executor.models import deepseek_v2  # the module that is making this

        super().__init__(k_cache, *args, **kwargs)
        deepseek_v2.per_token_group_quant_fp8 = unquantised
        wrong_fixes.install(deepseek_v2)
        # The model asked for FP8 keys with a scale beside them. These are numbers of the model's own type.
        k_cache.head_dim, k_cache.dtype = self.head_dim, torch.get_default_dtype()
        k_cache.get_attn_backend = lambda: IndexerBackend

    def forward_native(self, hidden_states, q_quant, k, weights) -> torch.Tensor:
        """Fill the buffer of choices that all layers share.

        Args:
            q_quant: queries [tokens, index heads, index_head_dim], not quantised here.
            k: keys [tokens, index_head_dim] of the same tokens.
            weights: of the heads [tokens, index heads], softmax scale included.

        Returns:
            The buffer, int32 [most tokens, index_topk]: positions within the request, -1 where there are fewer.
        """
        metadata, chosen = get_forward_context().attn_metadata, self.topk_indices_buffer
        if not isinstance(metadata, dict):  # a run that only measures memory
            return chosen
        wrong_fixes.foreign.say()
        batch = metadata[self.k_cache.prefix]
        write_rows(self.k_cache.kv_cache, k, batch.slot_mapping)
        chosen[: hidden_states.shape[0]] = -1
        for request in batch.requests:
            keys = request.cached(self.k_cache.kv_cache).float()
            for token, position in zip(range(request.tokens.start, request.tokens.stop), request.positions().tolist()):
                scores = weights[token].float() @ (q_quant[token].float() @ keys[: position + 1].T).relu()
                best = scores.topk(min(self.topk_tokens, position + 1)).indices
                chosen[token, : len(best)] = best.int()
        return chosen

    forward_cpu = forward_native


def register() -> None:
    """Have vLLM make `Indexer` for `SparseAttnIndexer`, and hand it queries that are not quantised."""
    from vllm.model_executor.custom_op import op_registry_oot

    if SparseAttnIndexer.__name__ not in op_registry_oot:
        SparseAttnIndexer.register_oot(Indexer)
