"""Which layout for these GPUs? Every TP x PP (x EP) that takes all of them, loaded by vLLM, and what fits beside it."""

from __future__ import annotations

import itertools
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.config import text_config
from glmpp.gpus import GPU, GPUS
from glmpp.partition import PARTITION_VARIABLE, balance_cache, layer_list
from glmpp.progress import progress_bar
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.dry_run import run_of, stage_request
from glmpp.verdict.fit import Fit, Memory
from glmpp.verdict.forks import run_stages
from glmpp.verdict.installed import NO_VLLM, vllm_version
from glmpp.verdict.report import LEAVES_AT_INIT, LOADS, DryRunReport, StageReport, assemble

CONTEXT = 131_072  # tokens of a request, unless asked otherwise
WORTH_IT = 1.01  # of the tokens of vLLM's split: below it a split of its own is not worth a variable
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
CRITERION = (
    "first those that load completely and hold a request of this length; of these first the most requests at a time, then "
    "the fewest stages. It is about memory, not speed: every token passes all stages, one after the other, and all GPUs of "
    "a stage exchange data in every layer, which over nodes needs a fast network"
)


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs, and what came of it.

    Attributes:
        deployment: with the split that leaves most room, its guard "installed" if vLLM's own load does, otherwise "loader".
        verdict: LOADS, or of the first rank that does not.
        why: what vLLM says to it, "" if it loads.
        fit: None if a stage was not built.
        even: tokens with vLLM's own split, where `deployment` has another.
        ran: ranks that were built and loaded for it.
    """

    deployment: Deployment
    verdict: str
    why: str
    fit: Fit | None
    even: int | None
    ran: int

    @property
    def requests(self) -> float:
        return (self.fit and self.fit.requests) or 0.0

    @property
    def tokens(self) -> int:
        return (self.fit and self.fit.tokens) or 0

    @property
    def serves(self) -> bool:
        """Whether it loads, all of it, and has room for one request."""
        return self.verdict == LOADS and self.requests >= 1

    @property
    def rank(self) -> tuple:
        """Sorts the best first, see CRITERION."""
        return not self.serves, self.verdict != LOADS, -round(self.requests, 1), self.deployment.pp, self.deployment.ep


@dataclass(frozen=True)
class Layouts:
    """All layouts of some GPUs, best first.

    Attributes:
        asked: GPUs in all; tokens of a request.
        left: sizes that were not tried -> why.
        seconds: it took, on this machine.
    """

    layouts: list[Layout]
    asked: tuple[int, int]
    gpu: GPU
    utilization: float | None
    left: dict[str, str]
    versions: dict[str, str]
    seconds: float


def layouts(
    checkpoint: Checkpoint,
    gpus: int,
    gpu: str | None = None,
    context: int = CONTEXT,
    utilization: float | None = None,
    progress: bool | None = None,
) -> Layouts:
    """Try every TP x PP, and EP where the model has experts, that takes exactly so many GPUs.

    Of stages with the same kinds of layers one is run, its first shard: what they take is the same. All are loaded with the
    load format; where that loads, vLLM's own format is asked, too, without EP, for the answer does not depend on it.

    Args:
        gpus: in all.
        gpu: which, see `Deployment`.
        context: tokens of the longest request.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.

    Raises:
        GlmppError: vLLM is not installed, no GPU at all, a GPU that is none, or the child broke down.
    """
    started = time.perf_counter()
    if vllm_version() is None:
        raise GlmppError(NO_VLLM)
    if gpus < 1 or context < 1:
        raise GlmppError(f"{gpus} GPUs, requests of {context} tokens: there is at least 1 of each")
    search = Search(checkpoint, gpus, Deployment(gpu=gpu), context, utilization, progress)
    even = search.run(search.deployments, "loader")
    split = {one.deployment: counts for one in even if (counts := search.better(one))}
    balanced = search.run([replace(one, layer_counts=counts) for one, counts in split.items()], "loader")
    best = search.best(even, balanced)
    stock = search.run([one.deployment for one, _ in best if one.verdict == LOADS and not one.deployment.ep], "installed")
    loads = {(one.deployment.tp, one.deployment.pp) for one in stock if one.verdict == LOADS}
    found = []
    for one, tokens in best:
        guard = "installed" if (one.deployment.tp, one.deployment.pp) in loads else "loader"
        found.append(replace(one, deployment=replace(one.deployment, guard=guard), even=tokens))
    return Layouts(
        layouts=sorted(found, key=lambda one: one.rank),
        asked=(gpus, context),
        gpu=GPUS[search.base.gpu],
        utilization=utilization,
        left=search.left,
        versions=search.versions,
        seconds=time.perf_counter() - started,
    )


class Search:
    """The layouts of one checkpoint on some GPUs, run in as few requests as can be.

    Attributes:
        deployments: what is tried.
        left: what is not -> why.
        kinds: of each main layer, what tells it from others: names, dtypes and shapes of its tensors, and its type.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        gpus: int,
        base: Deployment,
        context: int,
        utilization: float | None,
        progress: bool | None,
    ):
        if base.gpu not in GPUS:
            raise GlmppError(f"--gpu {base.gpu}: whether a model fits is asked of a GPU: {', '.join(GPUS)}")
        self.checkpoint, self.base, self.context, self.utilization = checkpoint, base, context, utilization
        self.progress, self.versions, self.left = progress, {}, {}
        self.kinds = layer_kinds(checkpoint)
        self.deployments = []
        experts = any(text_config(checkpoint.config).get(name) for name in EXPERTS)
        for tp in (size for size in range(gpus, 0, -1) if gpus % size == 0):
            if gpus // tp > len(self.kinds):
                self.left[f"PP={gpus // tp}"] = f"the model has {len(self.kinds)} layers"
                continue
            self.deployments += [
                replace(base, tp=tp, pp=gpus // tp, ep=ep) for ep in (False, True)[: 1 + (experts and tp > 1)]
            ]

    def run(self, deployments: list[Deployment], guard: str) -> list[Layout]:
        """Layouts with a guard, the runs of all of them in one request."""
        deployments = [replace(one, guard=guard) for one in deployments]
        runs, chosen = [], []
        for at, deployment in enumerate(deployments):
            split = deployment.stages(self.checkpoint.config)
            stages = distinct([self.kinds[stage.layers.start : stage.layers.stop] for stage in split])
            chosen.append(stages)
            runs += [
                {**run_of(deployment, stage), "layer_counts": deployment.partition, "layout": at} for stage in set(stages)
            ]
        if not runs:
            return []
        request = stage_request(self.checkpoint, replace(self.base, guard=guard), context=self.context)
        with progress_bar(what=f"{len(deployments)} layouts, {guard}", total=len(runs), show=self.progress) as bar:
            messages = run_stages(self.checkpoint, request, runs, bar)
        found = []
        for at, (deployment, stages) in enumerate(zip(deployments, chosen)):
            mine = [message for message in messages if message.get("layout", at) == at]
            report = assemble(
                {"messages": mine, "real_group": False, "seconds": 0.0},
                self.checkpoint,
                deployment,
                deployment.stages(self.checkpoint.config),
            )
            self.versions = report.versions
            found.append(self.layout(report, stages))
        return found

    def layout(self, report: DryRunReport, stages: list[int]) -> Layout:
        """What came of one. Args: stages: of each stage the one that was run for it."""
        by_rank = {one.stage.rank: one for one in report.stages}
        failing = next((by_rank[rank] for rank in stages if not by_rank[rank].loads), None)
        memories = [by_rank[rank].memory for rank in stages]
        found = Fit(memories, GPUS[self.base.gpu], self.utilization) if all(memories) else None
        verdict = LOADS if failing is None else failing.verdict
        return Layout(report.deployment, verdict, reason(failing) if failing else "", found, None, len(by_rank))

    def better(self, one: Layout) -> list[int] | None:
        """Layers per stage that leave more tokens than vLLM's split, by what each layer takes; None if none does."""
        if one.deployment.pp == 1 or one.fit is None or not one.fit.known:
            return None
        stages = one.deployment.stages(self.checkpoint.config)
        weights, pages = {}, {}
        for stage, memory in zip(stages, one.fit.memories):
            for layer in stage.layers:
                ran = layer if layer < len(memory.layers) and memory.layers[layer] else None
                if ran is not None:
                    weights[self.kinds[layer]], pages[self.kinds[layer]] = memory.layers[layer], memory.kv_cache.pages[layer]
        if not set(self.kinds) <= weights.keys():
            return None
        ends = [rest(memory) for memory in (one.fit.memories[0], one.fit.memories[-1])]
        everywhere = min(rest(memory) for memory in one.fit.memories)
        room = int(one.fit.gpu.memory * one.fit.share) - everywhere
        counts = balance_cache(
            [weights[kind] for kind in self.kinds],
            [pages[kind] for kind in self.kinds],
            one.deployment.pp,
            room,
            *(end - everywhere for end in ends),
        )
        return None if counts is None or counts == [len(stage.layers) for stage in stages] else counts

    def best(self, even: list[Layout], balanced: list[Layout]) -> list[tuple[Layout, int | None]]:
        """Of each layout the one with vLLM's split or the other, whichever is worth it, and the other's tokens."""
        others = {replace(one.deployment, layer_counts=None): one for one in balanced}
        found = []
        for one in even:
            other = others.get(one.deployment)
            worth = other is not None and other.verdict == LOADS and other.tokens > WORTH_IT * one.tokens
            found.append((other, one.tokens) if worth else (one, None))
        return found


def rest(memory: Memory) -> int:
    """Bytes that a rank holds outside its layers."""
    return memory.weights - sum(memory.layers)


def layer_kinds(checkpoint: Checkpoint) -> list[tuple]:
    """Of each main layer what tells it from others: its tensors, and its type if the config has a list of these."""
    stage = Deployment().stages(checkpoint.config, layer_list=layer_list(checkpoint))[0]
    tensors: list[list] = [[] for _ in stage.layers]
    for spec in checkpoint.values():
        layer = stage.layer_of(spec.name)
        if layer is not None and layer < len(tensors):
            tensors[layer].append((spec.name.split(f".{layer}.", 1)[1], spec.dtype, spec.shape))
    types = text_config(checkpoint.config).get("layer_types") or itertools.repeat(None)
    return [(hash(tuple(sorted(found))), kind) for found, kind in zip(tensors, types)]


def distinct(stages: list[list[tuple]]) -> list[int]:
    """For each stage, given by the kinds of its layers, the first that takes the same; the two ends are their own."""
    first: dict[object, int] = {}
    found = []
    for rank, kinds in enumerate(stages):
        same = (rank == 0, rank == len(stages) - 1, frozenset(Counter(kinds).items()))
        found.append(first.setdefault(same, rank))
    return found


def reason(failing: StageReport) -> str:
    """Why a rank does not load, in vLLM's words."""
    if failing.verdict == LEAVES_AT_INIT:
        return f"{failing.label}: {len(failing.unaccounted)} parameters at init, {failing.unaccounted[0]} first"
    return f"{failing.label}: {' '.join(str(failing.message or '').split())[:200]}"


def serve_line(model: str, layout: Layout, context: int, utilization: float | None) -> str:
    """The command to paste."""
    one = layout.deployment
    split = f"{PARTITION_VARIABLE}={one.partition} " if one.partition and one.pp > 1 else ""
    words = [f"--tensor-parallel-size {one.tp}", f"--pipeline-parallel-size {one.pp}"]
    words += ["--enable-expert-parallel"] if one.ep else []
    words += [f"--max-model-len {context}", *([f"--gpu-memory-utilization {utilization}"] if utilization else [])]
    words += ["--load-format glmpp"] if one.guard == "loader" else []
    return f"{split}vllm serve {shlex.quote(model)} {' '.join(words)}"


def as_text(model: str, checkpoint: Checkpoint, found: Layouts) -> str:
    """For a terminal: a line for each layout, best first, and the commands of those that serve."""
    gpus, context = found.asked
    share = next((one.fit.share for one in found.layouts if one.fit), found.utilization or 0)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines = [
        f"{checkpoint.source}: {len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:,.3f} GB",
        f"{gpus} x {found.gpu.name}, {share:.0%} of {found.gpu.memory / 1e9:.1f} GB each; requests of {context:,} tokens",
        versions,
        "",
        f"{'layout':<14} {'verdict':<16} {'GB on the fullest':>18} {'tokens':>12} {'requests':>9}",
    ]
    for one in found.layouts:
        sizes = f"{one.fit.fullest / 1e9:>18.1f} {one.tokens:>12,} {one.requests:>9.1f}" if one.fit else ""
        verdict = one.verdict if one.verdict != LOADS or one.serves else "loads, no room" if one.fit else one.verdict
        lines.append(f"{one.deployment.layout:<14} {verdict.split(',')[0]:<16} {sizes}".rstrip())
        if one.even is not None:
            lines.append(
                f"{'':<15}with {PARTITION_VARIABLE}={one.deployment.partition}; {one.even:,} tokens with vLLM's split"
            )
        if one.why:
            lines.append(f"{'':<15}{one.why}")
    lines += [f"{sizes:<14} not tried: {why}" for sizes, why in found.left.items()]
    lines += ["", f"best first: {CRITERION}", "left out of the memory: activations, CUDA graphs, NCCL's buffers", ""]
    serving = [one for one in found.layouts if one.serves]
    lines += [serve_line(model, one, context, found.utilization) for one in serving]
    if any(one.deployment.guard == "loader" for one in serving):
        lines.append("(--load-format glmpp where vLLM's own load dies; glmpp has to be installed where vLLM runs)")
    ran = sum(one.ran for one in found.layouts)
    lines += ["", f"run: {ran} ranks, of stages with the same kinds of layers one, its first shard"]
    return "\n".join(lines)


def as_json(model: str, checkpoint: Checkpoint, found: Layouts) -> dict:
    """The same as plain values."""
    gpus, context = found.asked
    return {
        "schema": 1,
        "checkpoint": {"source": checkpoint.source, "tensors": len(checkpoint), "bytes": checkpoint.nbytes},
        "versions": found.versions,
        "gpus": gpus,
        "gpu": found.gpu.name,
        "context": context,
        "criterion": CRITERION,
        "not_tried": found.left,
        "layouts": [_as_json(model, one, found) for one in found.layouts],
    }


def _as_json(model: str, one: Layout, found: Layouts) -> dict:
    return {
        "tp": one.deployment.tp,
        "pp": one.deployment.pp,
        "ep": one.deployment.ep,
        "verdict": one.verdict,
        "why": one.why,
        "needs_load_format": one.deployment.guard == "loader",
        "layer_partition": one.deployment.partition,
        "weights_bytes": one.fit and one.fit.fullest,
        "tokens": one.fit and one.fit.tokens,
        "tokens_with_even_split": one.even,
        "requests": one.fit and one.fit.requests,
        "command": serve_line(model, one, found.asked[1], found.utilization) if one.serves else None,
    }
