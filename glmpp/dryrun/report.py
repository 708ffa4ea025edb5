"""What a dry run found: the ranks' reports and the PP=1 control put together, and what was real."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.crossing import Crossing, crossings
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import NO_FIT, Fit
from glmpp.dryrun.messages import End, Message, Ready, Run, StageResult
from glmpp.dryrun.stage_report import (
    CANNOT_BUILD,
    CANNOT_TELL,
    CONTROL,
    CROSSES,
    DIES,
    DRAFTER,
    INCOMPLETE,
    LOADS,
    STAGE,
    StageReport,
    stage_report,
)
from glmpp.errors import GlmppError
from glmpp.formats.config import layer_count
from glmpp.gpus import CPU, gpu_of
from glmpp.words import MESSAGE, shown

if TYPE_CHECKING:
    from pandas import DataFrame

RANK_STAND_IN = "a real gloo group of size 1 whose rank and size fields are rewritten for each stage"
GROUPS_STAND_IN = "real gloo groups of size 1 whose rank and size fields are rewritten for each rank of the layout"


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a report is about: a checkpoint's digest, how it is to be served, and how it was run.

    Attributes:
        helper, callers: of `glmpp.dryrun.deployment.Helper`; None for another guard.
    """

    checkpoint: str = ""
    pp_size: int = 1
    tp_size: int = 1
    dp_size: int = 1
    ep: bool = False
    layer_counts: str | None = None
    drafter: bool = False
    guard: str = "installed"
    helper: str | None = None
    callers: tuple[str, ...] | None = None
    fixes: tuple[str, ...] = ()
    gpu: str = CPU
    weights: str = "meta"
    strict: bool = False
    all_failures: bool = False
    context: int | None = None
    real_group: bool = False


class Record(msgspec.Struct):
    """A report as it is kept."""

    recorded: str
    question: Question
    seconds: float
    messages: list[Message]


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
        crossings: what stages read across their cuts, those that were not run included.
        question: what it is the answer to, as it is recorded.
        messages: what the child sent, as it came.
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
    question: Question = field(repr=False, default=Question())
    messages: list[Message] = field(repr=False, default_factory=list)
    recorded: str | None = None
    crossings: list[Crossing] = field(default_factory=list)

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
        """Whether every stage that was run loads, the control and the drafter included, and nothing is read across a cut."""
        return all(report.loads for report in self.all) and not self.crossings

    def overall(self, utilization: float | None = None) -> str:
        """LOADS if every stage and the control do, completely, and it fits as far as it was counted; otherwise the first of
        DIES, INCOMPLETE, CROSSES, NO_FIT, CANNOT_TELL. Args: utilization: as in `fit`."""
        verdicts = {stage.verdict for stage in self.all}
        if verdicts & {DIES, CANNOT_BUILD}:
            return DIES
        if (found := self.fit(utilization)) and found.fits is False:
            verdicts.add(NO_FIT)
        verdicts |= {CROSSES} if self.crossings else set()
        return next((verdict for verdict in (INCOMPLETE, CROSSES, NO_FIT, CANNOT_TELL) if verdict in verdicts), LOADS)

    def fit(self, utilization: float | None = None) -> Fit | None:
        """What room the deployment has for tokens; None on a CPU, or if a stage was not built.

        Args:
            utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
        """
        if self.deployment.gpu == CPU or not all(stage.memory for stage in self.stages):
            return None
        drafter = self.drafter and self.drafter.memory
        memories = [
            stage.memory.with_drafter(drafter) if drafter and stage.stage.is_last else stage.memory for stage in self.stages
        ]
        return Fit(memories, gpu_of(self.deployment.gpu), utilization)

    @property
    def source(self) -> str:
        """One line for a caption: live or recorded, with which versions, and which GPU was pretended."""
        gpu = "no GPU" if self.deployment.gpu == CPU else f"a pretended {self.deployment.gpu}"
        return records.caption(self.recorded, self.versions, gpu)

    def table(self) -> DataFrame:
        """One row per run: stage, layers, verdict, the key it died at, where, and how many tensors it got to."""
        from pandas import DataFrame

        reports = self.all
        return DataFrame(
            {
                "stage": [r.stage.rank if r.role == STAGE and self.deployment.tp == 1 else r.label for r in reports],
                "layers": ["MTP" if r.role == DRAFTER else r.stage.span for r in reports],
                "verdict": [r.verdict for r in reports],
                "died at": [shown(r.key or (r.message or "").partition("\n")[0], MESSAGE) for r in reports],
                "in": [shown(r.place or "") for r in reports],
                "tensors handed over": [r.handed_over for r in reports],
            }
        ).set_index("stage")

    def save(self, path: str | Path) -> None:
        """Write what the child sent, and on which day and machine, so that `load` can show it where vLLM is not."""
        when = f"{records.today()} on {records.MACHINE}"
        record = msgspec.to_builtins(Record(when, self.question, self.seconds, self.messages))
        records.write(path, record, "messages", record.pop("messages"))

    @classmethod
    def load(
        cls, path: str | Path, checkpoint: Checkpoint, asked: Question | None = None, runs: list[Run] | None = None
    ) -> DryRunReport:
        """Read a saved report of `checkpoint` back, labelled as recorded.

        Args:
            asked: what it has to be the answer to; default: whatever it is.
            runs: those that are wanted of it; default all.

        Raises:
            GlmppError: it is no record, is of another checkpoint, answers another question, or lacks a run.
        """
        record = records.decode(path, Record)
        kept = record.question
        asked = asked or msgspec.structs.replace(kept, checkpoint=records.digest(checkpoint))
        records.check(path, *map(msgspec.structs.asdict, (asked, kept)))
        results = {one.run: one for one in record.messages if isinstance(one, StageResult)}
        if runs is not None:
            if lacking := [run for run in runs if run not in results]:
                raise GlmppError(f"{path}: the record answers another question: it has no run of {lacking[0]}")
            others = [one for one in record.messages if not isinstance(one, StageResult)]
            record.messages = [*others, *(results[run] for run in runs)]
        deployment = Deployment(
            pp=kept.pp_size,
            tp=kept.tp_size,
            dp=kept.dp_size,
            ep=kept.ep,
            layer_counts=kept.layer_counts,
            drafter=kept.drafter,
            guard=kept.guard,
            fixes=kept.fixes,
            gpu=kept.gpu,
        )
        return assemble(record.messages, checkpoint, deployment, kept, record.seconds, record.recorded)


def assemble(
    messages: list[Message],
    checkpoint: Checkpoint,
    deployment: Deployment,
    question: Question = Question(),  # noqa: B008  it is frozen
    seconds: float = 0.0,
    recorded: str | None = None,
) -> DryRunReport:
    """A report from what the child sent."""
    from glmpp.dryrun.cuts.readings import Readings  # and numpy, which a plan can do without

    results = [one for one in messages if isinstance(one, StageResult)]
    # What vLLM says counts: a config may give its layers in a way of its own.
    said = next((one.num_layers for one in results if one.num_layers), None)
    stages = deployment.stages(checkpoint.config, said or layer_count(checkpoint.config))
    ready = next(one for one in messages if isinstance(one, Ready))
    reports = [stage_report(one, checkpoint, stages) for one in results]
    readings = Readings(results, checkpoint, (deployment.tp, deployment.dp))
    unread = readings.unread()
    for report in reports:
        report.add_cuts(readings.of_rank(report.result), unread)
    control = next((report for report in reports if report.role == CONTROL), None)
    if (control and control.verdict == CANNOT_BUILD) or deployment.pp == 1:
        for report in reports:
            if report.verdict == CANNOT_BUILD and report.role != DRAFTER and not report.refused:
                report.verdict = CANNOT_TELL
    several = deployment.tp * deployment.dp > 1
    groups = {"process groups": GROUPS_STAND_IN} if several else {"pipeline group": RANK_STAND_IN}
    stand_ins = {} if question.real_group else groups
    return DryRunReport(
        deployment=deployment,
        stages=[report for report in reports if report.role == STAGE],
        control=control,
        drafters=[report for report in reports if report.role == DRAFTER],
        versions=ready.versions,
        stand_ins={part: why for report in reports for part, why in report.stand_ins.items()} | stand_ins,
        seconds=seconds,
        peak_rss_bytes=peak_bytes([one for one in messages if isinstance(one, End)]),
        question=question,
        messages=messages,
        recorded=recorded,
        crossings=crossings(results, stages),
    )


def peak_bytes(ends: list[End]) -> int:
    """Peak memory of forks together: what they share with the process they came from counts once."""
    shared = max(end.shared_bytes for end in ends)
    return shared + sum(end.peak_rss_bytes - end.shared_bytes for end in ends)
