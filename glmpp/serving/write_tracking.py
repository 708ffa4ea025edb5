"""Which elements of a model's parameters a load has written, seen from outside whichever loader writes them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from glmpp.errors import on_behalf
from glmpp.serving.filled import Tally, filled_by
from glmpp.serving.indexed_writes import PLACES, Place
from glmpp.serving.read_tracking import Reads, storage_of

COPIES = ("clone", "_to_copy")  # operators that make a tensor of another's elements, each in its place
NO_PADDING: Mapping[str, int] = MappingProxyType({})


class WriteRecorder:
    """While active, sees every operator that writes into a model's parameters and buffers, whichever loader calls it.

    vLLM keeps no such record: its `load_weights` returns names that were *looked at*. Views, `.data` and slices share
    their parameter's storage, so storage, offset, shape and strides of what an operator writes tell which elements those
    are, on the meta device, too. Recorders nest. Not seen is what threads do that were there before, and what is not done by
    an operator of torch (a kernel that is given an address, numpy).

    Attributes:
        order: names handed over so far, when the weights pass through `hand_over`.
        shapes: of these tensors, one for each.
        zeros: names of biases that were handed over with zeros alone; those without data are not among them.
        reads: what is read of them.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.reads = model, Reads()
        self.order: list[str] = []
        self.shapes: list[torch.Size] = []
        self.zeros: set[str] = set()
        self._homes: dict[int, _Home] = {}
        self._starts: dict[str, int] = {}
        self._kinds: dict[tuple, tuple] = {}  # each once: there are a hundred thousand writes, and few kinds
        self._alive: list[StorageWeakRef] = []  # while these are held no other storage gets the number of one that has gone
        for name, tensor in loadable(model).items():
            if (storage := storage_of(tensor)) is not None:
                self._alive.append(StorageWeakRef(tensor.untyped_storage()))
                self._starts[name] = storage
                self._homes.setdefault(storage, _Home()).tensors[name] = tensor
        self._tallies: tuple = ((), {})
        self._guards: list = []

    def hand_over(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.order.append(name)
            self.shapes.append(tensor.shape)
            if name.endswith("bias") and not tensor.is_meta and not tensor.any():
                self.zeros.add(name)
            self.reads.hand_over(len(self.order), tensor)
            yield name, tensor

    def __enter__(self) -> WriteRecorder:
        _register()
        self._guards.append(torch._C._IncludeDispatchKeyGuard(_KEY))
        self._guards[-1].__enter__()
        _active.append(self)
        run = self._run = threading.Thread.run

        def run_seen(thread: threading.Thread) -> None:
            with torch._C._IncludeDispatchKeyGuard(_KEY):
                run(thread)

        threading.Thread.run = run_seen
        return self

    def __exit__(self, *error) -> None:
        threading.Thread.run = self._run
        _active.remove(self)
        self._guards.pop().__exit__(*error)

    def note_sources(self, storage: int | None, sources: Iterable[object]) -> None:
        """An operator has written into a storage, from its other arguments."""
        self.reads.note(sources, storage in self._homes, len(self.order), self._homes)

    def note(self, tensor: torch.Tensor, storage: int, find_place: Callable[[], Place | None] | None) -> None:
        """An operator has written a tensor: all of it, or a part that can be found."""
        home = self._homes.get(storage)
        if home is None:
            return
        shape, start, size, at_most = tensor.shape, tensor.storage_offset(), tensor.element_size(), 0
        if find_place is not None and tensor.numel() and (place := find_place()) is not None:
            shape, start, at_most = place.shape, start + place.starts, place.at_most
            if not at_most and not len(start):
                return
        if 0 not in shape:
            kind = (shape, tensor.stride(), size)
            home.writes.append((len(self.order), self._kinds.setdefault(kind, kind), start * size, at_most))

    def traces(self, names: Set[str]) -> dict[str, dict[str, int]]:
        """Some tensors that were handed over -> parameter or buffer written during their turn -> elements, at most."""
        found: dict[str, dict[str, int]] = {name: {} for name in names}
        for home in self._homes.values():
            for turn, (shape, *_), start, at_most in home.writes:
                if turn and (into := found.get(self.order[turn - 1])) is not None:
                    for name in home.tensors:
                        into[name] = into.get(name, 0) + (at_most or math.prod(shape) * np.size(start))
        return found

    @property
    def stored(self) -> set[str]:
        """Tensors during whose turn a parameter or a buffer was written."""
        return {self.order[turn - 1] for home in self._homes.values() for turn, *_ in home.writes if turn}

    @property
    def written(self) -> dict[str, int]:
        """Parameter or buffer -> elements written, each as often as it was; of one that was replaced as a whole, all."""
        return {name: tally.written for name, tally in self.tallies().items()}

    @property
    def filled(self) -> dict[str, int]:
        """The same, each element counted once."""
        return {name: int(tally.filled.sum()) for name, tally in self.tallies().items()}

    @property
    def overwritten(self) -> set[str]:
        """Parameters and buffers of which an element was written more than once."""
        return {name for name, tally in self.tallies().items() if tally.twice}

    def left_at_init(self, padding: Mapping[str, int] = NO_PADDING) -> list[str]:
        """Parameters, and buffers that are part of the model's state, of which certainly not every element was written.

        Args:
            padding: parameter -> elements that no checkpoint fills, of stacked experts the same number in each.
        """
        return [name for name, tally in self.tallies().items() if not tally.is_whole(padding.get(name, 0), tally.at_most)]

    def unplaced(self, padding: Mapping[str, int] = NO_PADDING) -> dict[str, int]:
        """Parameter or buffer of which it is not known whether every element was written -> elements, at most, that were
        written at an index which has no data, being on the meta device."""
        return {
            name: tally.at_most
            for name, tally in self.tallies().items()
            if tally.is_whole(padding.get(name, 0), tally.at_most) and not tally.is_whole(padding.get(name, 0), 0)
        }

    def unwritten_rows(self, name: str) -> list[int]:
        """Indices of a parameter's first dimension of which not every element was written."""
        storage, tensor = self._starts[name], loadable(self.model)[name]
        if storage_of(tensor) != storage or not tensor.dim():
            return []
        writes = self._homes[storage].writes
        return [at for at, row in enumerate(tensor) if not filled_by(row, writes).is_whole(0, 0)]

    def tallies(self) -> dict[str, Tally]:
        """Parameter or buffer -> what was written of it."""
        now = loadable(self.model)
        writes = sum(len(home.writes) for home in self._homes.values())
        state = (writes, [(storage_of(tensor), tensor.shape) for tensor in now.values()])
        if state != self._tallies[0]:
            made = {name: self._tally(name, tensor) for name, tensor in now.items() if name in self._starts}
            self._tallies = (state, made)
        return self._tallies[1]

    def _tally(self, name: str, tensor: torch.Tensor) -> Tally:
        """Args: tensor: what the parameter is now."""
        storage, size = storage_of(tensor), tensor.numel()
        if storage != self._starts[name]:  # replaced as a whole
            return Tally(size, size, np.array([size]))
        return filled_by(tensor, self._homes[storage].writes)


def loadable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint may fill: the parameters, and the buffers that belong to the model's state, by name."""
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in (buffers | parameters(model)).items() if tensor.numel()}


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those that have a shape. GGUF's have none before they are loaded, and cannot be looked at."""
    return {name: parameter for name, parameter in model.named_parameters() if not is_lazy(parameter)}


@dataclass
class _Home:
    """A storage with parameters in it, and the writes into it: the turn; shape, strides and bytes of an element of what was
    written; where it starts in bytes (one place or an array of them); and 0, or how many elements at most if the places are
    not known."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    writes: list[tuple] = field(default_factory=list)


# Operators that change something of a tensor, and not its elements. Those that change its shape have a tag.
_NO_WRITE = {"aten::record_stream", "aten::retain_grad", "aten::set_data", "aten::requires_grad_", "aten::_resize_output_"}

# Each operator that writes has a kernel of the kit's under a key of the dispatcher that torch has for a library of its own
# kind (torchdistx) and does not use. The key is on while a recorder is active, in its thread alone. All other operators fall
# through it, which costs nothing: of the operators of a load four fifths make views. A `TorchDispatchMode` would see each of
# them, at 4 microseconds, and that is half of the time of a load.
_KEY = torch._C._dispatch_key_parse("DeferredInit")
_KEYS = torch._C.DispatchKeySet(_KEY)
_active: list[WriteRecorder] = []
_libraries: dict[str, torch.library.Library] = {}
_known: set[str] = set()


def _register() -> None:
    """Give every operator that writes its kernel; again for operators that have been registered since."""
    if not _libraries:
        _libraries["_"] = torch.library.Library("_", "IMPL")
        _libraries["_"].fallback(torch.library.fallthrough_kernel, "DeferredInit")
        _libraries["aten"] = torch.library.Library("aten", "IMPL")
        for name in COPIES:
            _libraries["aten"].impl(name, _copying(getattr(torch.ops.aten, name).default), "DeferredInit")
    new = set(torch._C._dispatch_get_all_op_names()) - _known
    _known.update(new)
    for full in new:
        name, _, overload = full.partition(".")
        space = name.partition("::")[0]
        schema = torch._C._get_schema(name, overload)
        if space == "prim" or name in _NO_WRITE or not any(_is_written(argument) for argument in schema.arguments):
            continue
        if space not in _libraries:
            _libraries[space] = torch.library.Library(space, "IMPL")
        _libraries[space].impl(full.partition("::")[2], _kernel(name, overload, schema), "DeferredInit")


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _kernel(name: str, overload: str, schema) -> Callable:
    """What is called in the place of an operator: the operator, and then every recorder with what it has written."""
    names = [argument.name for argument in schema.arguments]
    written = [(at, argument.name) for at, argument in enumerate(schema.arguments) if _is_written(argument)]
    places = PLACES.get(name) if names[0] == "self" and written[0][0] == 0 else None
    alone = written == [(0, names[0])] and str(schema.arguments[0].type) == "Tensor"
    below, operator = torch._C._ExcludeDispatchKeyGuard, None

    def kernel(*args, **kwargs):
        nonlocal operator, written, alone
        if operator is None:
            space, _, base = name.partition("::")
            found = getattr(getattr(getattr(torch.ops, space), base), overload or "default")
            if torch.Tag.inplace_view in found.tags:  # it changes the tensor's shape, and not its elements
                written, alone = [], False
            operator = found._op
        with below(_KEYS):
            result = on_behalf(operator, *args, **kwargs)
            for tensor in args[:1] if alone else _given(written, args, kwargs):
                storage = storage_of(tensor)
                if storage is not None:
                    place = partial(places, **dict(zip(names, args)), **kwargs) if places else None
                    for recorder in _active:
                        recorder.note(tensor, storage, place)
                        recorder.note_sources(storage, args[1:] if alone and not kwargs else _others(written, args, kwargs))
        return result

    return kernel


def _copying(operator: Callable) -> Callable:
    """What is called in the place of an operator that makes a copy: it, and then every recorder of reads."""

    def kernel(source, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            result = on_behalf(operator, source, *args, **kwargs)
            for recorder in _active:
                recorder.reads.copied(source, result)
        return result

    return kernel


def _others(written: list[tuple[int, str]], args: tuple, kwargs: dict) -> Iterator[object]:
    """What an operator is given for the arguments that it does not write; of a list each."""
    ats, names = {at for at, _ in written}, {name for _, name in written}
    values = [value for at, value in enumerate(args) if at not in ats]
    for value in (*values, *(value for name, value in kwargs.items() if name not in names)):
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _given(written: list[tuple[int, str]], args: tuple, kwargs: dict) -> Iterator[object]:
    """What an operator is given for the arguments that it writes; of a list each."""
    for at, argument in written:
        value = args[at] if at < len(args) else kwargs.get(argument)
        yield from value if isinstance(value, (list, tuple)) else (value,)
