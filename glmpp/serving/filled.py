"""How many elements of a parameter have a value after the writes that were seen, by the regions that they wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Tally:
    """What was written of a parameter.

    Attributes:
        size: elements of the parameter.
        written: elements, each as often as it was.
        filled: elements, each once, in each part: of three dimensions and more, each index of the first is a part.
        twice: an element was written more than once.
        at_most: elements that were written at places that are not known.
    """

    size: int
    written: int
    filled: np.ndarray
    twice: bool = False
    at_most: int = 0

    def is_whole(self, padding: int, more: int) -> bool:
        """Whether the parameter is filled apart from its padding, if some more elements of it are."""
        total, parts = int(self.filled.sum()), len(self.filled)
        if total + more >= self.size or parts == 1 or not padding:
            return total + more >= self.size - padding
        lacking = np.maximum((self.size - padding) / parts - self.filled, 0)
        return bool(lacking.sum() <= more)


def filled_by(tensor: torch.Tensor, writes: list[tuple]) -> Tally:
    """What writes into its storage have filled of a parameter.

    Bytes are seen as a table whose rows are the parameter's: what was written is a few rectangles of it then, whichever
    slices were taken. Cut at all their edges, the table has a few cells, and each is covered by so many rectangles.
    """
    size, each = tensor.numel(), tensor.element_size()
    base, own = tensor.storage_offset() * each, (tensor.shape, tensor.stride(), each)
    steps = sorted((step * each, n) for n, step in zip(tensor.shape, tensor.stride()) if n > 1)
    row = steps[1][0] if len(steps) > 1 else max(size * each, each)
    in_parts = tensor.dim() > 2 and len(steps) > 1 and tensor.stride(0) * each == steps[-1][0]
    parts = tensor.shape[0] if in_parts else 1
    starts, at_most = defaultdict(list), 0
    for _, kind, start, unknown in writes:
        if unknown:
            at_most += unknown
        else:
            starts[kind].append(start)
    if len(starts) == 1 and starts.get(own) == [base]:
        return Tally(size, size, np.full(parts, size // parts), at_most=at_most)
    if not starts:
        return Tally(size, 0, np.zeros(parts, np.int64), at_most=at_most)
    offsets = {kind: np.hstack(places) - base for kind, places in starts.items()}
    if _run(*own) == size * each and _follow(offsets, size * each):
        return Tally(size, size, np.full(parts, size // parts), at_most=at_most)
    mine = _rectangles(np.zeros(1, np.int64), *own, row)
    end = mine[:, 1].max()
    theirs = np.concatenate([_rectangles(places, *kind, row) for kind, places in offsets.items()])
    theirs = theirs[(theirs[:, 1] > 0) & (theirs[:, 0] < end)]
    bounds = np.arange(parts + 1) * (end // parts)
    down = np.unique(np.concatenate([theirs[:, :2].ravel(), mine[:, :2].ravel(), bounds]))
    across = np.unique(np.concatenate([theirs[:, 2:].ravel(), mine[:, 2:].ravel()]))
    inside = _cover(mine, down, across) > 0
    times = np.where(inside, _cover(theirs, down, across), 0)
    area = np.outer(np.diff(down), np.diff(across))
    rows = ((times > 0) * area).sum(axis=1)
    filled = np.add.reduceat(rows, np.searchsorted(down, bounds[:-1])) if len(rows) else rows
    return Tally(size, int((times * area).sum()) // each, filled // each, bool((times > 1).any()), at_most)


def _run(shape: tuple[int, ...], stride: tuple[int, ...], width: int) -> int:
    """Bytes of a tensor that has no gap; 0 if it has one."""
    run = 1
    for step, size in sorted(zip(stride, shape)):
        if size > 1:
            if step != run:
                return 0
            run *= size
    return run * width


def _follow(offsets: Mapping[tuple, np.ndarray], size: int) -> bool:
    """Whether tensors without gaps lie end to end and fill so many bytes: the usual case, in a tenth of the time."""
    runs = [_run(*kind) for kind in offsets]
    if not all(runs) or sum(run * len(places) for run, places in zip(runs, offsets.values())) != size:
        return False
    starts = np.concatenate([*offsets.values()])
    order = np.argsort(starts)
    ends = (starts + np.repeat(runs, [len(places) for places in offsets.values()]))[order]
    return bool(starts[order[0]] == 0 and (starts[order[1:]] == ends[:-1]).all())


def _rectangles(offsets: np.ndarray, shape: Iterable[int], stride: Iterable[int], width: int, row: int) -> np.ndarray:
    """The bytes of tensors of one shape as rectangles of a table: first row, row after the last, the same of columns.

    Args:
        offsets: of the tensors, in bytes.
        stride: in elements of so many bytes.
        row: bytes of a row of the table.
    """
    run, steps = width, sorted((step * width, n) for n, step in zip(shape, stride) if n > 1 and step)
    while steps and steps[0][0] == run:
        run *= steps.pop(0)[1]
    starts, height = offsets, 1
    merged: list[tuple[int, int]] = []
    for step, n in steps:
        if merged and merged[-1][0] * merged[-1][1] == step:
            step, n = merged[-1][0], merged.pop()[1] * n
        merged.append((step, n))
    for step, n in merged:
        if step == row and height == 1:
            height = n
        else:
            starts = (starts[:, None] + np.arange(n) * step).ravel()
    if height > 1 and (starts % row + run > row).any():  # they go round the table's edge
        starts, height = (starts[:, None] + np.arange(height) * row).ravel(), 1
    top, left, after = starts // row, starts % row, starts + run
    if height > 1 or (left + run <= row).all():
        return np.stack([top, top + height, left, left + run], axis=1)
    first, last, zero = -(-starts // row), after // row, np.zeros_like(top)  # whole rows
    short = last < first
    pieces = [
        np.stack([top, top + 1, left, np.where(short, left + run, row)], axis=1)[short | (left > 0)],
        np.stack([first, last, zero, zero + row], axis=1)[first < last],
        np.stack([last, last + 1, zero, after % row], axis=1)[~short & (after % row > 0)],
    ]
    return np.concatenate(pieces)


def _cover(rectangles: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """How many rectangles cover each cell of a table that is cut at these rows and columns."""
    edges = np.zeros((len(down), len(across)), np.int32)
    top, bottom = np.searchsorted(down, rectangles[:, :2].T)
    left, right = np.searchsorted(across, rectangles[:, 2:].T)
    for rows, columns, change in ((top, left, 1), (bottom, right, 1), (top, right, -1), (bottom, left, -1)):
        np.add.at(edges, (rows, columns), change)
    return edges.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
