"""Sparse MLA attention in plain torch: the metadata of a batch, the paged latent cache, and attention over chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import vllm.v1.attention.backend as vllm_backend
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

# Before 0.32 vLLM has a class of its own for implementations without a dense path for prompts; since then, a flag.
SparseImpl = getattr(vllm_backend, "SparseMLAAttentionImpl", vllm_backend.MLAAttentionImpl)


@dataclass
class Request:
    """What one request adds to a batch.

    Attributes:
        tokens: its rows among the batch's tokens.
        length: its tokens so far, these included.
        blocks: the cache blocks that hold them, in order.
    """

    tokens: slice
    length: int
    blocks: torch.Tensor

    def cached(self, cache: torch.Tensor) -> torch.Tensor:
        """The request's rows [length, width] of a paged cache [blocks, block size, width]."""
        used = self.blocks[: math.ceil(self.length / cache.shape[1])]
        return cache[used].flatten(0, 1)[: self.length]

    def positions(self) -> torch.Tensor:
        """Positions [tokens] within the request of the tokens that are computed now."""
        return torch.arange(self.length - (self.tokens.stop - self.tokens.start), self.length)


@dataclass
class Batch(AttentionMetadata):
    """A batch as attention sees it. The counts are fields that vLLM's MLA layer reads: all tokens take the sparse path."""

    requests: list[Request]
    slot_mapping: torch.Tensor
    num_actual_tokens: int
    num_decode_tokens: int
    num_decodes: int
    num_prefills: int = 0


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        requests = [
            Request(slice(starts[row], starts[row + 1]), lengths[row], common.block_table_tensor[row].long())
            for row in range(common.num_reqs)
            if starts[row + 1] > starts[row]
        ]
        tokens = common.num_actual_tokens
        return Batch(requests, common.slot_mapping, tokens, tokens, common.num_reqs)


def write_rows(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows [tokens, width] into a paged cache [blocks, block size, width]; a negative slot is padding."""
    slots = slots.flatten()
    rows = rows[: len(slots)]
    real = slots >= 0
    cache[slots[real] // cache.shape[1], slots[real] % cache.shape[1]] = rows[real].to(cache.dtype)


class ReferenceBackend(AttentionBackend):
    """For the latent cache: one vector of kv_lora_rank + qk_rope_head_dim numbers for each token and layer."""

    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @staticmethod
    def get_name() -> str:
        return "GLMPP_REFERENCE"

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto") -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class Attention(SparseImpl):
    """Attention of every token over the tokens that the indexer chose for it."""

    is_sparse = True
    supports_dense_mha_prefill = False
    can_return_lse_for_decode = False

    def __init__(self, num_heads, head_size, scale, *args, kv_lora_rank, indexer=None, topk_indices_buffer=None, **kwargs):
        self.num_heads, self.head_size, self.scale, self.kv_lora_rank = num_heads, head_size, scale, kv_lora_rank
        self.chosen = indexer.topk_indices_buffer if topk_indices_buffer is None else topk_indices_buffer

    def record_logical_topk_ready(self) -> None:
        """vLLM >= 0.32 calls this when the indexer is done, for kernels on another stream."""

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        if kv_cache.numel():
            write_rows(kv_cache, torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1), slot_mapping)

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata: Batch, layer) -> tuple[torch.Tensor, None]:
        """Softmax over the chosen tokens, in float32.

        Args:
            q: (latent part [tokens, heads, kv_lora_rank], rotated part [tokens, heads, qk_rope_head_dim]).
            kv_c_and_k_pe_cache: [blocks, block size, kv_lora_rank + qk_rope_head_dim].

        Returns:
            [tokens, heads, kv_lora_rank], and None for the log-sum-exp that nobody needs.
        """
        query = torch.cat(q, dim=-1)
        out = query.new_empty(*query.shape[:-1], self.kv_lora_rank)
        for request in attn_metadata.requests:
            latent = request.cached(kv_c_and_k_pe_cache).to(query.dtype)
            for rows, chosen in chunks(request.tokens, self.chosen):
                keys = latent[chosen.clamp(min=0)]
                scores = torch.einsum("thd,tkd->thk", query[rows], keys).float() * self.scale
                scores = scores.masked_fill((chosen < 0).unsqueeze(1), -torch.inf)
                weights = scores.softmax(-1).to(query.dtype)
                out[rows] = torch.einsum("thk,tkd->thd", weights, keys[..., : self.kv_lora_rank])
        return out, None


def chunks(tokens: slice, chosen: torch.Tensor, size: int = 128) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a request and what was chosen for them, a few at a time: a prompt's keys need not all be copied at once."""
    for start in range(tokens.start, tokens.stop, size):
        rows = slice(start, min(start + size, tokens.stop))
        yield rows, chosen[rows].long()


class NoPrefill:
    """In place of a kernel for whole prompts: vLLM before 0.32 makes one for every MLA layer, used or not."""

    def __init__(self, **_):
        pass


def register() -> None:
    if hasattr(vllm_backend, "SparseMLAAttentionImpl"):
        from vllm.model_executor.layers.attention import mla_attention

        mla_attention.get_mla_prefill_backend = lambda _: NoPrefill
