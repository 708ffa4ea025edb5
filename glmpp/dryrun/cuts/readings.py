"""The second side of completeness: what all ranks read of a tensor, and what one reads of a weight and of its scales."""

from __future__ import annotations

import base64
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain, product
from math import prod

import numpy as np

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.cut import Cut
from glmpp.dryrun.cuts.regions import Regions, between_ranks, compared, covered, where
from glmpp.dryrun.messages import StageResult
from glmpp.formats.tensor import TensorSpec
from glmpp.ledger import LOADED, OTHER_RANK, PARTS, UNEXPECTED, UNKNOWN, UNREAD, WHOLE
from glmpp.partition import EXPERT, OTHER_STAGE

SCALES = re.compile(r"[._](weight_)?(scales?(_inv)?|zero_point|q?zeros)$")
ORDER = re.compile(r"[._](weight_)?g_idx$")
WEIGHTS = re.compile(r"[._](q?weight(_packed)?|blocks)$")


class Reading:
    """What one rank has read, from the result of its load.

    Attributes:
        numbers: for each tensor of the checkpoint UNREAD, WHOLE, UNKNOWN, or PARTS and up for a kind of parts.
        regions: kind of parts -> what is read.
        columns: where each tensor is in the rank's ledger.
        experts: numbers of those that it holds; None without expert parallelism.
    """

    def __init__(self, result: StageResult):
        self.numbers = np.frombuffer(zlib.decompress(base64.b64decode(result.reads.numbers)), np.uint32)
        self.regions: dict[int, Regions] = {
            number: tuple((start, run, tuple(map(tuple, rest))) for start, run, rest in kind)
            for number, kind in enumerate(result.reads.kinds, PARTS)
        }
        columns, counts = zip(*result.columns) if result.columns else ((), ())
        self.columns = np.repeat(columns, counts)
        self.experts = result.experts

    def regions_of(self, at: int) -> Regions | None:
        """What is read of a tensor; None: all."""
        return None if self.numbers[at] == WHOLE else self.regions.get(int(self.numbers[at]), ())


class Readings:
    """What the ranks of a deployment have read.

    Attributes:
        ranks: (stage, tensor rank, data rank) -> its reading, in order.
        size: ranks of a stage.
    """

    def __init__(self, results: Sequence[StageResult], checkpoint: Checkpoint, sizes: tuple[int, int]):
        """Args:
        results: of ranks; left out are those whose load did not end, and a control's or a drafter's.
        sizes: tensor ranks and replicas of a stage.
        """
        told = {
            (one.run.stage, one.run.dp_rank, one.run.tp_rank): one
            for one in results
            if is_told(one) and not (one.run.control or one.run.drafter)
        }
        self.specs, self.sizes, self.size = list(checkpoint.values()), sizes, prod(sizes)
        asked = any(is_told(one) and (one.reads.kinds or UNEXPECTED in dict(one.columns)) for one in results)
        quantization = checkpoint.config.get("quantization_config")
        in_order = isinstance(quantization, dict) and quantization.get("desc_act") is True
        self.pairs = pairs_of(self.specs, in_order) if asked else np.zeros((0, 2), np.int64)
        self.ranks = {(stage, rank, at): Reading(told[stage, at, rank]) for stage, at, rank in sorted(told)}
        self.ran = Counter(stage for stage, *_ in self.ranks)

    def of_rank(self, result: StageResult) -> list[Cut]:
        """Weights of which a rank, a control or a drafter reads other elements than those that its scales are of."""
        return mismatched(self.specs, self.pairs, Reading(result)) if is_told(result) else []

    def unread(self) -> list[Cut]:
        """What is read by no rank, if all ranks of the stages were run that read something of a tensor."""
        cuts = []
        for key, ats in self._in_part().items():
            if self._all_ran(key) and (table := self._table(key)) is not None and not table[1].all():
                dimension, found = where(~table[1], table[0], *key[:2])
                elements = tuple((first, after - 1) for first, after in found)
                cuts += [Cut(self.specs[at].name, dimension, elements) for at in ats]
        if all(count == self.size for count in self.ran.values()):
            cuts += [Cut(spec.name, 0, ()) for spec in self._nobodys()]
        return cuts

    def stages_to_run(self) -> list[int]:
        """Stages of which not every rank was run, where what the others read cannot be told from the first and the last."""
        asked = set()
        for key in self._in_part():
            if (table := self._table(key, between=True)) is None or not table[1].all():
                asked |= self._stages_of(key)
        for (stage, *_), reading in self.ranks.items():
            if mismatched(self.specs, self.pairs, reading, strict=True):
                asked.add(stage)
        if self._are_too_many({int(EXPERT.search(spec.name)[1]) for spec in self._nobodys()}):
            asked |= self.ran.keys()
        return sorted(stage for stage in asked if self.ran[stage] < self.size)

    def _in_part(self) -> dict[tuple, list[int]]:
        """Shape, bytes and what each rank reads of a tensor that some rank reads in part -> such tensors."""
        found: dict[tuple, list[int]] = {}
        if any(reading.regions for reading in self.ranks.values()):
            table = np.stack([reading.numbers for reading in self.ranks.values()])
            for at in np.flatnonzero((table >= PARTS).any(axis=0)):
                key = (self.specs[at].shape, self.specs[at].nbytes, *table[:, at].tolist())
                found.setdefault(key, []).append(int(at))
        return found

    def _stages_of(self, key: tuple) -> set[int]:
        return {stage for (stage, *_), number in zip(self.ranks, key[2:]) if number != UNREAD}

    def _all_ran(self, key: tuple) -> bool:
        return all(self.ran[stage] == self.size for stage in self._stages_of(key))

    def _table(self, key: tuple, between: bool = False) -> tuple[int, np.ndarray] | None:
        """What all ranks read; None: it cannot be told. Args: between: also those that were not run."""
        _, size, *numbers = key
        if UNKNOWN in numbers or WHOLE in numbers:
            return size, np.ones(1, bool)
        regions: list = []
        for stage in self._stages_of(key):
            own = [
                one.regions.get(n, ()) for (at, *_), one, n in zip(self.ranks, self.ranks.values(), numbers) if at == stage
            ]
            regions += [region for of_rank in own for region in of_rank]
            if between and len(own) < self.size:
                others = between_ranks(own[0], own[-1], self.sizes)
                if others is None:
                    return None
                regions += others
        return covered(tuple(sorted(regions)), size)

    def _nobodys(self) -> list[TensorSpec]:
        """Tensors of experts that every rank that was run drops or takes for another's, if it loads the same of others."""
        if not self.ranks:
            return []
        columns = np.stack([reading.columns for reading in self.ranks.values()])
        without = (columns == OTHER_RANK) | (columns == UNEXPECTED)
        at_none = np.flatnonzero((without | (columns == OTHER_STAGE)).all(axis=0) & without.any(axis=0))
        nobodys = [spec for spec in map(self.specs.__getitem__, at_none) if EXPERT.search(spec.name)]
        if not nobodys:
            return []
        loaded = map(self.specs.__getitem__, np.flatnonzero((columns == LOADED).any(axis=0)))
        kinds = {EXPERT.sub(".experts.*.", spec.name) for spec in loaded}
        return [spec for spec in nobodys if EXPERT.sub(".experts.*.", spec.name) in kinds]

    def _are_too_many(self, experts: set[int]) -> bool:
        """Whether the ranks that were not run cannot hold these, if they hold no more than others, and none beyond them."""
        held = [reading.experts or [] for reading in self.ranks.values()]
        most = max(map(len, held), default=0) * (self.size - min(self.ran.values(), default=0))
        return bool(experts) and (len(experts) > most or max(experts) > max(chain.from_iterable(held), default=-1))


def is_told(result: StageResult) -> bool:
    return result.reads is not None and result.verdict == "loads"


def pairs_of(specs: Sequence[TensorSpec], in_order: bool) -> np.ndarray:
    """Places of weights and of their scales among a checkpoint's tensors, by name.

    Args:
        in_order: whether columns are quantised in the order of activation; `g_idx` then says of which group each is.
    """
    found: dict[str, tuple[list, list]] = {}
    for at, spec in enumerate(specs):
        is_scale = SCALES.search(spec.name) or (in_order and ORDER.search(spec.name))
        stem = spec.name[: is_scale.start()] if is_scale else WEIGHTS.sub("", spec.name)
        found.setdefault(stem, ([], []))[bool(is_scale)].append(at)
    pairs = [pair for weights, scales in found.values() for pair in product(weights, scales)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def mismatched(specs: Sequence[TensorSpec], pairs: np.ndarray, reading: Reading, strict: bool = False) -> list[Cut]:
    """Weights and scales of which a rank does not read the same groups.

    Args:
        pairs: see `pairs_of`.
        strict: also those whose last group goes on in the next rank's part, which the next one may not read rightly.
    """
    weights, scales = reading.numbers[pairs.T]
    is_read = (weights == WHOLE) | (weights >= PARTS)
    dropped = is_read & (reading.columns[pairs.T[1]] == UNEXPECTED)
    cuts = []
    for weight, scale in pairs[dropped | (weights >= PARTS) & (scales != UNKNOWN)].tolist():
        if reading.numbers[scale] == UNREAD and "zero" in specs[scale].name:
            continue  # of symmetric weights they say nothing
        if reading.columns[scale] == UNEXPECTED:
            cuts.append(Cut(specs[weight].name, 0, ((0, max(specs[weight].shape[:1], default=1) - 1),), specs[scale].name))
            continue
        if ORDER.search(specs[scale].name):
            continue  # which groups a part needs only its values tell
        of = [(specs[at].shape, specs[at].nbytes, reading.regions_of(at)) for at in (weight, scale)]
        if found := compared(*of, strict):
            dimension, elements, read, group = found
            cuts.append(Cut(specs[weight].name, dimension, elements, specs[scale].name, read, group))
    return cuts
