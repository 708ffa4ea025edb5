"""Where an operator writes that takes an index or a mask: found by letting it write ones into a small table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Place:
    """Where an operator writes in a tensor.

    Attributes:
        shape: of each of the pieces, whose strides are the tensor's.
        starts: where they start in the tensor, in elements.
        at_most: 0, or how many elements at most are written at places that are not known.
    """

    shape: tuple[int, ...] = ()
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    at_most: int = 0


def _place(self: torch.Tensor, axes: Iterable[int], index: list, count: int, mark: Callable) -> Place | None:
    """Where an operator writes that is given an index or a mask: it is called on a small table of its own. None: everywhere.

    Args:
        axes: dimensions that the index speaks of; of the others everything is written.
        index: tensors, None in the place of some.
        count: how many pieces they speak of at most.
        mark: given a table of zeros and the index, it writes ones where the operator writes.
    """
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(self.shape))
    sizes = [size if axis in axes else 1 for axis, size in enumerate(self.shape)]
    try:
        with torch._C._DisableTorchDispatch():
            here = [tensor if tensor is None else _as_index(tensor.cpu()) for tensor in index]
            table = mark(torch.zeros(sizes, dtype=torch.uint8, device="cpu"), *here).numpy()
    except (IndexError, RuntimeError):  # it has no data, or is out of bounds, of which the meta device says nothing
        return Place(at_most=min(count * math.prod(shape), self.numel()))
    if table.all():
        return None
    starts = np.zeros(np.count_nonzero(table), np.int64)
    for axis, at in enumerate(table.nonzero()) if table.ndim else ():
        starts += at * self.stride(axis)
    return Place(shape, starts)


def _as_index(tensor: torch.Tensor) -> torch.Tensor:
    """An index of a kind that every operator takes: a mask of bytes is one of bools to the operators that take it."""
    if tensor.dtype is torch.uint8:
        return tensor.bool()
    return tensor if tensor.dtype is torch.bool else tensor.long()


def _indexed(self, indices, **_):
    axes, axis, given = [], 0, [index for index in indices if index is not None]
    masks = [index for index in given if index.dtype in (torch.bool, torch.uint8)]
    for index in indices:
        after = axis + (index.dim() if any(index is mask for mask in masks) else 1)
        axes += range(axis, after) if index is not None else ()
        axis = after
    count = self.numel() if masks else math.prod(torch.broadcast_shapes(*(index.shape for index in given)))
    one = torch.ones((), dtype=torch.uint8, device="cpu")
    return _place(self, axes, indices, count, lambda table, *index: torch.ops.aten.index_put_(table, index, one))


def _along(self, dim, index, **_):
    axis = dim % max(self.dim(), 1)
    return _place(self, [axis], [index], index.numel(), lambda table, index: table.index_fill_(axis, index, 1))


def _scattered(self, dim, index, **_):
    axes = range(self.dim())
    return _place(self, axes, [index], index.numel(), lambda table, index: table.scatter_(dim, index, 1))


def _masked(self, mask, **_):
    mask = mask.reshape((1,) * (self.dim() - mask.dim()) + mask.shape)
    axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
    return _place(self, axes, [mask], mask.numel(), lambda table, mask: table.masked_fill_(mask, 1))


def _put(self, index, **_):
    def mark(table, index):
        return table.put_(index, torch.ones(index.shape, dtype=torch.uint8, device="cpu"))

    return _place(self, range(self.dim()), [index], index.numel(), mark)


def _diagonal(self, fill_value, wrap=False):
    return _place(self, range(self.dim()), [], 0, lambda table: table.fill_diagonal_(1, wrap))


# Operators that write a part of `self`, by its schema's arguments.
PLACES: dict[str, Callable[..., Place | None]] = {
    **dict.fromkeys(("aten::index_put_", "aten::_index_put_impl_"), _indexed),
    **dict.fromkeys(("aten::index_copy_", "aten::index_fill_", "aten::index_add_", "aten::index_reduce_"), _along),
    **dict.fromkeys(("aten::scatter_", "aten::scatter_add_", "aten::scatter_reduce_"), _scattered),
    **dict.fromkeys(("aten::masked_fill_", "aten::masked_scatter_"), _masked),
    "aten::put_": _put,
    "aten::fill_diagonal_": _diagonal,
}
