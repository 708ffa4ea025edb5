"""What a dry run found: a verdict for each stage, the evidence for it, the ledger, and how long it took."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp.checkpoint import Checkpoint
from glmpp.formats.config import layer_count
from glmpp.formats.files import printable
from glmpp.gpus import CPU, GPUS
from glmpp.ledger import EXPECTED, UNEXPECTED, Ledger, Left
from glmpp.partition import Stage
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.fit import Fit, Memory

if TYPE_CHECKING:
    from pandas import DataFrame

LOADS, DIES, CANNOT_BUILD = "loads", "dies", "cannot be built"
INCOMPLETE, CANNOT_TELL = "loads, is not complete", "cannot tell"
STAGE, DRAFTER, CONTROL = "stage", "MTP drafter", "PP=1 control"
RANK_STAND_IN = "a real gloo group of size 1 whose rank and size fields are rewritten for each stage"
GROUPS_STAND_IN = "real gloo groups of size 1 whose rank and size fields are rewritten for each rank of the layout"


@dataclass(frozen=True)
class Death:
    """One exception while a stage is built or loads.

    Attributes:
        tensor: the checkpoint tensor that was handed over last; None when all of them had been, or none yet.
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


@dataclass(frozen=True)
class Evidence:
    """What was run, and what was seen.

    Attributes:
        model_class: None if the model was not built.
        device: "meta", or "cpu" for a model that asks for data while it is built or loaded.
        stand_ins: part -> what stands in for it and why.
        backends: what vLLM chose, by its own names: "attention", "linear", "moe" -> choice -> number of layers.
        refused: the model was not built, and the exception is one that vLLM raises on purpose.
        patched: modules of vLLM that call another helper than their own.
        handed_over: tensors handed over before the end, good or bad.
        order: SHA-256 of their names in the order in which they came.
        missing_prefixes: vLLM's placeholders on this stage, as dot-terminated prefixes.
        experts: numbers of those that the rank holds; None: a part or all of each.
        held: tensors of other stages that the model held to the end, or while 50 others were handed over -> bytes.
        digests: SHA-256 per parameter (weights "real" only).
    """

    model_class: str | None = None
    device: str = "meta"
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
            INCOMPLETE: the load ends well and parameters that nobody accounts for were not written; CANNOT_TELL:
            PP=1 cannot be built here either, or the model asks for the data of tensors that are too large to make up.
        role: STAGE, DRAFTER or CONTROL.
        deaths: all of them, when asked for; otherwise the first. A failed build is one.
        ledger: every tensor and every parameter, from the writes that were observed; None if the model was not built.
        left: what was left at init, or partly -> of which kind it is and why.
        memory: what the rank takes of its GPU; None if the model was not built.
    """

    stage: Stage
    verdict: str
    role: str = STAGE
    deaths: list[Death] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    ledger: Ledger | None = None
    left: dict[str, Left] = field(default_factory=dict)
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
    experts = _of_evidence("experts")

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

    @property
    def dropped(self) -> list[str]:
        """Tensors that were handed over and left no trace, and are not known to be somebody else's."""
        return self.ledger.in_column(UNEXPECTED) if self.ledger else []


@dataclass
class DryRunReport:
    """All stages' verdicts, the PP=1 control, and what was real.

    Attributes:
        deployment: what was asked.
        stages: one for each rank that was run, in the order asked for.
        control: the PP=1 run that separates a bad checkpoint from a pipeline fault; None if it was not asked for.
        drafters: the MTP model on the last stage, on its first and its last shard, when asked for.
        versions: of python, vllm, torch, transformers in the child.
        stand_ins: part -> what stands in for it and why, on any stage.
        evidence: what the child sent, as it came.
        recorded: None for a live run; otherwise when and where the shown result was recorded.
    """

    deployment: Deployment
    stages: list[StageReport]
    control: StageReport | None
    drafters: list[StageReport]
    versions: dict[str, str]
    stand_ins: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    evidence: dict = field(repr=False)
    recorded: str | None = None

    @property
    def pp_size(self) -> int:
        return self.deployment.pp

    @property
    def drafter(self) -> StageReport | None:
        """The first of the drafters."""
        return self.drafters[0] if self.drafters else None

    @property
    def guard(self) -> str:
        return str(self.deployment.guard)

    @property
    def all(self) -> list[StageReport]:
        """The stages, then the drafters and the control if there are any."""
        return [*self.stages, *self.drafters, *([self.control] if self.control else [])]

    @property
    def loads(self) -> bool:
        """Whether every stage that was run loads (the control and the drafter included)."""
        return all(report.loads for report in self.all)

    def fit(self, utilization: float | None = None) -> Fit | None:
        """What room the deployment has for tokens; None on a CPU, or if a stage was not built.

        Args:
            utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
        """
        if self.deployment.gpu not in GPUS or not all(stage.memory for stage in self.stages):
            return None
        drafter = self.drafter and self.drafter.memory
        memories = [
            stage.memory.with_drafter(drafter) if drafter and stage.stage.is_last else stage.memory for stage in self.stages
        ]
        return Fit(memories, GPUS[self.deployment.gpu], utilization)

    @property
    def source(self) -> str:
        """One line for a caption: live or recorded, with which versions, and which GPU was pretended."""
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        made += "; no GPU" if self.deployment.gpu == CPU else f"; a pretended {self.deployment.gpu}"
        return f"recorded {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def table(self) -> DataFrame:
        """One row per run: stage, layers, verdict, the key it died at, where, and how many tensors it got to."""
        from pandas import DataFrame

        reports = self.all
        return DataFrame(
            {
                "stage": [r.stage.rank if r.role == STAGE and self.deployment.tp == 1 else r.label for r in reports],
                "layers": ["MTP" if r.role == DRAFTER else f"{r.stage.layers[0]}-{r.stage.layers[-1]}" for r in reports],
                "verdict": [r.verdict for r in reports],
                "died at": [printable(str(r.key or r.message or "").split("\n")[0]) for r in reports],
                "in": [r.place or "" for r in reports],
                "tensors handed over": [r.handed_over for r in reports],
            }
        ).set_index("stage")

    def save(self, path: str | Path) -> None:
        """Write what the child sent, and on which day and machine, so that `load` can show it where vLLM is not."""
        made = f"on {time.strftime('%Y-%m-%d')} on {platform.machine()}, {os.cpu_count()} cores, CPU only"
        head = {"recorded": made, **self.evidence}
        lines = ",\n".join(json.dumps(message) for message in head.pop("messages"))
        Path(path).write_text(json.dumps(head)[:-1] + f', "messages": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: str | Path, checkpoint: Checkpoint) -> DryRunReport:
        """Read a saved report of `checkpoint` back, labelled as recorded."""
        evidence = json.loads(Path(path).read_text())
        recorded = evidence.pop("recorded")
        deployment = Deployment(
            pp=evidence["pp_size"],
            tp=evidence.get("tp_size", 1),
            dp=evidence.get("dp_size", 1),
            ep=evidence.get("ep", False),
            layer_counts=evidence["layer_counts"],
            guard=evidence["guard"],
            fixes=tuple(evidence.get("fixes", ())),
            gpu=evidence.get("gpu", CPU),
        )
        return assemble(evidence, checkpoint, deployment, deployment.stages(checkpoint.config), recorded)


def assemble(
    evidence: dict, checkpoint: Checkpoint, deployment: Deployment, stages: list[Stage] | None, recorded: str | None = None
) -> DryRunReport:
    """A report from what the child sent.

    Args:
        stages: what the deployment makes of the checkpoint's config.
    """
    messages = evidence["messages"]
    # What vLLM says counts: a config may give its layers in a way of its own.
    said = next((message["num_layers"] for message in messages if message.get("num_layers")), None)
    if stages is None or said not in (None, stages[0].num_layers):
        stages = deployment.stages(checkpoint.config, said or layer_count(checkpoint.config))
    ready = next(message for message in messages if message["kind"] == "ready")
    reports = [_stage_report(message, checkpoint, stages) for message in messages if message["kind"] == "stage"]
    control = next((report for report in reports if report.role == CONTROL), None)
    if (control and control.verdict == CANNOT_BUILD) or deployment.pp == 1:
        for report in reports:
            if report.verdict == CANNOT_BUILD and report.role != DRAFTER and not report.refused:
                report.verdict = CANNOT_TELL
    several = deployment.tp * deployment.dp > 1
    groups = {"process groups": GROUPS_STAND_IN} if several else {"pipeline group": RANK_STAND_IN}
    stand_ins = {} if evidence["real_group"] else groups
    return DryRunReport(
        deployment=deployment,
        stages=[report for report in reports if report.role == STAGE],
        control=control,
        drafters=[report for report in reports if report.role == DRAFTER],
        versions=ready["versions"],
        stand_ins={part: why for report in reports for part, why in report.stand_ins.items()} | stand_ins,
        seconds=evidence["seconds"],
        peak_rss_bytes=peak_bytes([message for message in messages if message["kind"] == "end"]),
        evidence=evidence,
        recorded=recorded,
    )


def _stage_report(message: dict, checkpoint: Checkpoint, stages: list[Stage]) -> StageReport:
    deaths = [Death(**_fields(Death, death)) for death in message.get("deaths", ())]
    if "exception" in message:  # the first, or why it could not be built; with its traceback
        deaths[:1] = [Death(**{"tensor": None, **_fields(Death, message)})]
    report = StageReport(
        stage=stages[0].whole() if message["control"] else stages[message["rank"]],
        verdict=message["verdict"],
        role=CONTROL if message["control"] else DRAFTER if message["drafter"] else STAGE,
        deaths=deaths,
        evidence=Evidence(**_fields(Evidence, message)),
        left={name: Left(**one) for name, one in message.get("left", {}).items()},
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


def peak_bytes(ends: list[dict]) -> int:
    """Peak memory of forks together: what they share with the process they came from counts once."""
    shared = max(end.get("shared_bytes", 0) for end in ends)
    return shared + sum(end["peak_rss_bytes"] - end.get("shared_bytes", 0) for end in ends)
