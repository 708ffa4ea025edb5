"""One stage's load by vLLM's own loader, and the failures on the way."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils._device import _device_constructors
from vllm.config import set_current_vllm_config
from vllm.utils.torch_utils import set_default_torch_dtype

from glmpp.dryrun.child.build import Built
from glmpp.dryrun.child.helper_patch import HelperPatch
from glmpp.dryrun.messages import Failure
from glmpp.dryrun.pretend.failures import describe, is_kits
from glmpp.dryrun.pretend.targets import is_gpu
from glmpp.errors import on_behalf
from glmpp.serving.write_tracking import WriteRecorder

HELD_FOR = 50  # tensors: halves of a pair come closer together
LINGERING = 4  # tensors that live on in the variables of a loop are not held


class StageLoad:
    """One stage's load, and the failures on the way.

    Attributes:
        failures: in their order.
        error: the first of them as it was raised; None without one.
        recorder, loader: of the last pass over the checkpoint.
        held: tensor -> bytes, of those that the model still held when the last one, or HELD_FOR others, had been handed
            over; {} for a model that makes a list of all of them first.
    """

    def __init__(self, built: Built, guard: HelperPatch, make_loader: Callable, nbytes: dict[str, int], device: str):
        """Args:
        make_loader: the loader for a config, whose weights pass through a given function on their way to the model.
        nbytes: tensor -> bytes.
        device: of the parameters.
        """
        self.built, self.guard, self.make_loader, self.nbytes, self.device = built, guard, make_loader, nbytes, device
        self.failures: list[Failure] = []
        self.error: Exception | None = None
        self.failed: set[str] = set()
        self.loader = None

    def run(self, all_failures: bool) -> None:
        """Load until the end or the first failure.

        Args:
            all_failures: drop the tensor that failed and go on with the rest. Then load once more from the start without
                those that failed, so that the ledger says what they leave undone.
        """
        if self.ends_well(self.load_all) or not all_failures:
            return
        for step in (self.load_rest, self.load_all):
            while not self.ends_well(step) and self.failures[-1].tensor:
                pass

    def ends_well(self, step) -> bool:
        """Take a step; a failure on the way is noted."""
        try:
            step()
            return True
        except Exception as error:
            if is_kits(error):
                raise
            self.error = self.error or error
            tensor = self.recorder.order[-1] if self.recorder.order and not self.exhausted else None
            failure = describe(error)
            failure.tensor = tensor
            failure.traceback = [] if self.failures else failure.traceback
            self.failures.append(failure)
            self.failed.add(tensor)
            return False

    def load_all(self) -> None:
        """What vLLM does."""
        self.guard.reset()
        self.recorder, self.exhausted, self.held = WriteRecorder(self.built.model), False, {}
        self.loader = self.make_loader(self.built.config, self.hand_over)
        with self.surroundings():
            self.loader.load_weights(self.built.model, self.built.model_config)

    def load_rest(self) -> None:
        """What comes after the tensor that failed."""
        with self.surroundings():
            self.built.model.load_weights(self.rest)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        dtype, device = self.built.model_config.dtype, constructors_on(self.device)
        with set_current_vllm_config(self.built.config), set_default_torch_dtype(dtype), device, self.recorder:
            yield

    def hand_over(self, weights):
        self.rest = self.until_exhausted(self.recorder.hand_over(pair for pair in weights if pair[0] not in self.failed))
        return self.rest

    def until_exhausted(self, weights):
        """Hand over the weights, and watch how long the model holds on to each."""
        given: list[_Watched] = []
        died: dict[int, int] = {}

        def note(watched: _Watched) -> None:
            died[watched.at] = len(given)

        for name, tensor in weights:
            watched = _Watched(tensor, note)
            watched.at = len(given)
            given.append(watched)
            yield name, tensor
            del tensor
        self.exhausted = True
        names = self.recorder.order[-len(given) :]
        long = [at for at in range(len(given) - 1) if died.get(at, math.inf) - at > HELD_FOR]
        held = {names[at]: self.nbytes[names[at]] for at in long}
        stored = self.recorder.stored
        lists_all = stored and len(stored & held.keys()) > len(stored) / 2
        self.held = {} if lists_all or len(held) <= LINGERING else held


@contextlib.contextmanager
def constructors_on(device: str) -> Iterator[None]:
    """`torch.empty`, `torch.zeros` and their kin make tensors on a device unless told otherwise.

    So does `with torch.device(…)`, but by a look at every call of any operator: a third of a load's time at PP=1.
    """

    def wrapped(construct):
        def call(*args, **kwargs):
            wanted = kwargs.get("device")
            if wanted is None or is_gpu(wanted):
                kwargs["device"] = device
            return on_behalf(construct, *args, **kwargs)

        return call

    originals = {f.__name__: f for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    for name, construct in originals.items():
        setattr(torch, name, wrapped(construct))
    try:
        yield
    finally:
        for name, construct in originals.items():
            setattr(torch, name, construct)


class _Watched(weakref.ref):
    """A reference that knows the place of its tensor in the order."""

    __slots__ = ("at",)
