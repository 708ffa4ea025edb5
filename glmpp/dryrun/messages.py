"""What is asked of the process that has imported vLLM, and what it answers: JSON with these types, on a line each.

A report is kept as the same lines, see `glmpp.dryrun.report`.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from glmpp.dryrun.fit import Memory
from glmpp.ledger import UnloadedParam

NO_DATA, MADE_UP, REAL = "none", "made up", "the checkpoint's"  # what the tensors that are handed over hold


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is built and loaded: a rank of a layout, the drafter that runs on it, or the PP=1 control.

    Attributes:
        stage, pp_size: the pipeline stage, of how many.
        tp_rank, tp_size: the same for tensor parallelism.
        dp_rank, dp_size: the same for data parallelism.
        ep: experts are spread over the ranks of a stage.
        layer_counts: as in VLLM_PP_LAYER_PARTITION; None: vLLM's even split.
        layout: tells those apart of which one request has runs.
    """

    stage: int = 0
    pp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    ep: bool = False
    drafter: bool = False
    control: bool = False
    layer_counts: str | None = None
    layout: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """(stage, tensor rank, data rank)."""
        return self.stage, self.tp_rank, self.dp_rank

    def __str__(self) -> str:
        """ "stage 1 of 2, rank 7 of 8"."""
        name = "the MTP drafter" if self.drafter else f"stage {self.stage} of {self.pp_size}"
        name += f", rank {self.tp_rank} of {self.tp_size}" if self.tp_size > 1 else ""
        name += f", replica {self.dp_rank} of {self.dp_size}" if self.dp_size > 1 else ""
        return "the PP=1 control" if self.control else name


# --- requests -----------------------------------------------------------------------------------------------------


class Request(Struct, kw_only=True, tag_field="kind"):
    """Attributes: gpu: the target that is pretended; None: any will do."""

    gpu: str | None = None


class StageRequest(Request, tag="dry_run"):
    """Build and load ranks of a checkpoint.

    Attributes:
        config, tensors, files: of the checkpoint; each tensor's name, dtype and shape; None for no files.
        model: folder with the config, and with the files if there are any.
        guard, helper, callers, fixes: see `glmpp.dryrun.deployment.Deployment`.
        weights, strict, all_failures, context, cache, keep: see `glmpp.dryrun.dry_run.Options`.
        runs: what is built; a fork works on those whose turn comes.
    """

    config: dict[str, Any]
    tensors: list[tuple[str, str, tuple[int, ...]]]
    files: list[str] | None
    guard: str
    helper: str
    callers: list[str] | None
    fixes: list[str]
    weights: str
    strict: bool
    all_failures: bool
    context: int | None
    cache: str
    keep: str | None
    model: str = ""
    runs: list[Run] = []


class LoadTimeRequest(Request, tag="load_time"):
    """Load ranks of a checkpoint's folder, with a clock in each part, see `glmpp.lab.load_time`.

    Attributes:
        stages: whose runs are loaded, `repeats` times each, with real bytes.
        filtered: vLLM's filter of experts is on.
        in_memory: the tensors come from a list in memory.
        cold: the files are dropped from the page cache before each load.
        reader: of the load format.
    """

    stages: StageRequest
    repeats: int
    filtered: bool = False
    in_memory: bool = False
    cold: bool = False
    reader: str | None = None


class FunctionCall(Request, tag="function_call"):
    """Call "module:function", which is looked for in a folder first."""

    folder: str
    function: str
    arguments: dict[str, Any]


class PPIndices(Request, tag="pp_indices"):
    """Ask vLLM's `get_pp_indices` for all stages of (number of layers, stages)."""

    cases: list[tuple[int, int]]
    layer_counts: str | None


AnyRequest = StageRequest | LoadTimeRequest | FunctionCall | PPIndices


class World(Struct):
    """What a fork of the process is told of itself: where its request lies and its log goes, and its process group.

    Attributes:
        group: file that the ranks of the group meet at.
        rank, size: in the group. 0 of 1: alone, and it pretends to be each rank that it runs.
        tp_size: ranks of the group that share a stage.
    """

    request: str
    log: str
    group: str
    rank: int = 0
    size: int = 1
    tp_size: int = 1


# --- answers ------------------------------------------------------------------------------------------------------


class Begins(Struct, tag="begins", tag_field="kind"):
    """Work on something has begun; no part of the answer."""

    what: str


class Ready(Struct, tag="ready", tag_field="kind"):
    """Attributes: versions: of python, vllm, torch, transformers."""

    versions: dict[str, str | None]


class Failure(Struct, kw_only=True, omit_defaults=True):
    """One exception while a stage is built or loads.

    Attributes:
        tensor: the checkpoint tensor that was handed over last; None when all of them had been, or none yet.
        file: that it lies in, where the files that vLLM opens are not all named alike; otherwise None.
        exception, message, key, place, function: its type, text, the KeyError's key, `file:line` in vLLM or the model.
        traceback: the lines of vLLM and of the model, of the first failure only.
    """

    exception: str
    message: str
    place: str
    function: str
    key: str | None = None
    tensor: str | None = None
    file: str | None = None
    traceback: list[str] = []


class Reads(Struct):
    """What a rank has read, see `glmpp.dryrun.cuts.readings.Reading`.

    Attributes:
        numbers: of each tensor how it was read: 32 bits each, compressed, in base 64.
        kinds: what the numbers from PARTS on stand for.
    """

    numbers: str
    kinds: list[list[tuple[int, int, list[tuple[int, int]]]]]


class Holder(Struct, frozen=True):
    """A module that refers to a tensor: its class, and the whole numbers that it has."""

    kind: str
    numbers: dict[str, int] = {}


class StageResult(Struct, kw_only=True, omit_defaults=True, tag="stage", tag_field="kind"):
    """What was run of a stage, and what was seen.

    Attributes:
        at: its place among the runs that were asked for.
        verdict, failures, left: see `glmpp.dryrun.stage_report.StageReport`.
        num_layers: main layers of the model, as vLLM counts them.
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
        carried: see `glmpp.dryrun.child.built_model.carried`.
        columns: column of the ledger, and how many tensors of the checkpoint in a row are in it; None: nothing was built.
        parameters: name -> elements written, of how many.
        filled, padding: see `glmpp.ledger.Ledger`.
    """

    run: Run
    at: int = 0
    verdict: str = "cannot be built"
    failures: list[Failure] = []
    num_layers: int | None = None
    build_seconds: float = 0.0
    load_seconds: float = 0.0
    model_class: str | None = None
    device: str = "meta"
    data: str = NO_DATA
    stand_ins: dict[str, str] = {}
    backends: dict[str, dict[str, int]] = {}
    refused: bool = False
    patched: list[str] = []
    handed_over: int = 0
    order: str | None = None
    missing_prefixes: list[str] = []
    experts: list[int] | None = None
    held: dict[str, int] = {}
    digests: dict[str, str] = {}
    why: str = ""
    unplaced: dict[str, int] = {}
    carried: dict[str, dict[int, list[Holder]]] = {}
    columns: list[tuple[str, int]] | None = None
    parameters: dict[str, tuple[int, int]] = {}
    filled: dict[str, int] = {}
    padding: dict[str, int] = {}
    left: dict[str, UnloadedParam] = {}
    reads: Reads | None = None
    memory: Memory | None = None


class Load(Struct, tag="load", tag_field="kind"):
    """Attributes: row: of `glmpp.lab.load_time.LoadTimes`, without its format and cache."""

    row: dict[str, Any]


class Answer(Struct, tag="answer", tag_field="kind"):
    """To a question that is not about a checkpoint's stages."""

    value: Any


class End(Struct, tag="end", tag_field="kind"):
    """All is done.

    Attributes:
        peak_rss_bytes: of the fork.
        shared_bytes: of these what it shares with the process that it came from.
    """

    peak_rss_bytes: int
    shared_bytes: int = 0


class Refused(Struct, tag="refused", tag_field="kind"):
    """All is over: a GlmppError, or with `fault` a KitError."""

    message: str
    details: list[str] = []
    fault: bool = False


Message = Begins | Ready | StageResult | Load | Answer | End | Refused
