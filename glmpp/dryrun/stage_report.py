"""What was found of one rank: its verdict, the evidence for it, its ledger, and how long it took."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.cut import Cut
from glmpp.dryrun.fit import Memory
from glmpp.ledger import CUT, EXPECTED, LOADED, OTHER_RANK, UNEXPECTED, Ledger, UnloadedParam
from glmpp.partition import Stage

PARTLY = "written in part"
LOADS, DIES, CANNOT_BUILD = "loads", "dies", "cannot be built"
INCOMPLETE, CANNOT_TELL = "loads, is not complete", "cannot tell"
NO_DATA = "none"
STAGE, DRAFTER, CONTROL = "stage", "MTP drafter", "PP=1 control"


@dataclass(frozen=True)
class Death:
    """One exception while a stage is built or loads.

    Attributes:
        tensor: the checkpoint tensor that was handed over last; None when all of them had been, or none yet.
        file: that it lies in, where the files that vLLM opens are not all named alike; otherwise None.
        exception, message, key, place, function: its type, text, the KeyError's key, `file:line` in vLLM or the model.
        traceback: the lines of vLLM and of the model, of the first death only.
    """

    tensor: str | None
    exception: str
    message: str
    key: str | None
    place: str
    function: str
    traceback: list[str] = field(default_factory=list)
    file: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What was run, and what was seen.

    Attributes:
        model_class: None if the model was not built.
        device: "meta", or "cpu" where it was tried with data.
        data: what the tensors held: "none", "made up", or "the checkpoint's".
        stand_ins: part -> what stands in for it and why.
        backends: what vLLM chose, by its own names: "attention", "linear", "moe" -> choice -> number of layers.
        refused: the model was not built, and vLLM raised the exception on purpose, or builds it in a layout without shards.
        patched: modules of vLLM that call another helper than their own.
        handed_over: tensors handed over before the end, good or bad.
        order: SHA-256 of their names in the order in which they came.
        missing_prefixes: vLLM's placeholders on this stage, as dot-terminated prefixes.
        experts: numbers of those that the rank holds; None: a part or all of each.
        held: tensors of other stages that the model held to the end, or while 50 others were handed over -> bytes.
        digests: SHA-256 per parameter (weights "real" only).
        why: what keeps a verdict from being told, where that is no exception.
        unplaced: parameter -> elements, at most, that were written at an index of which only data would tell where it is.
    """

    model_class: str | None = None
    device: str = "meta"
    data: str = NO_DATA
    stand_ins: dict[str, str] = field(default_factory=dict)
    backends: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: bool = False
    patched: list[str] = field(default_factory=list)
    handed_over: int = 0
    order: str | None = None
    missing_prefixes: list[str] = field(default_factory=list)
    experts: list[int] | None = None
    held: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    why: str = ""
    unplaced: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Seconds on this machine."""

    build: float = 0.0
    load: float = 0.0


def _of_first_death(name: str) -> property:
    return property(lambda self: getattr(self.deaths[0], name) if self.deaths else None)


def _of_evidence(name: str) -> property:
    return property(lambda self: getattr(self.evidence, name))


@dataclass
class StageReport:
    """One rank's verdict, the evidence for it, its ledger and its times.

    The attributes of the first death and of the evidence are the report's, too.

    Attributes:
        stage: what the pipeline stage holds.
        shard, shards: which of its GPUs, of how many that share each of its tensors.
        replica, replicas: the same for data parallelism.
        verdict: LOADS; DIES: an exception while loading; CANNOT_BUILD: an exception before that, although PP=1 builds, or
            because vLLM refuses the checkpoint on the GPU that is pretended;
            INCOMPLETE: the load ends well, and parameters that nobody accounts for were not written, or something is cut;
            CANNOT_TELL: PP=1 cannot be built here either, or the model asks for the data of tensors that are too large to
            make up, or writes at an index that is one.
        role: STAGE, DRAFTER or CONTROL.
        deaths: all of them, when asked for; otherwise the first. A failed build is one.
        ledger: every tensor and every parameter, from the writes that were observed; None if the model was not built.
        left: what was left at init, or partly -> of which kind it is and why.
        cuts: tensors of which all ranks together read a part, or this one reads other elements than it has scales of.
        memory: what the rank takes of its GPU; None if the model was not built.
    """

    stage: Stage
    verdict: str
    role: str = STAGE
    deaths: list[Death] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    ledger: Ledger | None = None
    left: dict[str, UnloadedParam] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    memory: Memory | None = None
    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1

    tensor, exception, message, key = map(_of_first_death, ("tensor", "exception", "message", "key"))
    place, function, traceback = map(_of_first_death, ("place", "function", "traceback"))
    model_class, device, stand_ins, patched = map(_of_evidence, ("model_class", "device", "stand_ins", "patched"))
    handed_over, order, held, digests = map(_of_evidence, ("handed_over", "order", "held", "digests"))
    missing_prefixes, backends, refused = map(_of_evidence, ("missing_prefixes", "backends", "refused"))
    experts, data = map(_of_evidence, ("experts", "data"))

    @property
    def loads(self) -> bool:
        return self.verdict == LOADS

    @property
    def rank(self) -> tuple[int, int, int]:
        """(stage, shard, replica)."""
        return self.stage.rank, self.shard, self.replica

    @property
    def label(self) -> str:
        """ "stage 1", "stage 1, rank 7 of 8", "stage 1, rank 7 of 8, replica 1 of 2", or what else was run."""
        label = f"stage {self.stage.rank}" if self.role == STAGE else self.role
        label += f", rank {self.shard} of {self.shards}" if self.shards > 1 else ""
        return label + (f", replica {self.replica} of {self.replicas}" if self.replicas > 1 else "")

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
        self.cuts = own + [cut for cut in unread if tensors.get(cut.tensor) in (LOADED, OTHER_RANK, UNEXPECTED)]
        if self.cuts and self.verdict == LOADS:
            self.verdict = INCOMPLETE

    @property
    def dropped(self) -> list[str]:
        """Tensors that were handed over and left no trace, and are not known to be somebody else's."""
        return self.ledger.in_column(UNEXPECTED) if self.ledger else []


def stage_report(message: dict, checkpoint: Checkpoint, stages: list[Stage]) -> StageReport:
    """A report from what the child sent of one rank.

    Args:
        stages: what each pipeline stage holds.
    """
    deaths = [Death(**_fields(Death, death)) for death in message.get("deaths", ())]
    if "exception" in message:  # the first, or why it could not be built; with its traceback
        deaths[:1] = [Death(**{"tensor": None, **_fields(Death, message)})]
    if deaths and len({re.sub(r"\d+", "0", file) for file in checkpoint.files}) > 1:
        deaths = [replace(one, file=checkpoint[one.tensor].file) if one.tensor in checkpoint else one for one in deaths]
    report = StageReport(
        stage=stages[0].whole() if message["control"] else stages[message["rank"]],
        verdict=message["verdict"],
        role=CONTROL if message["control"] else DRAFTER if message["drafter"] else STAGE,
        deaths=deaths,
        evidence=Evidence(**_fields(Evidence, message)),
        left={name: UnloadedParam(**one) for name, one in message.get("left", {}).items()},
        times=Times(message.get("build_seconds", 0.0), message.get("load_seconds", 0.0)),
        memory=Memory.of(message["memory"]) if "memory" in message else None,
        **{name: message[name] for name in ("shard", "shards", "replica", "replicas") if name in message},
    )
    if "columns" in message:
        columns = (column for column, count in message["columns"] for _ in range(count))
        parameters = {name: tuple(counts) for name, counts in message["parameters"].items()}
        tensors, filled = dict(zip(checkpoint, columns, strict=True)), message.get("filled", {})
        report.ledger = Ledger(tensors, parameters, padding=message.get("padding", {}), filled=filled)
        if report.verdict == LOADS and report.unaccounted:
            report.verdict = INCOMPLETE
    return report


def _fields(kind: type, message: dict) -> dict:
    return {name: message[name] for name in kind.__dataclass_fields__ if name in message}
