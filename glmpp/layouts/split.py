"""Splits of layers over stages that are better than vLLM's own: the largest stage is smallest, or most tokens fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise

from glmpp.checkpoint import Checkpoint
from glmpp.formats.config import layer_count
from glmpp.layouts.layer_list import layer_list
from glmpp.partition import make_stages, part_sizes


def balance(
    checkpoint: Checkpoint, pp_size: int, drafter: bool = False, starts: Collection[int] | None = None
) -> list[int] | None:
    """Layers per stage that make the largest stage, in checkpoint bytes, as small as it can be.

    Every stage holds at least one layer. Among splits with the same largest stage the one with the smallest sum of
    squares is taken. `",".join(map(str, balance(…)))` is a value for VLLM_PP_LAYER_PARTITION.

    Args:
        drafter: count the MTP layer on the last stage.
        starts: layers that a stage may begin with; None: all.

    Returns:
        None if there are too few layers that a stage may begin with.
    """
    config, layers = checkpoint.config, layer_list(checkpoint)
    num_layers = layer_count(config)
    make_stages(config, pp_size)  # refuses more stages than layers
    ends = make_stages(config, min(2, num_layers), [1, num_layers - 1] if num_layers > 1 else [1], drafter, layers)
    whole_parts = {part: nbytes for part, (_, nbytes) in part_sizes(checkpoint, ends[0]).items()}
    sizes = [whole_parts.get(index, 0) for index in range(num_layers)]
    beside = [(part, nbytes) for part, nbytes in whole_parts.items() if part not in range(num_layers)]
    for end in ends:
        sizes[end.layers[-1 if end.is_last else 0]] += sum(nbytes for part, nbytes in beside if end.owns_part(part))
    below = [0, *accumulate(sizes)]
    if starts is not None:
        return split_at(starts, num_layers, pp_size, lambda start, stop: below[stop] - below[start])
    return best_split(num_layers, pp_size, lambda start, stop: below[stop] - below[start])


def split_at(starts: Collection[int], num_layers: int, pp_size: int, cost: Callable[[int, int], float]) -> list[int] | None:
    """As `best_split`, of the splits whose stages begin with these layers; None if there is none."""
    found: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0, 0, ())}  # stop -> largest, squares, layers per stage
    for rank in range(pp_size):
        stops = [num_layers] if rank == pp_size - 1 else sorted({*starts} - {0})
        before, found = found, {}
        for start, (most, squares, counts) in before.items():
            for stop in stops:
                if stop > start:
                    here = cost(start, stop)
                    now = (max(most, here), squares + here**2, (*counts, stop - start))
                    found[stop] = min(found.get(stop, now), now)
    return list(found[num_layers][2]) if num_layers in found else None


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
    cost = cache_cost(weights, caches, room, first, last)
    counts = best_split(len(weights), pp_size, cost)
    return None if math.isinf(largest(cost, counts)) else counts


def cache_cost(
    weights: Sequence[int], caches: Sequence[int], room: int, first: int = 0, last: int = 0
) -> Callable[[int, int], float]:
    """Cost of a stage, from its first layer and the one after its last: the share of its room that one token's cache takes,
    infinite if its weights leave none. Arguments as of `balance_cache`."""
    below, cached = [0, *accumulate(weights)], [0, *accumulate(caches)]

    def cost(start: int, stop: int) -> float:
        left = room - (below[stop] - below[start] + first * (start == 0) + last * (stop == len(weights)))
        return (cached[stop] - cached[start]) / left if left > 0 else math.inf

    return cost


def largest(cost: Callable[[int, int], float], counts: Sequence[int]) -> float:
    """The cost of the stage that costs the most, of a split into so many layers each."""
    return max(cost(*stage) for stage in pairwise(accumulate(counts, initial=0)))


def best_split(num_layers: int, pp_size: int, cost: Callable[[int, int], float]) -> list[int]:
    """Layers per stage, at least one each, whose largest cost is smallest; of several the one with the least sum of squares,
    and of these the first.

    The time grows with the square of the number of layers, whatever the number of stages.

    Args:
        cost: of a stage, from its first layer and the one after its last. It grows with the stage, and by a layer the more
            the longer the stage is: so with sizes, and with shares of a room that shrinks. That bounds where the best cuts
            lie (F. F. Yao, "Efficient dynamic programming using quadrangle inequalities", 1980).
    """
    spare = num_layers - pp_size  # layers that a stage can have more than one
    # most[stop]: the largest cost, at best, of the stages up to `rank`, which hold the layers below `stop`.
    most = {stop: cost(0, stop) for stop in range(1, spare + 2)}
    for rank in range(1, pp_size):
        start, shorter, most = rank, most, {}
        for stop in range(rank + 1, rank + spare + 2):
            now = max(shorter[start], cost(start, stop))
            while start + 1 < stop and (then := max(shorter[start + 1], cost(start + 1, stop))) <= now:
                start, now = start + 1, then
            most[stop] = now
    bound = most[num_layers]
    rounding = 1e-12 if isinstance(bound, float) else 0  # of shares; sizes are exact

    # squares[start]: the least sum of squares of the stages from `rank` on, which hold the layers from `start` on.
    squares: dict[int, float] = {num_layers: 0}
    cuts: list[dict[int, int]] = [{}]
    for rank in reversed(range(pp_size)):
        after, squares, before = squares, {}, cuts[-1]
        cuts.append(found := {})
        for start in range(rank, rank + spare + 1):
            for stop in range(max(start + 1, found.get(start - 1, 0)), before.get(start, num_layers) + 1):
                if (here := cost(start, stop)) > bound:
                    break
                if stop in after:
                    total = here**2 + after[stop]
                    if start not in found or total < squares[start] - rounding * squares[start]:
                        squares[start], found[start] = total, stop
    at, counts = 0, []
    for found in cuts[:0:-1]:
        counts.append(found[at] - at)
        at = found[at]
    return counts
