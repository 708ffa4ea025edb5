"""Parts of tensors as regions of bytes: what they cover, and whether a weight's are of the same groups as its scales'."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, gcd, prod

import numpy as np

MOST = 1 << 27  # cells of a table of what was read; one that would be larger is not made

Regions = tuple  # of (first byte, bytes of a run, ((step, number), …)), see `glmpp.serving.read_tracking.region`
Ranges = list[tuple[int, int]]


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


def where(seen: np.ndarray, unit: int, shape: Sequence[int], size: int) -> tuple[int, Ranges]:
    """The first dimension along which not everything is seen, and what is."""
    for dimension in range(len(shape)):
        if (found := ranges(seen, unit, shape, size, dimension)) != [(0, shape[dimension])]:
            return dimension, found
    return 0, [(0, shape[0])]


@lru_cache(10_000)
def compared(weight: tuple, scale: tuple, strict: bool) -> tuple | None:
    """Dimension, elements, scales and size of a group where a rank's part of a weight has other groups' scales, or None.

    Args:
        weight, scale: shape, bytes, and the regions that are read; None: all.
    """
    shape, size, regions = scale
    if len(shape) == 2 * len(weight[0]):  # ModelOpt's [rows, 1, columns, 1]
        scale = (shape[::2], size, regions)
    for dimension, (elements, count) in enumerate(zip(weight[0], scale[0])):
        sizes = groups(elements, count)
        own, theirs = _along(weight, dimension), _along(scale, dimension)
        if not sizes or own is None or theirs is None:
            continue
        if not any(_fits(own, theirs, group, (elements, count), strict) for group in sizes):
            shown, read = (tuple((start, after - 1) for start, after in one) for one in (own, theirs))
            return dimension, shown, read, float(sizes[0])
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
    """Whether what is read of the scales is what the elements need, and begins where they begin, if they need several."""
    size, count = sizes
    for start, after in own:
        first, last = start // group, ceil(after / group)
        if not any(begin <= first and last <= end for begin, end in theirs):
            return False
        is_shifted = start % group and last - first > 1
        if theirs != [(0, count)] and (is_shifted or (strict and after % group and after != size)):
            return False
    return True
