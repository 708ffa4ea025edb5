"""Will every pipeline stage load this checkpoint, on the vLLM that is installed? No GPU, no weights.

The work is done in a child process (`_dry_run_child`), which `_server` starts and talks to.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from glmpp import _contract
from glmpp._server import ask, run_group, run_stages
from glmpp.checkpoint import Checkpoint, layer_count, printable
from glmpp.errors import GlmppError
from glmpp.loader import Ledger
from glmpp.partition import PARTITION_VARIABLE, Stage, make_stages
from glmpp.progress import progress_bar

GUARDS = ("installed", "off", "helper", "loader")
LOADS, DIES, CANNOT_BUILD = "loads", "dies", "cannot be built"
LEAVES_AT_INIT, CANNOT_TELL = "loads, leaves parameters at init", "cannot tell"
NO_VLLM = "vLLM is not installed here: pip install 'glmpp[vllm]' (Linux)"
RANK_STAND_IN = "a real gloo group of size 1 whose rank and size fields are rewritten for each stage"


@dataclass(frozen=True)
class Death:
    """One exception while a stage loads.

    Attributes:
        tensor: the checkpoint tensor that was handed over last; None when all of them had been.
        exception, message, key, place, function: its type, text, the KeyError's key, `file:line` in vLLM or the model.
    """

    tensor: str | None
    exception: str
    message: str
    key: str | None
    place: str
    function: str


@dataclass
class StageReport:
    """One stage's verdict and the evidence for it.

    Attributes:
        stage: what the stage holds.
        verdict: LOADS; DIES: an exception while loading; CANNOT_BUILD: an exception before that, although PP=1 builds;
            LEAVES_AT_INIT: the load ends well and parameters that nobody accounts for were not written; CANNOT_TELL:
            PP=1 cannot be built here either, or the model asks for the data of tensors that are too large to make up.
        exception, message, key, place, function, tensor: of the first death, see `Death`; of the failed build too.
        deaths: all of them, when asked for; otherwise the first.
        handed_over: tensors handed over before the end, good or bad.
        order: SHA-256 of their names in the order in which they came.
        ledger: every tensor and every parameter, from the writes that were observed; None if the model was not built.
        missing_prefixes: vLLM's placeholders on this stage, as dot-terminated prefixes.
        accounted: parameters left at init that are no fault -> why.
        held: tensors of other stages that the model held to the end, or while 50 others were handed over -> bytes.
        stand_ins: part -> what stands in for it and why.
        device: "meta", or "cpu" for a model that asks for data while it is built or loaded.
        digests: SHA-256 per parameter (weights "real" only).
        build_seconds, load_seconds: on this machine.
    """

    stage: Stage
    verdict: str
    drafter: bool = False
    control: bool = False
    exception: str | None = None
    message: str | None = None
    key: str | None = None
    place: str | None = None
    function: str | None = None
    tensor: str | None = None
    traceback: list[str] = field(default_factory=list)
    model_class: str | None = None
    handed_over: int = 0
    order: str | None = None
    ledger: Ledger | None = None
    missing_prefixes: list[str] = field(default_factory=list)
    accounted: dict[str, str] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    patched: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    stand_ins: dict[str, str] = field(default_factory=dict)
    device: str = "meta"
    build_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def loads(self) -> bool:
        return self.verdict == LOADS

    @property
    def label(self) -> str:
        return "MTP drafter" if self.drafter else "PP=1 control" if self.control else f"stage {self.stage.rank}"

    @property
    def unaccounted(self) -> list[str]:
        """Parameters left at init that nobody accounts for."""
        return [name for name in self.ledger.left_at_init if name not in self.accounted] if self.ledger else []


@dataclass
class DryRunReport:
    """All stages' verdicts, the PP=1 control, and what was real.

    Attributes:
        stages: in the order of the ranks asked for.
        control: the PP=1 run that separates a bad checkpoint from a pipeline fault; None if it was not asked for.
        drafter: the MTP model on the last stage, when asked for.
        versions: of python, vllm, torch, transformers in the child.
        stand_ins: part -> what stands in for it and why, on any stage.
        evidence: what the child sent, as it came.
        recorded: None for a live run; otherwise when and where the shown result was recorded.
    """

    pp_size: int
    guard: str
    stages: list[StageReport]
    control: StageReport | None
    drafter: StageReport | None
    versions: dict[str, str]
    stand_ins: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    evidence: dict = field(repr=False)
    recorded: str | None = None

    @property
    def all(self) -> list[StageReport]:
        """The stages, then the drafter and the control if there are any."""
        return [*self.stages, *filter(None, (self.drafter, self.control))]

    @property
    def loads(self) -> bool:
        """Whether every stage that was run loads (the control and the drafter included)."""
        return all(report.loads for report in self.all)

    @property
    def source(self) -> str:
        """One line for a caption: live or recorded, and with which versions."""
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"recorded {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def table(self) -> pd.DataFrame:
        """One row per run: stage, layers, verdict, the key it died at, where, and how many tensors it got to."""
        reports = self.all
        return pd.DataFrame(
            {
                "stage": ["MTP drafter" if r.drafter else "PP=1 control" if r.control else r.stage.rank for r in reports],
                "layers": [f"{r.stage.layers[0]}-{r.stage.layers[-1]}" if not r.drafter else "MTP" for r in reports],
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
        return assemble(evidence, checkpoint, evidence.pop("recorded"))


def vllm_version() -> str | None:
    """Version of the installed vLLM, or None. GLMPP_WITHOUT_VLLM=1 shows what a machine without it shows."""
    return None if os.environ.get("GLMPP_WITHOUT_VLLM") == "1" else _contract.vllm_version()


def dry_run(
    checkpoint: Checkpoint,
    pp_size: int,
    guard: str = "installed",
    ranks: list[int] | None = None,
    *,
    layer_counts: list[int] | None = None,
    helper: str = "glmpp.loader:load_fp8_indexer_wk",
    callers: list[str] | None = None,
    weights: str = "meta",
    drafter: bool = False,
    control: bool = True,
    real_group: bool = False,
    strict: bool = False,
    all_deaths: bool = False,
    workers: int | None = None,
    recorded: str | Path | None = None,
    progress: bool | None = None,
) -> DryRunReport:
    """Build and load every stage with the installed vLLM's own classes, in a child process.

    Args:
        checkpoint: from a folder or from a config alone.
        pp_size: pipeline stages.
        guard: "installed": vLLM as it is; "off": the skip taken away (a release without one is unchanged);
            "helper": `helper` in place of vLLM's; "loader": nothing patched, the load format "glmpp" decides what is
            handed over.
        ranks: stages to run; default all.
        layer_counts: layers per stage, handed to vLLM as VLLM_PP_LAYER_PARTITION.
        helper: for guard "helper", a function with the signature of `glmpp.loader.load_fp8_indexer_wk`: "module:function"
            of an installed module, or "path/to/file.py:function".
        callers: vLLM modules, e.g. ["deepseek_v2"], that follow the helper's signature; others go on calling it with
            the arguments of their release. Default: all follow.
        weights: "meta" feeds tensors without data; "real" reads the folder's bytes onto the CPU with vLLM's reader.
        drafter: also build and load the MTP model (`deepseek_mtp`) on the last stage.
        control: also run PP=1 (pp_size 1 is its own control).
        real_group: one process per stage in a real gloo pipeline group instead of one process with rewritten ranks.
        strict: no stand-ins for parts of the model; a model that needs one cannot be built then.
        all_deaths: drop the tensor that a stage dies at, go on, and list every death.
        workers: processes that share the stages; default one for each core.
        recorded: a saved report to return, labelled as such, where vLLM is not installed; written when GLMPP_RECORD=1.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded), bad arguments, or the child broke down.
    """
    if guard not in GUARDS:
        raise GlmppError(f"guard {guard!r} is unknown; choose one of {', '.join(GUARDS)}")
    if weights not in ("meta", "real") or (weights == "real" and checkpoint.directory is None):
        raise GlmppError(f"weights={weights!r}: choose 'meta', or 'real' for a checkpoint with files")
    counts = os.environ.get(PARTITION_VARIABLE) if layer_counts is None else layer_counts
    if (said := layer_count_said(checkpoint.config)) is not None:
        make_stages(checkpoint.config, pp_size, counts, num_layers=said)  # refuses what cannot be
    ranks = list(range(pp_size)) if ranks is None else ranks
    if stray := [rank for rank in ranks if rank not in range(pp_size)]:
        raise GlmppError(f"there is no stage {stray[0]} of {pp_size}")
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError(NO_VLLM)
        return DryRunReport.load(recorded, checkpoint)

    runs = [{"rank": rank, "size": pp_size, "drafter": False, "control": False} for rank in ranks]
    if drafter:
        runs.append({"rank": pp_size - 1, "size": pp_size, "drafter": True, "control": False})
    if control and pp_size > 1 and not real_group:
        runs.append({"rank": 0, "size": 1, "drafter": False, "control": True})
    request = stage_request(checkpoint, guard, helper=helper, callers=callers, weights=weights)
    request |= {"strict": strict, "all_deaths": all_deaths}
    if counts is not None:
        request["layer_counts"] = counts if isinstance(counts, str) else ",".join(map(str, counts))
    started = time.perf_counter()
    with progress_bar(what=f"vLLM dry run, PP={pp_size}, {guard}", total=len(runs), show=progress) as bar:
        if real_group:
            messages = run_group(checkpoint, request, runs, pp_size, bar)
        else:
            messages = run_stages(checkpoint, request, runs, workers, bar)

    evidence = {
        "pp_size": pp_size,
        "guard": guard,
        "layer_counts": counts,
        "real_group": real_group,
        "seconds": time.perf_counter() - started,
        "messages": messages,
    }
    report = assemble(evidence, checkpoint)
    if recorded is not None and os.environ.get("GLMPP_RECORD") == "1":
        report.save(recorded)
    return report


def assemble(evidence: dict, checkpoint: Checkpoint, recorded: str | None = None) -> DryRunReport:
    """A report from what the child sent."""
    messages, pp_size = evidence["messages"], evidence["pp_size"]
    # What vLLM says counts: a config may give its layers in a way of its own.
    found = [message["num_layers"] for message in messages if message.get("num_layers")]
    num_layers = found[0] if found else layer_count(checkpoint.config)
    stages = make_stages(checkpoint.config, pp_size, evidence["layer_counts"], num_layers=num_layers)
    ready = next(message for message in messages if message["kind"] == "ready")
    reports = [_stage_report(message, checkpoint, stages) for message in messages if message["kind"] == "stage"]
    control = next((report for report in reports if report.control), None)
    if (control and control.verdict == CANNOT_BUILD) or pp_size == 1:
        for report in reports:
            report.verdict = CANNOT_TELL if report.verdict == CANNOT_BUILD and not report.drafter else report.verdict
    stand_ins = {} if evidence["real_group"] else {"pipeline group": RANK_STAND_IN}
    return DryRunReport(
        pp_size=pp_size,
        guard=evidence["guard"],
        stages=[report for report in reports if not report.control and not report.drafter],
        control=control,
        drafter=next((report for report in reports if report.drafter), None),
        versions=ready["versions"],
        stand_ins={part: why for report in reports for part, why in report.stand_ins.items()} | stand_ins,
        seconds=evidence["seconds"],
        peak_rss_bytes=peak_bytes([message for message in messages if message["kind"] == "end"]),
        evidence=evidence,
        recorded=recorded,
    )


def layer_count_said(config: dict) -> int | None:
    """Main layers, or None if the config does not say it in a way that the kit knows; vLLM may."""
    try:
        return layer_count(config)
    except GlmppError:
        return None


def peak_bytes(ends: list[dict]) -> int:
    """Peak memory of forks together: what they share with the process they came from counts once."""
    shared = max(end.get("shared_bytes", 0) for end in ends)
    return shared + sum(end["peak_rss_bytes"] - end.get("shared_bytes", 0) for end in ends)


def stage_request(
    checkpoint: Checkpoint,
    guard: str,
    helper: str = "glmpp.loader:load_fp8_indexer_wk",
    callers: list[str] | None = None,
    weights: str = "meta",
) -> dict:
    """What the child has to know to build and load stages of a checkpoint."""
    return {
        "kind": "dry_run",
        "config": checkpoint.config,
        "tensors": [(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()],
        "guard": guard,
        "helper": _absolute(helper),
        "callers": callers,
        "weights": weights,
        "strict": False,
        "all_deaths": False,
        "layer_counts": None,
    }


def _absolute(helper: str) -> str:
    """The child works in another folder."""
    file, _, name = helper.rpartition(":")
    return f"{Path(file).resolve()}:{name}" if file.endswith(".py") else helper


def ask_vllm(request: dict, timeout: float | None = None) -> dict:
    """The child's answer to a request that is not about a checkpoint's stages. Raises GlmppError if there is none."""
    if vllm_version() is None:
        raise GlmppError(NO_VLLM)
    return next(message for message in ask(request, timeout=timeout) if message["kind"] == request["kind"])


def _stage_report(message: dict, checkpoint: Checkpoint, stages: list[Stage]) -> StageReport:
    stage = (
        make_stages(checkpoint.config, 1, [stages[0].num_layers], num_layers=stages[0].num_layers)[0]
        if message["control"]
        else stages[message["rank"]]
    )
    known = {key: value for key, value in message.items() if key in StageReport.__dataclass_fields__}
    known["deaths"] = [Death(**{key: death[key] for key in Death.__dataclass_fields__}) for death in known.get("deaths", ())]
    report = StageReport(stage=stage, **known)
    if "columns" in message:
        columns = (column for column, count in message["columns"] for _ in range(count))
        parameters = {name: tuple(counts) for name, counts in message["parameters"].items()}
        report.ledger = Ledger(dict(zip(checkpoint, columns, strict=True)), parameters, padding=message.get("padding", {}))
        if report.verdict == LOADS and report.unaccounted:
            report.verdict = LEAVES_AT_INIT
    return report


def vllm_pp_indices(cases: list[tuple[int, int]]) -> list[list[tuple[int, int]]] | None:
    """What the installed vLLM's `get_pp_indices` says for (num_layers, pp_size) pairs; None where vLLM is not installed.

    Returns:
        For each pair the (start, end) of every stage. VLLM_PP_LAYER_PARTITION of this process applies.

    Raises:
        GlmppError: vLLM refuses a case; its words are in the message.
    """
    if vllm_version() is None:
        return None
    request = {"kind": "pp_indices", "cases": cases, "layer_counts": os.environ.get(PARTITION_VARIABLE)}
    return [[tuple(pair) for pair in case] for case in ask_vllm(request)["indices"]]
