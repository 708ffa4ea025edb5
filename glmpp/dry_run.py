"""Will every pipeline stage load this checkpoint, on the vLLM that is installed? No GPU, no weights.

The work is done in a child process (`_dry_run_child`), so that the notebook's kernel never imports or patches vLLM. The
child imports vLLM once and forks for each dry run: the first takes the time of the imports, later ones do not.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from glmpp.checkpoint import Checkpoint, text_config
from glmpp.errors import GlmppError
from glmpp.loader import Ledger
from glmpp.partition import PARTITION_VARIABLE, Stage, make_stages

GUARDS = ("installed", "off", "helper", "loader")
LOADS, DIES, CANNOT_BUILD, LEAVES_AT_INIT = "loads", "dies", "cannot be built", "loads, leaves parameters at init"


@dataclass
class StageReport:
    """One stage's verdict and the evidence for it.

    Attributes:
        stage: what the stage holds.
        verdict: LOADS, DIES, CANNOT_BUILD or LEAVES_AT_INIT.
        exception, message, key, place, function: of the death: its type, text, the KeyError's key, `file:line` in vLLM.
        tensor: the checkpoint tensor that was handed over last.
        handed_over: tensors handed over before the end, good or bad.
        order: SHA-256 of their names in the order in which they came.
        ledger: every tensor and every parameter, from the writes that were observed; None if the model was not built.
        missing_prefixes: vLLM's placeholders on this stage, as dot-terminated prefixes.
        accounted: parameters left at init that are no fault -> why.
        pending: bytes still in the helper's buffer, by layer (guard "helper" only).
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
    pending: dict[str, int] = field(default_factory=dict)
    patched: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    build_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def loads(self) -> bool:
        return self.verdict == LOADS


@dataclass
class DryRunReport:
    """All stages' verdicts, the PP=1 control, and what was real.

    Attributes:
        stages: in the order of the ranks asked for.
        control: the PP=1 run that separates a bad checkpoint from a pipeline fault; None if it was not asked for.
        drafter: the MTP model on the last stage, when asked for.
        versions: of python, vllm, torch, transformers in the child.
        stand_ins: part -> what stands in for it and why.
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
    def loads(self) -> bool:
        """Whether every stage that was run loads (the control and the drafter included)."""
        return all(report.loads for report in [*self.stages, *filter(None, (self.control, self.drafter))])

    @property
    def source(self) -> str:
        """One line for a caption: live or recorded, and with which versions."""
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"recorded {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def table(self) -> pd.DataFrame:
        """One row per run: stage, layers, verdict, the key it died at, where, and how many tensors it got to."""
        reports = [*self.stages, *filter(None, (self.drafter, self.control))]
        return pd.DataFrame(
            {
                "stage": ["MTP drafter" if r.drafter else "PP=1 control" if r.control else r.stage.rank for r in reports],
                "layers": [f"{r.stage.layers[0]}-{r.stage.layers[-1]}" if not r.drafter else "MTP" for r in reports],
                "verdict": [r.verdict for r in reports],
                "died at": [str(r.key or r.message or "").split("\n")[0] for r in reports],
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
        return _assemble(evidence, checkpoint, evidence.pop("recorded"))


def vllm_version() -> str | None:
    """Version of the installed vLLM, or None. GLMPP_WITHOUT_VLLM=1 shows what a machine without it shows."""
    if os.environ.get("GLMPP_WITHOUT_VLLM") == "1":
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("vllm")
    return None


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
    recorded: str | Path | None = None,
    progress: bool = True,
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
        helper: "module:function" with the signature of `glmpp.loader.load_fp8_indexer_wk`, for guard "helper".
        callers: vLLM modules, e.g. ["deepseek_v2"], that follow the helper's signature; others go on calling it with
            the arguments of their release. Default: all follow.
        weights: "meta" feeds tensors without data; "real" reads the folder's bytes onto the CPU with vLLM's reader.
        drafter: also build and load the MTP model (`deepseek_mtp`) on the last stage.
        control: also run PP=1 (pp_size 1 is its own control).
        real_group: one process per stage in a real gloo pipeline group instead of one process with rewritten ranks.
        recorded: a saved report to return, labelled as such, where vLLM is not installed; written when GLMPP_RECORD=1.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded), bad arguments, or the child broke down.
    """
    if guard not in GUARDS:
        raise GlmppError(f"guard {guard!r} is unknown; choose one of {', '.join(GUARDS)}")
    if weights not in ("meta", "real") or (weights == "real" and checkpoint.directory is None):
        raise GlmppError(f"weights={weights!r}: choose 'meta', or 'real' for a checkpoint with files")
    stages = make_stages(checkpoint.config, pp_size, layer_counts)
    ranks = list(range(pp_size)) if ranks is None else ranks
    if stray := [rank for rank in ranks if rank not in range(pp_size)]:
        raise GlmppError(f"there is no stage {stray[0]} of {pp_size}")
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError("vLLM is not installed here: pip install 'glmpp[vllm]' (Linux)")
        return DryRunReport.load(recorded, checkpoint)

    runs = [{"rank": rank, "size": pp_size, "drafter": False, "control": False} for rank in ranks]
    if drafter:
        runs.append({"rank": pp_size - 1, "size": pp_size, "drafter": True, "control": False})
    if control and pp_size > 1 and not real_group:
        runs.append({"rank": 0, "size": 1, "drafter": False, "control": True})
    request = {
        "kind": "dry_run",
        "config": checkpoint.config,
        "tensors": [(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()],
        "guard": guard,
        "helper": helper,
        "callers": callers,
        "weights": weights,
        "layer_counts": ",".join(str(len(stage.layers)) for stage in stages) if _uneven(layer_counts) else None,
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        model = checkpoint.directory
        if model is None:
            model = Path(folder)
            (model / "config.json").write_text(json.dumps(checkpoint.config))
        request["model"] = str(Path(model).resolve())
        with tqdm(total=len(runs), desc=f"vLLM dry run, PP={pp_size}, {guard}", disable=not progress, leave=False) as bar:
            if real_group:
                messages = _in_real_group(request, runs, pp_size, Path(folder), bar)
            else:
                messages = _Child(request, runs, (0, 1), Path(folder)).collect(bar)

    evidence = {
        "pp_size": pp_size,
        "guard": guard,
        "layer_counts": [len(stage.layers) for stage in stages],
        "seconds": time.perf_counter() - started,
        "messages": messages,
    }
    report = _assemble(evidence, checkpoint)
    if recorded is not None and os.environ.get("GLMPP_RECORD") == "1":
        report.save(recorded)
    return report


def _assemble(evidence: dict, checkpoint: Checkpoint, recorded: str | None = None) -> DryRunReport:
    """A report from what the child sent."""
    messages, pp_size = evidence["messages"], evidence["pp_size"]
    stages = make_stages(checkpoint.config, pp_size, evidence["layer_counts"])
    ready = next(message for message in messages if message["kind"] == "ready")
    reports = [_stage_report(message, checkpoint, stages) for message in messages if message["kind"] == "stage"]
    return DryRunReport(
        pp_size=pp_size,
        guard=evidence["guard"],
        stages=[report for report in reports if not report.control and not report.drafter],
        control=next((report for report in reports if report.control), None),
        drafter=next((report for report in reports if report.drafter), None),
        versions=ready["versions"],
        stand_ins=ready["stand_ins"],
        seconds=evidence["seconds"],
        peak_rss_bytes=max(message["peak_rss_bytes"] for message in messages if message["kind"] == "end"),
        evidence=evidence,
        recorded=recorded,
    )


def _uneven(layer_counts: list[int] | None) -> bool:
    return layer_counts is not None or PARTITION_VARIABLE in os.environ


def _in_real_group(request: dict, runs: list, pp_size: int, folder: Path, bar: tqdm) -> list[dict]:
    """One child per stage, joined in one pipeline group. There is no PP=1 control in it."""
    children = [
        _Child(request, [run for run in runs if run["rank"] == rank], (rank, pp_size), folder) for rank in range(pp_size)
    ]
    return [message for child in children for message in child.collect(bar)]


class _Server:
    """The process that has imported vLLM and forks for every request. One for each kernel, started on first use."""

    current: _Server | None = None

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        command = [sys.executable, "-m", "glmpp._dry_run_child", str(theirs.fileno())]
        # A session of its own: interrupting the notebook's kernel must not end it.
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        theirs.close()
        self.owner = os.getpid()
        atexit.register(self.socket.close)

    @classmethod
    def running(cls) -> _Server:
        server = cls.current
        if server is None or server.owner != os.getpid() or server.process.poll() is not None:
            server = cls.current = cls()
        return server


class _Child:
    """One request, answered in a fork of the server; its messages come through a pipe that closes when it ends."""

    def __init__(self, request: dict, runs: list, world: tuple[int, int], folder: Path):
        rank, size = world
        self.log = folder / f"log-{rank}.txt"
        request = {
            **request,
            "runs": runs,
            "world": {"rank": rank, "size": size, "init_file": str(folder / "group")},
            "log": str(self.log),
            "cwd": os.getcwd(),
        }
        path = folder / f"request-{rank}.json"
        path.write_text(json.dumps(request))
        self.server = _Server.running()
        read, write = os.pipe()
        try:
            socket.send_fds(self.server.socket, [str(path).encode()], [write])
        finally:
            os.close(write)
        self.pipe = os.fdopen(read)

    def collect(self, bar: tqdm) -> list[dict]:
        messages: list[dict] = []
        try:
            for line in self.pipe:
                messages.append(json.loads(line))
                bar.update(messages[-1]["kind"] in ("stage", "load"))
        finally:
            self.pipe.close()
            ended = bool(messages) and messages[-1]["kind"] == "end"
            if messages and not ended:  # interrupted, or broken down
                with contextlib.suppress(ProcessLookupError):
                    os.kill(messages[0]["pid"], signal.SIGKILL)
        if not ended:
            raise GlmppError(f"the vLLM child process broke off after {len(messages)} messages:\n{self.last_words()}")
        return messages

    def last_words(self, lines: int = 15) -> str:
        if self.log.exists():
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        self.server.log.seek(0)
        return "".join(self.server.log.readlines()[-lines:])


def _stage_report(message: dict, checkpoint: Checkpoint, stages: list[Stage]) -> StageReport:
    stage = (
        make_stages(checkpoint.config, 1, [text_config(checkpoint.config)["num_hidden_layers"]])[0]
        if message["control"]
        else stages[message["rank"]]
    )
    known = {key: value for key, value in message.items() if key in StageReport.__dataclass_fields__}
    report = StageReport(stage=stage, **known)
    if "columns" in message:
        columns = (column for column, count in message["columns"] for _ in range(count))
        parameters = {name: tuple(counts) for name, counts in message["parameters"].items()}
        report.ledger = Ledger(dict(zip(checkpoint, columns, strict=True)), parameters)
        if report.verdict == LOADS and set(report.ledger.left_at_init) - set(report.accounted):
            report.verdict = LEAVES_AT_INIT
    return report


def vllm_pp_indices(cases: list[tuple[int, int]]) -> list[list[tuple[int, int]]] | None:
    """What the installed vLLM's `get_pp_indices` says for (num_layers, pp_size) pairs; None where vLLM is not installed.

    Returns:
        For each pair the (start, end) of every stage. VLLM_PP_LAYER_PARTITION of this process applies.
    """
    if vllm_version() is None:
        return None
    program = (
        "import json, sys; from vllm.distributed.utils import get_pp_indices as f;"
        "print(json.dumps([[f(n, k, p) for k in range(p)] for n, p in json.load(sys.stdin)]))"
    )
    environment = {**os.environ, "VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise GlmppError(f"vLLM's get_pp_indices failed: {done.stderr.strip().splitlines()[-1]}")
    return [[tuple(pair) for pair in case] for case in json.loads(done.stdout.splitlines()[-1])]
