"""Which elements of the tensors that were handed over a load has read: the sources of what it writes."""

from __future__ import annotations

import base64
import zlib
from array import array
from bisect import bisect, insort
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import inf

import torch

from glmpp.ledger import PARTS, UNKNOWN, UNREAD, WHOLE

Region = tuple[int, int, tuple[tuple[int, int], ...]]


class Reads:
    """Views that loaders take of the tensors handed over, found again where they are the source of a write.

    A tensor lies in a storage of its own, or in a part of a file's, so storage, offset, shape and strides of a source tell
    which elements are read. A copy (`contiguous`, another dtype) is followed back to what it was made of; of what any other
    operator made nothing is known, and all of the tensor counts as read.

    Attributes:
        of: turn of a tensor -> regions that were read of it, see `region`.
        unknown: turns during which the model was given values of unknown origin.
    """

    def __init__(self):
        self.of: dict[int, set[Region]] = {}
        self.unknown: set[int] = set()
        self._origins: dict[int, list[tuple[int, int]] | _Copy] = {}  # storage -> first byte and turn of its tensors
        self._alive: list[int] = []  # as long as these are held no other storage gets the number of one that has gone

    def hand_over(self, turn: int, tensor: torch.Tensor) -> None:
        storage = self._held(tensor)
        entry = (tensor.storage_offset() * tensor.element_size(), turn)
        if isinstance(there := self._origins.setdefault(storage, [entry]), list) and there[0] is not entry:
            insort(there, entry)

    def note(self, sources: Iterable[object], into_model: bool, turn: int, own: Mapping[int, object]) -> None:
        """An operator has written.

        Args:
            sources: its other arguments.
            into_model: whether it has written into the model, whose storages are `own`.
            turn: of the tensor that was handed over last.
        """
        given = [(source, storage) for source in sources if (storage := storage_of(source)) is not None]
        known = [pair for pair in given if pair[1] in self._origins]
        for source, storage in known:
            self.add(source, storage)
        if into_model and not known and any(storage not in own for _, storage in given):
            self.unknown.add(turn)

    def add(self, tensor: torch.Tensor, storage: int) -> None:
        """A tensor of this storage was read; nothing happens if it is none of those handed over."""
        if storage in self._origins:
            turn, where = self._find(storage, *_layout(tensor))
            self.of.setdefault(turn, set()).add(where)

    def copied(self, source: torch.Tensor, result: torch.Tensor) -> None:
        if (storage := storage_of(source)) in self._origins:
            self._origins[self._held(result)] = _Copy(storage, _layout(source), _layout(result))

    def message(self, order: list[str], model: Iterable[torch.Tensor], nbytes: Mapping[str, int], loaded: set[str]) -> dict:
        """What was read of each tensor, as plain values.

        Args:
            order: names handed over.
            model: its parameters and buffers: one of them may be a tensor that was handed over.
            nbytes: all tensors of the checkpoint, in its order -> bytes.
            loaded: those that have left a trace in the model; of others nothing counts as read.

        Returns:
            "kinds": lists of regions; "numbers": for each tensor UNREAD, WHOLE, UNKNOWN, or PARTS and up for a kind, as
            32 bits each, packed.
        """
        for tensor in model:
            self.add(tensor, storage_of(tensor))
        turns = {name: turn for turn, name in enumerate(order, 1) if name in loaded}
        kinds: dict[tuple, int] = {}

        def number(name: str, size: int) -> int:
            if (turn := turns.get(name)) is None:
                return UNREAD
            regions = self.of.get(turn)
            if turn in self.unknown or not regions:
                return UNKNOWN
            if (0, size, ()) in regions:
                return WHOLE
            return kinds.setdefault(tuple(sorted(regions)), len(kinds) + PARTS)

        numbers = array("I", [number(name, size) for name, size in nbytes.items()])
        return {"kinds": list(kinds), "numbers": base64.b64encode(zlib.compress(numbers.tobytes())).decode()}

    def _find(self, storage: int, shape: tuple, steps: tuple, start: int, width: int) -> tuple[int, Region]:
        origin = self._origins[storage]
        if isinstance(origin, _Copy):
            return self._find(origin.storage, *origin.back(shape, steps, start, width))
        first, turn = origin[bisect(origin, (start, inf)) - 1]
        return turn, region(shape, steps, start - first, width)

    def _held(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if (number := storage._cdata) not in self._origins:
            self._alive.append(storage._weak_ref())
        return number

    def __del__(self):
        for number in self._alive:
            torch.UntypedStorage._free_weak_ref(number)


class _Copy:
    """A tensor that has the elements of another, each in its place, and perhaps of another dtype."""

    def __init__(self, storage: int, source: tuple, result: tuple):
        """Args: source, result: shape, strides in bytes, first byte, bytes of an element; the source is in this storage."""
        self.storage, self.source, self.result = storage, source, result

    def back(self, shape: tuple, steps: tuple, start: int, width: int) -> tuple:
        """What a view of the copy is a copy of; of one that does not go along its dimensions all that it may be."""
        sizes, theirs, first, each = self.source
        rest, found, own = start - self.result[2], first, {}
        for step, size, their in sorted(zip(self.result[1], sizes, theirs), reverse=True):
            if size > 1:
                at, rest = divmod(rest, step) if step else (0, rest)
                own[step], found = (their, size - at), found + at * their
        taken = [(step, size) for step, size in zip(steps, shape) if size > 1]
        if rest or width != self.result[3] or any(size > own.get(step, (0, 0))[1] for step, size in taken):
            return self.source
        return tuple(size for _, size in taken), tuple(own[step][0] for step, _ in taken), found, each


@lru_cache(100_000)
def region(shape: tuple[int, ...], steps: tuple[int, ...], start: int, width: int) -> Region:
    """A view's bytes: the first one, the length of a run without gaps, and (step, number) of its repetitions."""
    run, rest = width, []
    for step, size in sorted((step, size) for step, size in zip(steps, shape) if size > 1 and step):
        if not rest and step == run:
            run *= size
        elif rest and rest[-1][0] * rest[-1][1] == step:
            rest[-1] = (rest[-1][0], rest[-1][1] * size)
        else:
            rest.append((step, size))
    return start, run, tuple(rest)


def _layout(tensor: torch.Tensor) -> tuple[tuple, tuple, int, int]:
    """Shape, strides in bytes, first byte, bytes of an element."""
    width = tensor.element_size()
    return tuple(tensor.shape), tuple(step * width for step in tensor.stride()), tensor.storage_offset() * width, width


def storage_of(tensor: object) -> int | None:
    """The number of a tensor's storage; None of a sparse one, which has none, and of what is no tensor."""
    try:
        return tensor.untyped_storage()._cdata
    except (AttributeError, NotImplementedError):
        return None
