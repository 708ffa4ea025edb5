"""The ledger: what became of every tensor of the checkpoint, and of every parameter of the stage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.partition import EXPERT, OTHER_STAGE, OWN, SPECULATIVE, Stage
from glmpp.words import MESSAGE, quoted, shown

if TYPE_CHECKING:
    import torch

LOADED, UNEXPECTED, NOT_REACHED = "loaded", "unexpected", "not reached"
IGNORED, OTHER_RANK = "ignored by the model", "another rank's expert"
COLUMNS = (LOADED, OTHER_STAGE, OTHER_RANK, SPECULATIVE, IGNORED, UNEXPECTED, NOT_REACHED)
UNREAD, WHOLE, UNKNOWN, PARTS = range(4)  # what a rank reads of a tensor; PARTS and up: a kind of parts
EXPECTED, LOST, UNTIED, ABSENT, CUT, DROPPED = "expected", "lost", "untied", "absent", "cut", "dropped"


@dataclass(frozen=True)
class UnloadedParam:
    """What a load left: a parameter at init, or partly; a buffer that the checkpoint has a value for; a tensor without use.

    Attributes:
        kind: EXPECTED: no checkpoint has to hold it; LOST: the checkpoint holds it, under a name that the model drops;
            UNTIED: the config ties it to the embedding, and the model does not; ABSENT: nothing like it was handed over;
            CUT: it was written, and its elements do not belong to those beside them; DROPPED: a tensor of a layer that the
            stage holds, which its model has no parameter for.
        why: in words.
        tensor: the checkpoint's tensor that it should have come from, of LOST and UNTIED.
        in_file, in_model: the values where that tensor and the model first differ after a load of real bytes; None
            without one, and where it is not known which tensor it is. A finding of these kinds whose bytes are in the model
            all the same is EXPECTED.
    """

    kind: str
    why: str
    tensor: str | None = None
    in_file: str | None = None
    in_model: str | None = None

    def __str__(self) -> str:
        values = "" if self.in_file is None else f"; {self.in_file} in the file, {self.in_model} in the model"
        return shown(f"{self.kind}: {self.why}{values}", MESSAGE)


@dataclass
class Ledger:
    """What happened to every tensor of the checkpoint and to every parameter of the stage.

    Attributes:
        tensors: checkpoint tensor -> one of COLUMNS. "ignored by the model": its own mapping of names drops it.
            "unexpected": handed over, neither stored nor known to be somebody else's. "not reached": the load died
            before it (a load that ends well has none).
        parameters: parameter -> (elements written, elements it has).
        unpaired: tensor that came -> its other half, FP8 weight or scale, that never did.
        padding: parameter -> elements of it that no checkpoint fills.
        filled: parameter -> elements that have a value, where that is not what was written: a region was written twice.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    unpaired: dict[str, str] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Tensors per column; the columns add up to the checkpoint."""
        found = Counter(self.tensors.values())
        return {column: found[column] for column in COLUMNS}

    @property
    def left_at_init(self) -> list[str]:
        """Parameters of which not every element was written, padding apart."""
        padding, filled = self.padding, self.filled
        return [
            name
            for name, (written, size) in self.parameters.items()
            if filled.get(name, written) < size - padding.get(name, 0)
        ]

    @property
    def written_twice(self) -> list[str]:
        return [name for name, (written, size) in self.parameters.items() if written > size]

    def in_column(self, column: str) -> list[str]:
        return [name for name, found in self.tensors.items() if found == column]

    def check(
        self,
        checkpoint: Checkpoint,
        stage: Stage,
        may_stay_at_init: Iterable[str] = (),
        experts: Collection[int] | None = None,
    ) -> None:
        """Close the books: every tensor in one column, loaded == owned, nothing left at init, nothing written twice.

        Args:
            may_stay_at_init: parameters that the caller can account for, e.g. kv-cache scales.
            experts: numbers of those that this rank of the stage holds; default all.

        Raises:
            GlmppError: with the first tensor or parameter that does not balance.
        """
        for came, missing in self.unpaired.items():
            raise GlmppError(f"{stage}: {quoted(came)} came and {quoted(missing)} never did, so neither is loaded")
        if self.tensors.keys() != checkpoint.keys():
            stray = sorted(self.tensors.keys() ^ checkpoint.keys())
            example = quoted(stray[0])
            raise GlmppError(f"{stage}: {len(stray)} tensors are in the checkpoint or the ledger only, e.g. {example}")
        for name, column in self.tensors.items():
            expected = {OWN: LOADED}.get(stage.owner(name), stage.owner(name))
            if expected == LOADED and experts is not None and (found := EXPERT.search(name)):
                expected = LOADED if int(found[1]) in experts else OTHER_RANK
            if column != expected:
                raise GlmppError(f"{stage}: tensor {quoted(name)} is {column!r}, expected {expected!r}")
        if left := sorted(set(self.left_at_init) - set(may_stay_at_init)):
            raise GlmppError(f"{stage}: {len(left)} parameters are left at init, e.g. {quoted(left[0])}")
        if self.written_twice:
            raise GlmppError(f"{stage}: parameter {quoted(self.written_twice[0])} was written more than once")


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, to compare what two loaders stored."""
    import torch  # here: a plan needs no tensors, and the import takes seconds

    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)  # a scalar has no dimension to view as bytes
    return hashlib.sha256(head + flat.view(torch.uint8).numpy().tobytes()).hexdigest()
