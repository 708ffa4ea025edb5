"""What was found of one rank: its verdict, the evidence for it, its ledger, and how long it took."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.cut import Cut
from glmpp.dryrun.messages import Run, StageResult
from glmpp.ledger import CUT, EXPECTED, LOADED, OTHER_RANK, UNEXPECTED, Ledger
from glmpp.partition import Stage

PARTLY = "written in part"
LOADS, DIES, CANNOT_BUILD = "loads", "dies", "cannot be built"
INCOMPLETE, CANNOT_TELL = "loads, is not complete", "cannot tell"
CROSSES = "loads, reads across a cut"  # of all stages together
STAGE, DRAFTER, CONTROL = "stage", "MTP drafter", "PP=1 control"


def _of_first_failure(name: str) -> property:
    return property(lambda self: getattr(self.failures[0], name) if self.failures else None)


def _of_result(name: str) -> property:
    return property(lambda self: getattr(self.result, name))


@dataclass
class StageReport:
    """One rank's verdict, what was seen of it, and its ledger.

    The attributes of the result and of its first failure are the report's, too.

    Attributes:
        stage: what the pipeline stage holds.
        verdict: LOADS; DIES: an exception while loading; CANNOT_BUILD: an exception before that, although PP=1 builds, or
            because vLLM refuses the checkpoint on the GPU that is pretended;
            INCOMPLETE: the load ends well, and parameters that nobody accounts for were not written, or something is cut;
            CANNOT_TELL: PP=1 cannot be built here either, or the model asks for the data of tensors that are too large to
            make up, or writes at an index that is one.
        role: STAGE, DRAFTER or CONTROL.
        result: as it came. Its failures are all of them, when asked for, otherwise the first; a failed build is one.
            What is `left` was left at init, or partly -> of which kind it is and why.
        ledger: every tensor and every parameter, from the writes that were observed; None if the model was not built.
        cuts: tensors of which all ranks together read a part, or this one reads other elements than it has scales of.
    """

    stage: Stage
    verdict: str
    role: str = STAGE
    result: StageResult = field(default_factory=lambda: StageResult(run=Run()))
    ledger: Ledger | None = None
    cuts: list[Cut] = field(default_factory=list)

    tensor, exception, message, key = map(_of_first_failure, ("tensor", "exception", "message", "key"))
    place, function, traceback = map(_of_first_failure, ("place", "function", "traceback"))
    run, failures, left, memory, why = map(_of_result, ("run", "failures", "left", "memory", "why"))
    model_class, device, stand_ins, patched = map(_of_result, ("model_class", "device", "stand_ins", "patched"))
    handed_over, order, held, digests = map(_of_result, ("handed_over", "order", "held", "digests"))
    missing_prefixes, backends, refused = map(_of_result, ("missing_prefixes", "backends", "refused"))
    experts, data, unplaced = map(_of_result, ("experts", "data", "unplaced"))

    @property
    def loads(self) -> bool:
        return self.verdict == LOADS

    @property
    def rank(self) -> tuple[int, int, int]:
        """(stage, tensor rank, data rank)."""
        return self.run.rank

    @property
    def label(self) -> str:
        """ "stage 1", "stage 1, rank 7 of 8", "stage 1, rank 7 of 8, replica 1 of 2", or what else was run."""
        label = f"stage {self.stage.rank}" if self.role == STAGE else self.role
        label += f", rank {self.run.tp_rank} of {self.run.tp_size}" if self.run.tp_size > 1 else ""
        return label + (f", replica {self.run.dp_rank} of {self.run.dp_size}" if self.run.dp_size > 1 else "")

    @property
    def accounted(self) -> dict[str, str]:
        """Parameters left at init that are no fault -> why."""
        return {name: one.why for name, one in self.left.items() if one.kind == EXPECTED}

    @property
    def unaccounted(self) -> list[str]:
        """Parameters left at init that nobody accounts for, and buffers that the checkpoint has a value for."""
        return [name for name, one in self.left.items() if one.kind != EXPECTED]

    def is_partly_written(self, name: str) -> bool:
        """Whether some of the elements of a parameter that was left were written."""
        written = self.ledger.parameters.get(name, (0, 0))[0] if self.ledger else 0
        return (self.ledger.filled.get(name, written) if self.ledger else 0) > 0

    def what_is_left(self, name: str) -> str:
        """In a word or two what is wrong with a parameter that was left."""
        kind = self.left[name].kind
        return PARTLY if kind != CUT and self.is_partly_written(name) else kind

    def add_cuts(self, own: list[Cut], unread: list[Cut]) -> None:
        """Args: own: of this rank's; unread: by all ranks, of which those count here that this stage should have."""
        tensors = self.ledger.tensors if self.ledger and self.role == STAGE else {}
        mine = [cut for cut in unread if tensors.get(cut.tensor) in (LOADED, OTHER_RANK, UNEXPECTED)]
        self.cuts = own + [cut for cut in mine if cut.tensor not in self.left]  # which it has been dropped on already
        if self.cuts and self.verdict == LOADS:
            self.verdict = INCOMPLETE

    @property
    def dropped(self) -> list[str]:
        """Tensors that were handed over and left no trace, and are not known to be somebody else's."""
        return self.ledger.in_column(UNEXPECTED) if self.ledger else []


def stage_report(result: StageResult, checkpoint: Checkpoint, stages: list[Stage]) -> StageReport:
    """A report from what the child sent of one rank.

    Args:
        stages: what each pipeline stage holds.
    """
    if result.failures and len({re.sub(r"\d+", "0", file) for file in checkpoint.files}) > 1:
        for failure in result.failures:
            failure.file = checkpoint[failure.tensor].file if failure.tensor in checkpoint else None
    run = result.run
    report = StageReport(
        stage=stages[0].whole() if run.control else stages[run.stage],
        verdict=result.verdict,
        role=CONTROL if run.control else DRAFTER if run.drafter else STAGE,
        result=result,
    )
    if result.columns is not None:
        columns = (column for column, count in result.columns for _ in range(count))
        tensors = dict(zip(checkpoint, columns, strict=True))
        report.ledger = Ledger(tensors, result.parameters, padding=result.padding, filled=result.filled)
        if report.verdict == LOADS and report.unaccounted:
            report.verdict = INCOMPLETE
    return report
