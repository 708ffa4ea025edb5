"""Which layers a pipeline stage holds, and who owns a tensor of the checkpoint.

The arithmetic is vLLM's (`vllm/distributed/utils.py:get_pp_indices`, `vllm/model_executor/models/utils.py`): layers are
dealt out evenly, a remainder goes to the stages before the last, `VLLM_PP_LAYER_PARTITION` overrides.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.config import layer_count, text_config
from glmpp.formats.tensor import TensorSpec

PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"
OWN, OTHER_STAGE, SPECULATIVE, UNKNOWN = "own", "another stage's", "speculative layer", "unknown"
EXPERT = re.compile(r"\.experts\.(\d+)\.")  # in a tensor's name, as in `vllm/…/model_loader/ep_weight_filter.py`
LAYERS = "model.layers"  # what most checkpoints call the list of layers; `layer_list` finds the name in others
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "embedding", "embeddings"}
_LAST = {"norm", "lm_head", "ln_f", "norm_f", "final_layernorm", "final_layer_norm", "embed_out"}
_IN_A_LIST = re.compile(r"(.+?)\.(\d+)\.")


def layer_list(checkpoint: Checkpoint) -> str:
    """What a checkpoint calls the list of its language model's layers, e.g. "model.layers" or "transformer.h".

    It is the shortest name under which all of the config's layer numbers occur.

    Raises:
        GlmppError: there is no such name.
    """
    num_layers = layer_count(checkpoint.config)
    found: dict[str, set[int]] = {}
    for name in checkpoint:
        if match := _IN_A_LIST.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    whole = [
        path for path, held in found.items() if len(held) >= num_layers and all(map(held.__contains__, range(num_layers)))
    ]
    if not whole:
        raise GlmppError(f"no list of layers in the checkpoint's names holds all of 0 to {num_layers - 1}")
    return LAYERS if LAYERS in whole else min(whole, key=len)


def partition_layers(num_layers: int, pp_size: int, layer_counts: list[int] | str | None = None) -> list[range]:
    """The layers of each stage, first to last.

    Args:
        num_layers: main layers of the model (the MTP layer is not one of them).
        pp_size: pipeline stages. More stages than layers gives empty ranges, as in vLLM.
        layer_counts: layers per stage, as a list or as vLLM's comma-separated string; by default the environment
            variable VLLM_PP_LAYER_PARTITION, and without it an even split.

    Raises:
        GlmppError: `layer_counts` has the wrong length or sum, a negative entry, or is not made of numbers.
    """
    if pp_size < 1 or num_layers < 1:
        raise GlmppError(f"cannot split {num_layers} layers over {pp_size} stages: both must be at least 1")
    if layer_counts is None:
        layer_counts = os.environ.get(PARTITION_VARIABLE)
    if layer_counts is None:
        each, left = divmod(num_layers, pp_size)
        # The remainder goes one layer each to the last stages but one, counted from the end: the last stage also
        # holds the final norm and lm_head, the first the embedding.
        counts = [each + (pp_size - 1 - left <= stage < pp_size - 1) for stage in range(pp_size)]
    else:
        counts = parse_counts(layer_counts, pp_size)
        if sum(counts) != num_layers or min(counts) < 0:
            raise GlmppError(
                f"{PARTITION_VARIABLE}={layer_counts!r} adds up to {sum(counts)} layers, the model has {num_layers}"
            )
    return [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def parse_counts(layer_counts: list[int] | str, pp_size: int) -> list[int]:
    """Layers per stage as numbers. Raises GlmppError if they are none, or not one for each stage."""
    entries = layer_counts.split(",") if isinstance(layer_counts, str) else layer_counts
    try:
        counts = [int(entry) for entry in entries]
    except ValueError:
        raise GlmppError(f"{PARTITION_VARIABLE}={layer_counts!r}: expected {pp_size} numbers like '10,10,…'") from None
    if len(counts) != pp_size:
        raise GlmppError(f"{PARTITION_VARIABLE}={layer_counts!r} names {len(counts)} stages, there are {pp_size}")
    return counts


class Prefixes:
    """Dot-terminated prefixes, made to be asked 100,000 times whether a name lies under one of them.

    Of nested prefixes the outer one is kept. Then at most one can cover a name, the last one that sorts before it, so
    that the time for a name does not grow with the number of prefixes.
    """

    def __init__(self, prefixes: Iterable[str]):
        self._sorted: list[str] = []
        for prefix in sorted(prefixes):
            if not (self._sorted and prefix.startswith(self._sorted[-1])):
                self._sorted.append(prefix)

    def cover(self, name: str) -> bool:
        """Whether `name` begins with one of the prefixes."""
        at = bisect_right(self._sorted, name)
        return at > 0 and name.startswith(self._sorted[at - 1])

    def cut(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """The names that none of the prefixes covers, and those that one does.

        Both sorted: in a sorted list what a prefix covers is one stretch.
        """
        outside, inside, names, at = [], [], sorted(names), 0
        for prefix in self._sorted:
            start = bisect_left(names, prefix, at)
            outside += names[at:start]
            at = bisect_left(names, f"{prefix[:-1]}/", start)  # "/" is the character after "."
            inside += names[start:at]
        return outside + names[at:], inside


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: what it holds and what it misses.

    Attributes:
        rank, size: position in the pipeline group.
        layers: main layers held.
        num_layers: main layers of the whole model.
        num_nextn: MTP layers after them.
        tied: `tie_word_embeddings`: the last stage holds the embedding too and there is no lm_head in the checkpoint.
        drafter: the MTP drafter runs, on the last stage; its layers then count as that stage's own.
        layer_list: what the checkpoint calls the list of layers.
    """

    rank: int
    size: int
    layers: range
    num_layers: int
    num_nextn: int = 0
    tied: bool = False
    drafter: bool = False
    layer_list: str = LAYERS

    def whole(self) -> Stage:
        """The only stage of the same model without pipeline parallelism."""
        return replace(self, rank=0, size=1, layers=range(self.num_layers), drafter=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def column(self, name: str) -> str:
        """Where a checkpoint tensor belongs, seen from this stage: OWN, OTHER_STAGE, SPECULATIVE or UNKNOWN."""
        index = self.layer_of(name)
        if index is not None:
            if index < self.num_layers:
                return OWN if index in self.layers else OTHER_STAGE
            if index < self.num_layers + self.num_nextn:
                return OWN if self.drafter and self.is_last else SPECULATIVE
            return UNKNOWN
        part = name.removeprefix(self._root).split(".")[0]
        if part in _EMBEDDINGS:
            return OWN if self.is_first or (self.tied and self.is_last) else OTHER_STAGE
        if part in _LAST:
            return OWN if self.is_last else OTHER_STAGE
        return UNKNOWN

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to, MTP layers included; None outside the list of layers."""
        number, dot, _ = name[len(self.layer_list) + 1 :].partition(".")
        return int(number) if name.startswith(f"{self.layer_list}.") and dot and number.isdecimal() else None

    @property
    def _root(self) -> str:
        """What the names of the parts beside the layers begin with, e.g. "model."."""
        return f"{self.layer_list.rpartition('.')[0]}."

    def owns(self, name: str) -> bool:
        """Whether this stage loads the checkpoint tensor `name`."""
        return self.column(name) == OWN

    def missing_prefixes(self) -> list[str]:
        """Prefixes of what this stage has only placeholders for; vLLM's `pp_missing_layer_names`, in module order.

        Each ends in a dot: without it `model.layers.1` would also match `model.layers.11.…`.
        """
        embedding = f"{self._root}embed_tokens."
        missing = [] if self.owns(embedding) else [embedding]
        missing += [f"{self.layer_list}.{index}." for index in range(self.num_layers) if index not in self.layers]
        return missing if self.is_last else [*missing, f"{self._root}norm.", "lm_head."]

    def __str__(self) -> str:
        first, last = (self.layers[0], self.layers[-1]) if self.layers else ("none", "none")
        return f"stage {self.rank} of {self.size} (layers {first}-{last})"


def make_stages(
    config: dict,
    pp_size: int,
    layer_counts: list[int] | str | None = None,
    drafter: bool = False,
    layer_list: str = LAYERS,
    num_layers: int | None = None,
) -> list[Stage]:
    """All stages of a model, from its config.json.

    Args:
        num_layers: main layers, if somebody knows it better than the config.
        layer_list: what the checkpoint calls the list of layers, see the function of that name.

    Raises:
        GlmppError: a stage would hold no layer (`pp_size` above the layer count), a bad `layer_counts`, or no layer count.
    """
    try:
        config, num_layers = text_config(config), num_layers or layer_count(config)
    except GlmppError:
        if num_layers is None:
            raise
    if pp_size > num_layers:
        raise GlmppError(f"{pp_size} stages for {num_layers} layers: at least one stage would hold no layer")
    return [
        Stage(
            rank=rank,
            size=pp_size,
            layers=layers,
            num_layers=num_layers,
            num_nextn=config.get("num_nextn_predict_layers") or 0,
            tied=bool(config.get("tie_word_embeddings")),
            drafter=drafter,
            layer_list=layer_list,
        )
        for rank, layers in enumerate(partition_layers(num_layers, pp_size, layer_counts))
    ]


def owned(checkpoint: Checkpoint, stage: Stage) -> list[TensorSpec]:
    """The checkpoint's tensors that `stage` loads, in checkpoint order."""
    return [spec for spec in checkpoint.values() if stage.owns(spec.name)]


def stage_bytes(checkpoint: Checkpoint, stages: list[Stage]) -> list[int]:
    """Checkpoint bytes that each stage loads. A tied embedding counts on both of its stages."""
    whole: Counter[str] = Counter()  # layers, and tensors beside them
    for spec in checkpoint.values():
        index = stages[0].layer_of(spec.name)
        whole[spec.name if index is None else f"{stages[0].layer_list}.{index}."] += spec.nbytes
    return [sum(nbytes for name, nbytes in whole.items() if stage.owns(name)) for stage in stages]


def balance(checkpoint: Checkpoint, pp_size: int, drafter: bool = False) -> list[int]:
    """Layers per stage that make the largest stage, in checkpoint bytes, as small as it can be.

    Every stage holds at least one layer. Among splits with the same largest stage the one with the smallest sum of
    squares is taken. `",".join(map(str, balance(…)))` is a value for VLLM_PP_LAYER_PARTITION.

    Args:
        drafter: count the MTP layer on the last stage.
    """
    config, layers = checkpoint.config, layer_list(checkpoint)
    num_layers = layer_count(config)
    make_stages(config, pp_size)  # refuses more stages than layers
    layer_bytes = [0] * num_layers
    first = last = 0
    ends = make_stages(config, min(2, num_layers), [1, num_layers - 1] if num_layers > 1 else [1], drafter, layers)
    for spec in checkpoint.values():
        index = ends[0].layer_of(spec.name)
        if index is not None and index < num_layers:
            layer_bytes[index] += spec.nbytes
            continue
        first += spec.nbytes * ends[0].owns(spec.name)
        last += spec.nbytes * (ends[-1].owns(spec.name) and (len(ends) > 1))
    if pp_size == 1:
        return [num_layers]
    below = [0, *accumulate(layer_bytes)]

    def size(rank: int, start: int, stop: int) -> int:
        return below[stop] - below[start] + first * (rank == 0) + last * (rank == pp_size - 1)

    return best_split(num_layers, pp_size, size)


def balance_cache(
    weights: Sequence[int], caches: Sequence[int], pp_size: int, room: int, first: int = 0, last: int = 0
) -> list[int] | None:
    """Layers per stage that leave the stage with the least room as much of it, in tokens, as it can have.

    vLLM gives every stage as many blocks of KV cache as the one with the least room for them has. A stage has room for
    (`room` - its weights) / (its bytes of cache for a token) tokens.

    Args:
        weights: bytes of each layer on its GPU.
        caches: bytes of KV cache in each layer, for a token or for any number of them.
        room: bytes of a GPU for weights and cache.
        first, last: bytes of what else the first and the last stage hold.

    Returns:
        Layers per stage, at least one each; None if no split fits.
    """
    cost = cache_cost(weights, caches, pp_size, room, first, last)
    counts = best_split(len(weights), pp_size, cost)
    return None if math.isinf(largest(cost, counts)) else counts


def cache_cost(
    weights: Sequence[int], caches: Sequence[int], pp_size: int, room: int, first: int = 0, last: int = 0
) -> Callable[[int, int, int], float]:
    """Cost of a stage, from its rank, its first layer and the one after its last: the share of its room that one token's
    cache takes, infinite if its weights leave none. Arguments as of `balance_cache`."""
    below, cached = [0, *accumulate(weights)], [0, *accumulate(caches)]

    def cost(rank: int, start: int, stop: int) -> float:
        left = room - (below[stop] - below[start] + first * (rank == 0) + last * (rank == pp_size - 1))
        return (cached[stop] - cached[start]) / left if left > 0 else math.inf

    return cost


def largest(cost: Callable[[int, int, int], float], counts: Sequence[int]) -> float:
    """The cost of the stage that costs the most, of a split into so many layers each."""
    return max(cost(rank, *stage) for rank, stage in enumerate(pairwise(accumulate(counts, initial=0))))


def best_split(num_layers: int, pp_size: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """Layers per stage, at least one each, whose largest cost is smallest; of several the one with the least sum of squares.

    Args:
        cost: of a stage, from its rank, its first layer and the one after its last.
    """
    # best[stop] = (largest cost, sum of squares, counts) over the first `rank + 1` stages holding layers [0, stop).
    best = {stop: (cost(0, 0, stop), cost(0, 0, stop) ** 2, [stop]) for stop in range(1, num_layers + 1)}
    for rank in range(1, pp_size):
        best = {
            stop: min(
                (max(largest, cost(rank, start, stop)), squares + cost(rank, start, stop) ** 2, [*counts, stop - start])
                for start, (largest, squares, counts) in best.items()
                if start < stop
            )
            for stop in range(rank + 1, num_layers + 1)
        }
    return best[num_layers][2]
