"""The second side of completeness: what all ranks read of a tensor, and what one reads of a weight and of its scales."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, gcd, prod

import numpy as np

from glmpp.checkpoint import Checkpoint
from glmpp.formats.tensor import TensorSpec
from glmpp.ledger import PARTS, UNKNOWN, UNREAD, WHOLE

MOST = 1 << 27  # cells of a table of what was read; one that would be larger is not made
SCALES = re.compile(r"[._](weight_)?(scales?(_inv)?|zero_point|q?zeros)$")
WEIGHTS = re.compile(r"[._](q?weight(_packed)?|blocks)$")

Regions = tuple  # of (first byte, bytes of a run, ((step, number), …)), see `glmpp.engine.reads.region`
Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Cut:
    """A tensor whose elements do not all get to where they belong.

    Attributes:
        tensor: of the checkpoint.
        dimension: of it, that is cut.
        elements: first and last index along it: of what is read by nobody, or of what this rank reads.
        scales: None; or the tensor with the scales of these elements, where those that the rank reads are of others.
        read: first and last index of the scales that the rank reads.
        group: elements of the dimension that share a scale.
    """

    tensor: str
    dimension: int
    elements: tuple[tuple[int, int], ...]
    scales: str | None = None
    read: tuple[tuple[int, int], ...] = ()
    group: float | None = None

    def __str__(self) -> str:
        which = f"{_spans(self.elements)} of dimension {self.dimension}"
        if self.scales is None:
            return f"{which}: read by no rank"
        groups = ", ".join(f"{first / self.group:g} to {(last + 1) / self.group:g}" for first, last in self.elements)
        return f"{which}: groups {groups} of {self.group:g} as stored, and of the scales {_spans(self.read)} are read"


def _spans(spans: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


class Readings:
    """What the ranks of a deployment have read, from the messages of their loads.

    Attributes:
        ranks: (stage, shard, replica), in order.
        regions: of each, the kinds of parts that it reads.
        numbers: of each, a number for each tensor: UNREAD, WHOLE, UNKNOWN or PARTS and up.
    """

    def __init__(self, messages: Sequence[Mapping], checkpoint: Checkpoint, sizes: tuple[int, int]):
        """Args:
        messages: of ranks; left out are those whose load did not end, and a control's or a drafter's.
        sizes: shards and replicas of a stage.
        """
        self.specs, self.sizes = list(checkpoint.values()), sizes
        told = {_rank(one): one["reads"] for one in messages if is_told(one) and not (one["control"] or one["drafter"])}
        self.ranks = sorted(told, key=lambda rank: (rank[0], rank[2], rank[1]))
        self.regions = {rank: _regions(told[rank]) for rank in self.ranks}
        self.numbers = {rank: _numbers(told[rank]) for rank in self.ranks}

    def in_part(self) -> dict[tuple, list[int]]:
        """What is read of a tensor that some rank reads in part, see `_key` -> such tensors."""
        found: dict[tuple, list[int]] = {}
        if self.ranks:
            table = np.stack([self.numbers[rank] for rank in self.ranks])
            for at in np.flatnonzero((table >= PARTS).any(axis=0)):
                key = (self.specs[at].shape, self.specs[at].nbytes, *table[:, at].tolist())
                found.setdefault(key, []).append(int(at))
        return found

    def unread(self) -> list[Cut]:
        """What is read by no rank, if all ranks of the stages were run that read something of a tensor."""
        cuts = []
        for key, ats in self.in_part().items():
            if not self._all_ran(key) or (table := self._table(key, whole_stages=True)) is None:
                continue
            unit, seen = table
            if not seen.all():
                dimension, ranges = _where(~seen, unit, key[0], key[1])
                elements = tuple((first, after - 1) for first, after in ranges)
                cuts += [Cut(self.specs[at].name, dimension, elements) for at in ats]
        return cuts

    def stages_to_run(self) -> list[int]:
        """Stages of which not every rank was run, where what the others read cannot be told from the first and the last."""
        asked = set()
        for key in self.in_part():
            table = self._table(key)
            if table is None or not table[1].all():
                asked |= {rank[0] for rank, number in zip(self.ranks, key[2:]) if number != UNREAD}
        for rank in self.ranks:
            if any(self.pairs(rank, strict=True)):
                asked.add(rank[0])
        return sorted(stage for stage in asked if len(self._of_stage(stage)) < prod(self.sizes))

    def pairs(self, rank: tuple[int, int, int], strict: bool = False) -> list[Cut]:
        """Weights of which a rank reads other elements than those that the scales it reads are of."""
        return mismatched(self.specs, self.numbers[rank], self.regions[rank], strict)

    def _of_stage(self, stage: int) -> list[tuple[int, int, int]]:
        return [rank for rank in self.ranks if rank[0] == stage]

    def _all_ran(self, key: tuple) -> bool:
        stages = {rank[0] for rank, number in zip(self.ranks, key[2:]) if number != UNREAD}
        return all(len(self._of_stage(stage)) == prod(self.sizes) for stage in stages)

    def _table(self, key: tuple, whole_stages: bool = False) -> tuple[int, np.ndarray] | None:
        """What all ranks read, those that were not run included if it can be told what they do; None: it cannot."""
        _, size, *numbers = key
        if UNKNOWN in numbers or WHOLE in numbers:
            return size, np.ones(1, bool)
        regions: list = []
        for stage in sorted({rank[0] for rank in self.ranks}):
            own = [self.regions[rank].get(n, ()) for rank, n in zip(self.ranks, numbers) if rank[0] == stage]
            regions += [one for of_rank in own for one in of_rank]
            if any(own) and len(own) < prod(self.sizes) and not whole_stages:
                between = between_ranks(own[0], own[-1], self.sizes)
                if between is None:
                    return None
                regions += between
        return covered(tuple(sorted(regions)), size)


def is_told(message: Mapping) -> bool:
    return bool(message.get("reads")) and message["verdict"] == "loads"


def of_rank(message: Mapping, checkpoint: Checkpoint) -> list[Cut]:
    """What one rank reads of weights and of other elements' scales."""
    if not is_told(message):
        return []
    return mismatched(list(checkpoint.values()), _numbers(message["reads"]), _regions(message["reads"]))


def _rank(message: Mapping) -> tuple[int, int, int]:
    return message["rank"], message.get("shard", 0), message.get("replica", 0)


def _regions(reads: Mapping) -> dict[int, Regions]:
    return {
        number: tuple((start, run, tuple(map(tuple, rest))) for start, run, rest in kind)
        for number, kind in enumerate(reads["kinds"], PARTS)
    }


def _numbers(reads: Mapping) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(reads["numbers"])), np.uint32)


def between_ranks(first: Regions, last: Regions, sizes: tuple[int, int]) -> Regions | None:
    """What the ranks between the first and the last of a stage read, if each takes the part after its neighbour's.

    A part may be held by several ranks in a row. It is not taken for granted where the first and the last do not show it:
    None then.
    """
    first, last = joined(first), joined(last)
    if len(first) != len(last):
        return None
    found = []
    for (start, run, rest), (end, shorter, others) in zip(first, last):
        parts, left = divmod(end - start, run)
        counts = {sizes[0], prod(sizes)}
        if rest != others or shorter > run or left or parts < 0 or not any(n % (parts + 1) == 0 for n in counts):
            return None
        found.append((start, end - start + shorter, rest))
    return tuple(found)


def joined(regions: Regions) -> Regions:
    """The same with regions put together that lie end to end."""
    found: list = []
    for start, run, rest in sorted(regions, key=lambda one: (one[2], one[0])):
        if found and found[-1][2] == rest and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + run, rest)
        else:
            found.append((start, run, rest))
    return tuple(sorted(found))


@lru_cache(10_000)
def covered(regions: Regions, size: int) -> tuple[int, np.ndarray] | None:
    """A tensor as a row of cells of so many bytes, and which of them are in a region; None if they are too many."""
    unit = gcd(size, *(n for start, run, rest in regions for n in (start, run, *(step for step, _ in rest))))
    if size // unit > MOST:
        return None
    seen = np.zeros(size // unit, bool)
    for start, run, rest in regions:
        shape, steps = [n for _, n in rest] + [run // unit], [step // unit for step, _ in rest] + [1]
        np.lib.stride_tricks.as_strided(seen[start // unit :], shape, steps)[...] = True
    return unit, seen


def ranges(seen: np.ndarray, unit: int, shape: Sequence[int], size: int, dimension: int) -> Ranges:
    """Indices along a dimension, from and to, at which something is seen."""
    inner = Fraction(size, prod(shape[: dimension + 1]))  # bytes at one index; of packed elements it may be half a byte
    period = inner * shape[dimension]
    if period % unit:
        return [(0, shape[dimension])] if seen.any() else []
    row = seen.reshape(-1, int(period) // unit).any(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8))).tolist()
    found: Ranges = []
    for start, after in zip(edges[::2], edges[1::2]):
        first, end = int(start * unit // inner), ceil(after * unit / inner)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return found


def _where(seen: np.ndarray, unit: int, shape: Sequence[int], size: int) -> tuple[int, Ranges]:
    """The first dimension along which not everything is seen, and what is."""
    for dimension in range(len(shape)):
        if (found := ranges(seen, unit, shape, size, dimension)) != [(0, shape[dimension])]:
            return dimension, found
    return 0, [(0, shape[0])]


def mismatched(
    specs: Sequence[TensorSpec], numbers: np.ndarray, regions: Mapping[int, Regions], strict: bool = False
) -> list[Cut]:
    """Weights and scales of which a rank does not read the same groups.

    Args:
        strict: also those whose last group goes on in the next rank's part, which the next one may not read rightly.
    """
    if not regions:
        return []
    pairs: dict[str, list] = {}
    for at in np.flatnonzero((numbers >= PARTS) | (numbers == WHOLE)):
        name = specs[at].name
        is_scale = SCALES.search(name)
        stem = name[: is_scale.start()] if is_scale else WEIGHTS.sub("", name)
        pairs.setdefault(stem, [[], []])[bool(is_scale)].append(at)
    cuts = []
    for weights, scales in pairs.values():
        for weight in weights:
            for scale in scales:
                of = [(specs[at].shape, specs[at].nbytes, regions.get(numbers[at])) for at in (weight, scale)]
                if found := compared(*of, strict):
                    dimension, elements, read, group = found
                    cuts.append(Cut(specs[weight].name, dimension, elements, specs[scale].name, read, group))
    return cuts


@lru_cache(10_000)
def compared(weight: tuple, scale: tuple, strict: bool) -> tuple | None:
    """Dimension, elements, scales and size of a group where a rank's part of a weight has other groups' scales, or None.

    Args:
        weight, scale: shape, bytes, and the regions that are read; None: all.
    """
    if weight[2] is None and scale[2] is None:
        return None
    for dimension, (size, count) in enumerate(zip(weight[0], scale[0])):
        sizes = groups(size, count)
        theirs, own = _along(scale, dimension), _along(weight, dimension)
        if not sizes or theirs is None or own is None or (own == theirs == [(0, size)]):
            continue
        if not any(_fits(own, theirs, group, (size, count), strict) for group in sizes):
            group = sizes[0]
            shown = tuple((start, after - 1) for start, after in own)
            return dimension, shown, tuple((start, after - 1) for start, after in theirs), float(group)
    return None


def _along(tensor: tuple, dimension: int) -> Ranges | None:
    shape, size, regions = tensor
    if regions is None:
        return [(0, shape[dimension])]
    table = covered(regions, size)
    return None if table is None else ranges(table[1], table[0], shape, size, dimension)


def groups(size: int, count: int) -> list[Fraction]:
    """Elements of a dimension that share a scale, by what they may be: a group need not be full, so more than one may fit.

    Args:
        size, count: elements and scales of the dimension; packed elements may be fewer than scales.
    """
    if count < 2:
        return []
    if size <= count:
        return [Fraction(size, count)] if count % size == 0 else []
    found = [Fraction(size // count)] if size % count == 0 else []
    power = 1 << (ceil(Fraction(size, count)) - 1).bit_length()
    return found + ([Fraction(power)] if ceil(size / power) == count and power not in found else [])


def _fits(own: Ranges, theirs: Ranges, group: Fraction, sizes: tuple[int, int], strict: bool) -> bool:
    """Whether what is read of the scales is what the elements need, and begins where they begin."""
    size, count = sizes
    for start, after in own:
        first, last = start // group, ceil(after / group)
        if not any(begin <= first and last <= end for begin, end in theirs):
            return False
        if theirs != [(0, count)] and (start % group or (strict and after % group and after != size)):
            return False
    return True
