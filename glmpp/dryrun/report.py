"""What a dry run found: the ranks' reports and the PP=1 control put together, and what was real."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, CONTROL, DRAFTER, STAGE, StageReport, stage_report
from glmpp.errors import GlmppError
from glmpp.formats.config import layer_count
from glmpp.gpus import CPU, gpu_of
from glmpp.partition import Stage
from glmpp.words import MESSAGE, shown

if TYPE_CHECKING:
    from pandas import DataFrame

RANK_STAND_IN = "a real gloo group of size 1 whose rank and size fields are rewritten for each stage"
GROUPS_STAND_IN = "real gloo groups of size 1 whose rank and size fields are rewritten for each rank of the layout"


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
        head = {"recorded": f"{records.today()} on {records.MACHINE}", **self.evidence}
        records.write(path, head, "messages", head.pop("messages"))

    @classmethod
    def load(
        cls, path: str | Path, checkpoint: Checkpoint, asked: dict | None = None, runs: list[dict] | None = None
    ) -> DryRunReport:
        """Read a saved report of `checkpoint` back, labelled as recorded.

        Args:
            asked: what it has to be the answer to, see `glmpp.dryrun.dry_run.question`; default: whatever it is.
            runs: those that are wanted of it, see `glmpp.dryrun.dry_run.run_of`; default all.

        Raises:
            GlmppError: it is of another checkpoint, answers another question, or lacks a run.
        """
        evidence = records.read(path)
        recorded = evidence.pop("recorded")
        ran = [message for message in evidence["messages"] if message["kind"] == "stage"]
        evidence.setdefault("fixes", [])  # records before 2026-11-26 do not say it
        evidence.setdefault("drafter", any(message["drafter"] for message in ran))
        records.check(path, {"checkpoint": records.digest(checkpoint), **(asked or {})}, evidence)
        held = {sum(count for _, count in message["columns"]) for message in ran if "columns" in message}
        if held - {len(checkpoint)}:
            raise GlmppError(f"{path}: the record is of {held.pop()} tensors, the checkpoint has {len(checkpoint)}")
        if runs is not None:
            found = {_run(message): message for message in ran}
            if lacking := [run for run in runs if _run(run) not in found]:
                raise GlmppError(f"{path}: the record answers another question: it has no run {lacking[0]}")
            others = [message for message in evidence["messages"] if message["kind"] != "stage"]
            evidence["messages"] = [*others, *(found[_run(run)] for run in runs)]
        deployment = Deployment(
            pp=evidence["pp_size"],
            tp=evidence.get("tp_size", 1),
            dp=evidence.get("dp_size", 1),
            ep=evidence.get("ep", False),
            layer_counts=evidence["layer_counts"],
            drafter=evidence["drafter"],
            guard=evidence["guard"],
            fixes=tuple(evidence["fixes"]),
            gpu=evidence.get("gpu", CPU),
        )
        return assemble(evidence, checkpoint, deployment, deployment.stages(checkpoint.config), recorded)


def _run(message: dict) -> tuple:
    """What tells a run from others of a report."""
    fresh = {"shard": 0, "replica": 0}
    return tuple({**fresh, **message}[name] for name in ("rank", "shard", "replica", "drafter", "control"))


def assemble(
    evidence: dict, checkpoint: Checkpoint, deployment: Deployment, stages: list[Stage] | None, recorded: str | None = None
) -> DryRunReport:
    """A report from what the child sent.

    Args:
        stages: what the deployment makes of the checkpoint's config.
    """
    from glmpp.dryrun.cuts.readings import Readings

    messages = evidence["messages"]
    # What vLLM says counts: a config may give its layers in a way of its own.
    said = next((message["num_layers"] for message in messages if message.get("num_layers")), None)
    if stages is None or said not in (None, stages[0].num_layers):
        stages = deployment.stages(checkpoint.config, said or layer_count(checkpoint.config))
    ready = next(message for message in messages if message["kind"] == "ready")
    ran = [message for message in messages if message["kind"] == "stage"]
    reports = [stage_report(message, checkpoint, stages) for message in ran]
    readings = Readings(ran, checkpoint, (deployment.tp, deployment.dp))
    unread = readings.unread()
    for report, message in zip(reports, ran):
        report.add_cuts(readings.of_rank(message), unread)
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


def peak_bytes(ends: list[dict]) -> int:
    """Peak memory of forks together: what they share with the process they came from counts once."""
    shared = max(end.get("shared_bytes", 0) for end in ends)
    return shared + sum(end["peak_rss_bytes"] - end.get("shared_bytes", 0) for end in ends)
