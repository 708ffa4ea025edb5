"""Which parameters a load has written, seen from outside whichever loader writes them: exactly, or cheaply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmpp.engine.failures import on_behalf

NO_PADDING: Mapping[str, int] = MappingProxyType({})


class WriteRecorder(TorchDispatchMode):
    """While active, sees every in-place write into a model's parameters and buffers, whichever loader makes it.

    vLLM keeps no such record: its `load_weights` returns names that were *looked at*. Views, `.data` and slices share
    their parameter's storage, so the storage tells which parameter an operator writes, on the meta device, too.

    Attributes:
        regions: parameter or buffer -> (byte offset, elements) of every write into it.
        order: names handed over so far, when the weights pass through `hand_over`.
        stored: those during whose turn a parameter or a buffer was written.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.names = {_storage(tensor): name for name, tensor in loadable(model).items()}
        self.regions: dict[str, list[tuple[int, int]]] = {name: [] for name in self.names.values()}
        self.order: list[str] = []
        self.stored: set[str] = set()

    def hand_over(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.order.append(name)
            yield name, tensor

    @property
    def written(self) -> dict[str, int]:
        """Parameter or buffer -> elements written so far, a region that is written again counted again."""
        return {name: sum(elements for _, elements in regions) for name, regions in self.regions.items()}

    @property
    def filled(self) -> dict[str, int]:
        """The same, each region counted once."""
        return {name: sum(elements for _, elements in set(regions)) for name, regions in self.regions.items()}

    @property
    def overwritten(self) -> set[str]:
        """Parameters and buffers of which a region was written more than once."""
        return {name for name, regions in self.regions.items() if len(set(regions)) < len(regions)}

    def left_at_init(self, padding: Mapping[str, int] = NO_PADDING) -> list[str]:
        """Parameters, and buffers that are part of the model's state, of which not every element was written.

        One that was replaced as a whole counts as written, and a region that was written twice as one region.

        Args:
            padding: parameter -> elements that no checkpoint fills, of stacked experts the same number in each.
        """
        kept = {name: tensor for name, tensor in loadable(self.model).items() if self.names.get(_storage(tensor)) == name}
        return [
            name
            for name, tensor in kept.items()
            if not _wholly(tensor, np.array(sorted(set(self.regions[name])), np.int64).reshape(-1, 2), padding.get(name, 0))
        ]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper for that costs several times the method itself

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = _WRITES.get(func)
        if writes is None:
            arguments = func._schema.arguments
            writes = tuple(at for at, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
            _WRITES[func] = writes
        for at in writes:
            value = args[at] if at < len(args) else (kwargs or {}).get(func._schema.arguments[at].name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                name = self.names.get(_storage(tensor)) if isinstance(tensor, torch.Tensor) else None
                if name is not None:
                    self.regions[name].append((tensor.storage_offset() * tensor.element_size(), tensor.numel()))
                    self.stored.update(self.order[-1:])
        return on_behalf(func, *args, **(kwargs or {}))


def loadable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint may fill: the parameters, and the buffers that belong to the model's state, by name."""
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in (buffers | dict(model.named_parameters())).items() if tensor.numel()}


class WriteLog:
    """The same question at a tenth of the price, for real loads: which parameters were written, by address.

    While active, the Python methods that weight loaders write with are wrapped (`copy_`, `fill_`, `zero_`, `index_copy_`,
    `t[i] = x`); each call appends an address and a count, and the sums are made afterwards. `WriteRecorder` sees every
    operator, at a microsecond for each of a dozen per tensor: a third of a second against a twentieth, for a stage of
    17,000 tensors. On meta tensors there are no addresses: there only the recorder works.
    """

    METHODS = ("copy_", "fill_", "zero_", "index_copy_")

    def __init__(self, model: torch.nn.Module):
        self.params = loadable(model)
        self.starts = {name: p.data_ptr() for name, p in self.params.items()}
        self.model = model
        self.calls: list[int] = []  # address, elements, address, elements, …
        self.turns: list[tuple[str, torch.Size, int]] = []  # tensor, its shape, length of `calls` when it was handed over

    def hand_over(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        note, calls = self.turns.append, self.calls
        for name, tensor in weights:
            note((name, tensor.shape, len(calls)))
            yield name, tensor

    def __enter__(self) -> WriteLog:
        log = self.calls.extend
        self.originals = {name: getattr(torch._C.TensorBase, name) for name in (*self.METHODS, "__setitem__")}

        def wrapped(original):
            def method(tensor, *args, **kwargs):
                log((tensor.data_ptr(), tensor.numel()))
                return original(tensor, *args, **kwargs)

            return method

        for name in self.METHODS:
            setattr(torch.Tensor, name, wrapped(self.originals[name]))

        def set_item(tensor, index, value):
            target = tensor[index]
            if target.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                target = tensor  # advanced indexing makes a copy: where it writes is not known
            log((target.data_ptr(), target.numel()))
            return self.originals["__setitem__"](tensor, index, value)

        torch.Tensor.__setitem__ = set_item
        return self

    def __exit__(self, *_) -> None:
        for name in self.originals:
            delattr(torch.Tensor, name)  # the method of the base class shows again

    def left_at_init(self, padding: Mapping[str, int] = NO_PADDING) -> list[str]:
        """As of `WriteRecorder`."""
        order = sorted(self.starts, key=self.starts.__getitem__)
        bounds = np.array([self.starts[name] for name in order] + [np.iinfo(np.int64).max])
        calls, again = self._regions()
        calls = calls[~again]  # the same region written twice is one region
        cuts = np.searchsorted(calls[:, 0], bounds)
        now, left = loadable(self.model), set()
        for name, start, first, last in zip(order, bounds, cuts, cuts[1:]):
            param, regions = self.params[name], calls[first:last] - (start, 0)
            replaced = name not in now or now[name].data_ptr() != start
            if not replaced and not _wholly(param, regions[regions[:, 0] < param.nbytes], padding.get(name, 0)):
                left.add(name)
        return [name for name in self.params if name in left]

    @property
    def overwritten(self) -> set[str]:
        """As of `WriteRecorder`."""
        calls, again = self._regions()
        addresses = calls[again, 0]
        spans = {name: (start, start + self.params[name].nbytes) for name, start in self.starts.items()}
        return {name for name, (a, b) in spans.items() if ((a <= addresses) & (addresses < b)).any()}

    def _regions(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of (address, elements) in ascending order, and which of them are like the one before."""
        calls = np.array(self.calls, dtype=np.int64).reshape(-1, 2)
        calls = calls[np.lexsort((calls[:, 1], calls[:, 0]))]
        again = np.zeros(len(calls), dtype=bool)
        again[1:] = (calls[1:] == calls[:-1]).all(axis=1)
        return calls, again

    def dropped(self) -> dict[str, torch.Size]:
        """Tensors that passed through `hand_over` and during whose turn nothing was written -> shape."""
        addresses = np.array(self.calls[::2], dtype=np.int64)
        starts = np.array(sorted(self.starts.values()), dtype=np.int64)
        ends = np.array([self.starts[name] + self.params[name].nbytes for name in sorted(self.starts, key=self.starts.get)])
        at = np.searchsorted(starts, addresses, side="right") - 1
        hits = np.concatenate([[0], np.cumsum((at >= 0) & (addresses < ends[at]))])
        marks = [mark // 2 for *_, mark in self.turns] + [len(addresses)]
        return {name: shape for (name, shape, _), a, b in zip(self.turns, marks, marks[1:]) if hits[a] == hits[b]}


def _wholly(param: torch.Tensor, regions: np.ndarray, padding: int) -> bool:
    """Whether regions, rows of (byte offset, elements), fill a parameter apart from its padding."""
    written = regions[:, 1].sum()
    if written >= param.numel() or param.dim() < 3 or not padding:
        return bool(written >= param.numel() - padding)
    expert = regions[:, 0] // (param.stride(0) * param.element_size())
    each = np.bincount(expert, weights=regions[:, 1], minlength=param.shape[0])
    return bool(each.min() >= (param.numel() - padding) / param.shape[0])


_WRITES: dict[torch._ops.OpOverload, tuple[int, ...]] = {}  # operator -> positions of the arguments it writes


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
