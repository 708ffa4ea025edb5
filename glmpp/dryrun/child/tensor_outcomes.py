"""What became of every tensor and every parameter in a stage's load, from the writes that were seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby

from glmpp.dryrun.child.load import StageLoad
from glmpp.dryrun.messages import MADE_UP, REAL, Reads, StageResult
from glmpp.ledger import DROPPED, IGNORED, LOADED, NOT_REACHED, OTHER_RANK, UNEXPECTED
from glmpp.partition import OTHER_STAGE, SPECULATIVE, PrefixSet
from glmpp.serving.dropped import dropped
from glmpp.serving.experts import expert_maps, held_experts, is_elsewhere
from glmpp.serving.padding import padding
from glmpp.serving.stage_filter import mapped, missing_prefixes, speculative_prefixes
from glmpp.serving.unloaded import confirmed, left, with_values
from glmpp.serving.write_tracking import loadable, parameters


class TensorOutcomes:
    """The columns of one load's ledger.

    Attributes:
        missing: vLLM's placeholders on this stage, as prefixes.
        experts: numbers of those that this rank holds; None: all.
        unseen: biases that the model has no parameter for, and whose values are not here.
    """

    def __init__(self, load: StageLoad, shapes: Mapping[str, Sequence[int]], drafted: list[str] | None):
        """Args:
        shapes: all tensors of the checkpoint, in its order -> shape.
        drafted: for a drafter the prefixes of its own layers under the checkpoint's names, otherwise None.
        """
        self.load, self.shapes, model = load, shapes, load.built.model
        self.missing, self._rename = missing_prefixes(model), mapped(model) or (lambda name: name)
        self._elsewhere = PrefixSet(self.missing)
        self._speculative = PrefixSet(speculative_prefixes(model, load.built.model_config))
        self._drafted = None if drafted is None else PrefixSet(drafted)
        handed = set(load.recorder.order)
        self._gone = dropped(load.recorder, model)
        self._loaded = handed - self._gone.keys()
        selection = getattr(load.loader, "selection", None)
        self.experts = held_experts(expert_maps(model))
        filtered = set() if selection is None else {name for name in shapes if not selection.wants(name)}
        self._reached, self.unseen = handed | filtered, []

    def column(self, name: str) -> str:
        """Where a tensor belongs in the ledger."""
        if name not in self._reached:
            return NOT_REACHED
        if name in self._loaded:
            return LOADED
        rest = OTHER_RANK if is_elsewhere(name, self.experts) else UNEXPECTED
        if self._drafted is not None:
            return rest if self._drafted.cover(name) else OTHER_STAGE
        place = self._rename(name)
        if self._speculative.cover(name if place is None else place):
            return SPECULATIVE
        if place is None:
            return IGNORED
        return OTHER_STAGE if self._elsewhere.cover(place) else rest

    def tell(self, result: StageResult, folder: str | None) -> None:
        """Put the account into a result; neighbours in the same column are one entry.

        Args:
            folder: of the checkpoint; None if there are no files. What was left at init is compared with it where data is
                REAL, otherwise biases are looked up there.
        """
        load, recorder, model = self.load, self.load.recorder, self.load.built.model
        sizes, added = {name: p.numel() for name, p in parameters(model).items()}, padding(model)
        written, filled = recorder.written, recorder.filled
        columns = {name: self.column(name) for name in self.shapes}
        lacking = left(recorder, model, load.built.model_config, self._gone)
        if result.data == REAL:
            lacking = confirmed(lacking, model, folder, self.shapes)
        else:
            biases = [name for name, one in lacking.items() if one.kind == DROPPED and name.endswith("bias")]
            nonzero = set() if folder is None else with_values(folder, biases)
            lacking = {name: one for name, one in lacking.items() if name not in {*biases} - nonzero}
            self.unseen = biases if folder is None else []
        if result.data != MADE_UP and not load.failures:  # whose elements all are one
            reads = recorder.reads.summary(recorder.order, loadable(model).values(), load.nbytes, self._loaded)
            result.reads = Reads(*reads)
        result.handed_over = len(recorder.order)
        result.order = hashlib.sha256("\n".join(recorder.order).encode()).hexdigest()
        result.columns = [(column, len(list(run))) for column, run in groupby(columns.values())]
        result.parameters = {name: (written.get(name, size), size) for name, size in sizes.items()}
        result.filled = {name: filled[name] for name in sizes if name in filled and filled[name] != written[name]}
        result.missing_prefixes = self.missing
        result.experts = None if self.experts is None else sorted(self.experts)
        result.padding, result.left = added, lacking
        result.unplaced = recorder.unplaced(added)
        result.held = {name: size for name, size in load.held.items() if columns[name] in (OTHER_STAGE, OTHER_RANK)}
