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
        whole: turns of tensors of which all was read at once.
        of: turn of another -> regions that were read of it, see `region`.
        unknown: turns during which the model was given values of unknown origin.
    """

    def __init__(self):
        self.whole: set[int] = set()
        self.of: dict[int, set[Region]] = {}
        self.unknown: set[int] = set()
        # By number of a storage. As long as there is a weak reference to each no other gets the number of one that has gone.
        self._origins: dict[int, int | list[tuple[int, int]] | _Copy] = {}
        self._last: int | None = None

    def hand_over(self, turn: int, tensor: torch.Tensor) -> None:
        """A storage holds one tensor, from its start; or several, a list of where each starts and its turn."""
        if self._last is not None and torch.UntypedStorage._expired(self._last):  # most are other stages', and let go of
            del self._origins[self._last]
            torch.UntypedStorage._free_weak_ref(self._last)
        storage, start = tensor.untyped_storage(), tensor.storage_offset()
        number = self._last = storage._cdata
        there = self._origins.get(number)
        if there is None:
            storage._weak_ref()
        if there is None and not start:
            self._origins[number] = turn
        elif not isinstance(there, _Copy):
            several = there if isinstance(there, list) else [(0, there)] if there else []
            insort(several, (start * tensor.element_size(), turn))
            self._origins[number] = several

    def note(self, sources: Iterable[object], into_model: bool, turn: int, own: Mapping[int, object]) -> None:
        """An operator has written.

        Args:
            sources: its other arguments.
            into_model: whether it has written into the model, whose storages are `own`.
            turn: of the tensor that was handed over last.
        """
        known = foreign = False
        for source in sources:
            if isinstance(source, torch.Tensor) and (storage := storage_of(source)) is not None:
                known = self.add(source, storage) or known
                foreign = foreign or storage not in own
        if into_model and foreign and not known:
            self.unknown.add(turn)

    def add(self, tensor: torch.Tensor, storage: int | None) -> bool:
        """A tensor of this storage was read. Returns whether it is one of those handed over, or made of one."""
        origin = self._origins.get(storage)
        if origin is None:
            return False
        if type(origin) is int and tensor.nbytes == tensor.untyped_storage().nbytes() and tensor.is_contiguous():
            self.whole.add(origin)
        else:
            turn, where = self._find(origin, *_layout(tensor))
            self.of.setdefault(turn, set()).add(where)
        return True

    def has_read(self, turn: int) -> bool:
        """Whether something was read of a tensor; also where that is not known."""
        return turn in self.whole or turn in self.of or turn in self.unknown

    def copied(self, source: torch.Tensor, result: torch.Tensor) -> None:
        if (origin := self._origins.get(storage_of(source))) is not None:
            storage = result.untyped_storage()
            if storage._cdata not in self._origins:
                storage._weak_ref()
            self._origins[storage._cdata] = _Copy(origin, _layout(source), _layout(result))

    def summary(
        self, order: list[str], model: Iterable[torch.Tensor], nbytes: Mapping[str, int], loaded: set[str]
    ) -> tuple[str, list]:
        """What was read of each tensor, as plain values.

        Args:
            order: names handed over.
            model: its parameters and buffers: one of them may be a tensor that was handed over.
            nbytes: all tensors of the checkpoint, in its order -> bytes.
            loaded: those that have left a trace in the model; of others nothing counts as read.

        Returns:
            For each tensor UNREAD, WHOLE, UNKNOWN, or PARTS and up for a kind, as 32 bits each, packed; and the kinds, lists
            of regions.
        """
        for tensor in model:
            self.add(tensor, storage_of(tensor))
        turns = {name: turn for turn, name in enumerate(order, 1) if name in loaded}
        kinds: dict[tuple, int] = {}

        def number(name: str, size: int) -> int:
            if (turn := turns.get(name)) is None:
                return UNREAD
            regions = self.of.get(turn, ())
            if turn in self.unknown or not (regions or turn in self.whole):
                return UNKNOWN
            if turn in self.whole or (0, size, ()) in regions:
                return WHOLE
            return kinds.setdefault(tuple(sorted(regions)), len(kinds) + PARTS)

        numbers = array("I", [number(name, size) for name, size in nbytes.items()])
        return base64.b64encode(zlib.compress(numbers.tobytes())).decode(), list(kinds)

    def _find(self, origin: int | list | _Copy, shape: tuple, steps: tuple, start: int, width: int) -> tuple[int, Region]:
        if isinstance(origin, _Copy):
            return self._find(origin.origin, *origin.back(shape, steps, start, width))
        first, turn = (0, origin) if isinstance(origin, int) else origin[bisect(origin, (start, inf)) - 1]
        return turn, region(shape, steps, start - first, width)

    def __del__(self):
        for number in self._origins:
            torch.UntypedStorage._free_weak_ref(number)


class _Copy:
    """A tensor that has the elements of another, each in its place, and perhaps of another dtype."""

    def __init__(self, origin: int | list | _Copy, source: tuple, result: tuple):
        """Args: origin: of the source's storage; source, result: shape, strides in bytes, first byte, an element's bytes."""
        self.origin, self.source, self.result = origin, source, result

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
