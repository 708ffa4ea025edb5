"""Does it fit? What the ranks of a deployment take of their GPUs, and how many tokens of KV cache that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from glmpp.gpus import GPU

NO_FIT = "does not fit"
LEFT_OUT = "activations, CUDA graphs, NCCL's buffers"


@dataclass(frozen=True)
class KVCache:
    """What a rank keeps of the tokens that it has seen. vLLM allots it in blocks, each of a block of every layer's.

    Attributes:
        caches: of the rank's layers, a sparse attention's indexers included.
        pages: bytes of a block in each main layer of the model, 0 in those of other stages; () if there is no list of them.
        block_bytes: bytes of one block, all layers together.
        blocks_per_request: blocks that a request of `context` tokens needs.
        context: tokens of the longest request.
        dtype: vLLM's name of it, "auto" for the model's own.
    """

    caches: int
    pages: tuple[int, ...]
    block_bytes: int
    blocks_per_request: int
    context: int
    dtype: str = "auto"

    @property
    def bytes_per_token(self) -> float:
        """Of a request of `context` tokens. Layers with a window, or a state, take less of a long one for each token."""
        return self.block_bytes * self.blocks_per_request / self.context


@dataclass(frozen=True)
class Memory:
    """What a rank takes of its GPU, in bytes.

    Attributes:
        parameters: the model's parameters, as vLLM allocates them.
        others: buffers, tables, and what attention layers keep beside their parameters.
        layers: of these, bytes in each main layer of the model, 0 in those of other stages; () if there is no list of them.
        kv_cache: None for a rank that needs none, or of which vLLM did not say it: `why`.
        utilization: share of the GPU's memory that vLLM takes by default.
        refused: vLLM refuses to serve requests of that length, in the words of `why`.
    """

    parameters: int
    others: int
    layers: tuple[int, ...]
    kv_cache: KVCache | None
    utilization: float | None = None
    why: str | None = None
    refused: bool = False

    @property
    def figures(self) -> tuple:
        """What two ranks have in common that take the same of their GPUs."""
        return self.weights, self.kv_cache and (self.kv_cache.block_bytes, self.kv_cache.blocks_per_request), self.why

    @property
    def weights(self) -> int:
        return self.parameters + self.others

    def room(self, gpu: GPU, utilization: float | None = None) -> int:
        """Bytes that the weights leave of what vLLM takes, negative if they do not fit."""
        return int(gpu.memory * (utilization or self.utilization or 0)) - self.weights

    def blocks(self, gpu: GPU, utilization: float | None = None) -> int | None:
        """Blocks of the KV cache that fit beside the weights; None if nobody knows how large one is."""
        return self.kv_cache and max(0, self.room(gpu, utilization)) // self.kv_cache.block_bytes

    def fits(self, gpu: GPU, utilization: float | None = None) -> bool | None:
        """Whether vLLM would start: it wants room for one request of `context` tokens on every rank; None if unknown."""
        if self.refused or not (utilization or self.utilization):
            return False if self.refused else None
        if self.room(gpu, utilization) < 0:
            return False
        if self.kv_cache is None:
            return None if self.why else True
        return self.blocks(gpu, utilization) >= self.kv_cache.blocks_per_request

    def with_drafter(self, drafter: Memory) -> Memory:
        """Of a last stage with the drafter beside it: one pool of blocks serves both."""
        caches = [one.kv_cache for one in (self, drafter) if one.kv_cache]
        both = None
        if len(caches) == 2:
            both = replace(
                caches[0],
                caches=sum(cache.caches for cache in caches),
                block_bytes=sum(cache.block_bytes for cache in caches),
                blocks_per_request=max(cache.blocks_per_request for cache in caches),
            )
        parameters, others = self.parameters + drafter.parameters, self.others + drafter.others
        return replace(self, parameters=parameters, others=others, kv_cache=both, why=self.why or drafter.why)


@dataclass(frozen=True)
class Fit:
    """A deployment's room for tokens: that of the rank that has the least, for vLLM gives all ranks as many blocks.

    Attributes:
        memories: of the ranks that were run; a rank like one that was run is not among them.
        gpu: what each of them runs on.
        utilization: share of its memory; None: what vLLM takes by default.
    """

    memories: Sequence[Memory]
    gpu: GPU
    utilization: float | None = None

    @property
    def share(self) -> float:
        """The share of the memory that vLLM takes."""
        return self.utilization or max((memory.utilization or 0 for memory in self.memories), default=0)

    @property
    def fits(self) -> bool | None:
        """Whether every rank does; None if unknown."""
        found = {memory.fits(self.gpu, self.utilization) for memory in self.memories}
        return False if False in found else None if None in found else True

    @property
    def lack(self) -> str | None:
        """What the rank that is shortest of room lacks, in GB, of the cache in GiB as vLLM says it; None if nothing."""
        short = [memory for memory in self.memories if memory.fits(self.gpu, self.utilization) is False]
        if not short:
            return None
        memory = min(short, key=lambda one: (not one.refused, one.room(self.gpu, self.utilization)))
        room, taken = memory.room(self.gpu, self.utilization), self.gpu.memory * self.share
        if memory.refused:
            return memory.why
        if room < 0:
            by_far = -room > 1e8  # otherwise the two may be equal in GB
            need, have = (f"{n / 1e9:.1f} GB" if by_far else f"{n:,.0f} bytes" for n in (memory.weights, taken))
            return f"{need} of weights on a rank, vLLM takes {have} of {self.gpu.name}"
        need = memory.kv_cache.blocks_per_request * memory.kv_cache.block_bytes
        request = f"a request of {memory.kv_cache.context:,} tokens"
        return f"{request} needs {need / 2**30:.2f} GiB of KV cache on a rank, {room / 2**30:.2f} GiB are available"

    @property
    def known(self) -> bool:
        """Whether vLLM said of every rank what a block is."""
        return bool(self.memories) and all(memory.kv_cache for memory in self.memories)

    @property
    def fullest(self) -> int:
        """Bytes of weights on the rank with the most."""
        return max(memory.weights for memory in self.memories)

    def tokens_of(self, memory: Memory) -> int | None:
        """Tokens that would fit if every rank were like this one."""
        blocks = memory.blocks(self.gpu, self.utilization)
        return None if blocks is None else int(blocks * memory.kv_cache.context / memory.kv_cache.blocks_per_request)

    @property
    def requests(self) -> float | None:
        """Requests of the longest context at a time; None if unknown."""
        if not self.known:
            return None
        blocks = min(memory.blocks(self.gpu, self.utilization) for memory in self.memories)
        return blocks / max(memory.kv_cache.blocks_per_request for memory in self.memories)

    @property
    def context(self) -> int:
        return max(memory.kv_cache.context for memory in self.memories)

    @property
    def tokens(self) -> int | None:
        """What vLLM logs as "GPU KV cache size" if it takes nothing for what is left out; None if unknown."""
        return None if self.requests is None else int(self.requests * self.context)
