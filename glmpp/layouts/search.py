"""Which layout for these GPUs? Every TP x PP (x EP) that takes all of them, loaded by vLLM, and what fits beside it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.crossing import crossings, uncut
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import Options, other_ranks, stage_request, with_ranks
from glmpp.dryrun.fit import Fit, Memory
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.messages import Message, Run, StageResult
from glmpp.dryrun.report import DryRunReport, assemble
from glmpp.dryrun.stage_report import CROSSES, INCOMPLETE, LOADS, StageReport
from glmpp.dryrun.workers import TIMEOUT, run_stages
from glmpp.errors import GlmppError, positive, whole
from glmpp.formats.config import has_experts, text_config
from glmpp.gpus import CPU, GPUS, gpu_of
from glmpp.layouts.layer_list import layer_list
from glmpp.layouts.layout import Layout, Layouts
from glmpp.layouts.split import balance, balance_cache, cache_cost, largest
from glmpp.partition import MAX_GPUS
from glmpp.progress import progress_bar
from glmpp.records import digest, recording

CONTEXT = 131_072  # tokens of a request, unless asked otherwise
WORTH_IT = 1.01  # of the tokens of vLLM's split: below it a split of its own is not worth a variable


def layouts(
    checkpoint: Checkpoint,
    gpus: int,
    gpu: str | None = None,
    context: int = CONTEXT,
    utilization: float | None = None,
    timeout: float = TIMEOUT,
    progress: bool | None = None,
    recorded: str | Path | None = None,
) -> Layouts:
    """Try every TP x PP, and EP where the model has experts, that takes exactly so many GPUs.

    Of stages with the same kinds of layers one is run, its first and its last shard, and those between where it cannot be
    told from these two what they read: what such stages take is the same. All are loaded with the load format. Where that
    loads, vLLM's own is asked, too, at the two ends: between them they are handed all that any stage is.

    Args:
        gpus: in all.
        gpu: which, see `Deployment`.
        context: tokens of the longest request.
        utilization: share of a GPU's memory that vLLM may take; default what it takes by default.
        timeout: seconds that each rank may take, and the import of vLLM before the first.
        recorded: where to save to with GLMPP_RECORD=1, and what to return where vLLM is not installed.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), no GPU, or the child broke
            down.
    """
    started = time.perf_counter()
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError(NO_VLLM)
        return Layouts.load(recorded, question(checkpoint, gpus, gpu, context, utilization))
    gpus, how = whole("gpus", gpus, 1, MAX_GPUS), Options(context=context, timeout=timeout, progress=progress)
    if utilization is not None:
        positive("utilization", utilization, 1)
    search = Search(checkpoint, gpus, Deployment(gpu=gpu), how, utilization)
    even = search.run(search.deployments, "loader")
    split = {one.deployment: counts for one in even if (counts := search.better(one))}
    balanced = search.run([replace(one, layer_counts=counts) for one, counts in split.items()], "loader")
    best = search.best(even, balanced)
    stock = search.run([one.deployment for one, _ in best if one.verdict == LOADS], "installed", ends=True)
    loads = {one.deployment for one in stock if one.verdict == LOADS}
    found = []
    for one, tokens in best:
        asked = replace(one.deployment, guard="installed")
        found.append(replace(one, deployment=asked if asked in loads else one.deployment, even=tokens))
    result = Layouts(
        layouts=sorted(found, key=lambda one: one.rank),
        asked=(gpus, how.context),
        gpu=gpu_of(search.base.gpu),
        utilization=utilization,
        left=search.left,
        versions=search.versions,
        seconds=time.perf_counter() - started,
        checkpoint=digest(checkpoint),
    )
    if recorded is not None and recording():
        result.save(recorded)
    return result


def question(
    checkpoint: Checkpoint, gpus: int, gpu: str | None = None, context: int = CONTEXT, utilization: float | None = None
) -> dict:
    """What layouts are an answer to, as it is recorded; arguments of `layouts`."""
    gpu = Deployment(gpu=gpu).gpu
    return {"checkpoint": digest(checkpoint), "asked": (gpus, context), "gpu": gpu, "utilization": utilization}


class Search:
    """The layouts of one checkpoint on some GPUs, run in as few requests as can be.

    Attributes:
        deployments: what is tried.
        left: what is not -> why.
        starts: layers that a stage can begin with and read nothing of another's but hidden states.
        kinds: of each main layer, what tells it from others: names, dtypes and shapes of its tensors, and its type.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        gpus: int,
        base: Deployment,
        options: Options,
        utilization: float | None,
    ):
        if base.gpu == CPU:
            raise GlmppError(f"--gpu {base.gpu}: whether a model fits is asked of a GPU: {', '.join(GPUS)}")
        self.checkpoint, self.base, self.options, self.utilization = checkpoint, base, options, utilization
        self.versions, self.left, self.starts = {}, {}, []
        self.kinds = layer_kinds(checkpoint)
        self.deployments = []
        experts = has_experts(checkpoint.config)
        for tp in (size for size in range(gpus, 0, -1) if gpus % size == 0):
            if gpus // tp > len(self.kinds):
                self.left[f"PP={gpus // tp}"] = f"the model has {len(self.kinds)} layers"
                continue
            self.deployments += [
                replace(base, tp=tp, pp=gpus // tp, ep=ep) for ep in (False, True)[: 1 + (experts and tp > 1)]
            ]

    def run(self, deployments: list[Deployment], guard: str, ends: bool = False) -> list[Layout]:
        """Layouts with a guard, the runs of all of them in one request.

        Args:
            ends: run the first and the last stage only.
        """
        deployments = [replace(one, guard=guard) for one in deployments]
        runs, chosen = [], []
        for at, deployment in enumerate(deployments):
            split = deployment.stages(self.checkpoint.config)
            stages = distinct([self.kinds[stage.layers.start : stage.layers.stop] for stage in split])
            stages = [stage for stage in stages if not ends or stage in (0, len(split) - 1)]
            chosen.append(stages)
            ranks = [rank for stage in sorted(set(stages)) for rank in deployment.corners_of(stage)]
            runs += [self.run_of(deployment, rank, at) for rank in ranks]
        if not runs:
            return []
        request = stage_request(self.checkpoint, replace(self.base, guard=guard), self.options)
        with progress_bar(what=f"{len(deployments)} layouts, {guard}", total=len(runs), show=self.options.progress) as bar:
            messages = run_stages(self.checkpoint, request, runs, bar, timeout=self.options.timeout)
            between = []
            for at, deployment in enumerate(deployments):
                between += [self.run_of(deployment, rank, at) for rank in self.between(of_layout(messages, at), deployment)]
            if between:
                bar.total += len(between)
                more = run_stages(self.checkpoint, request, between, bar, timeout=self.options.timeout)
                messages = with_ranks(messages, more)
        found, results = [], [one for one in messages if isinstance(one, StageResult)]
        self.starts = uncut(results, len(self.kinds), self.kinds)
        for at, (deployment, stages) in enumerate(zip(deployments, chosen)):
            report = assemble(of_layout(messages, at), self.checkpoint, deployment)
            # Of stages that were not run, and by what the ranks of other layouts have.
            report.crossings = crossings(results, deployment.stages(self.checkpoint.config), self.kinds)
            self.versions = report.versions
            found.append(self.layout(report, stages))
        return found

    def run_of(self, deployment: Deployment, rank: tuple[int, int, int], at: int) -> Run:
        """A run of the layout with this number."""
        return msgspec.structs.replace(deployment.run(*rank), layout=at)

    def between(self, messages: list[Message], deployment: Deployment) -> list[tuple[int, int, int]]:
        """Ranks between the first and the last shard of a stage, see `other_ranks`; none where one of these fails."""
        if any(isinstance(one, StageResult) and one.verdict != LOADS for one in messages):
            return []
        return other_ranks(messages, self.checkpoint, deployment)

    def layout(self, report: DryRunReport, stages: list[int]) -> Layout:
        """What came of one. Args: stages: of each stage the one that was run for it."""
        failing = next((one for one in report.stages if not one.loads), None)
        first = {one.stage.rank: one for one in reversed(report.stages)}  # ranks, of which the first is the fullest
        memories = [first[rank].memory for rank in stages]
        found = Fit(memories, gpu_of(self.base.gpu), self.utilization) if all(memories) else None
        verdict = failing.verdict if failing else CROSSES if report.crossings else LOADS
        why = next((memory.why for memory in memories if memory and memory.why), "")
        if verdict != LOADS:
            why = reason(failing) if failing else str(report.crossings[0])
        return Layout(report.deployment, verdict, why, found, None, len(report.stages))

    def better(self, one: Layout) -> list[int] | None:
        """Layers per stage that cut nothing, or leave enough more tokens than vLLM's split by what each layer takes; None if
        none do."""
        if one.verdict == CROSSES:
            return balance(self.checkpoint, one.deployment.pp, starts=self.starts)
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
        layers = [weights[kind] for kind in self.kinds], [pages[kind] for kind in self.kinds]
        rooms = room, *(end - everywhere for end in ends)
        counts = balance_cache(*layers, one.deployment.pp, *rooms)
        if counts is None:
            return None
        cost = cache_cost(*layers, *rooms)
        even = [len(stage.layers) for stage in stages]
        return counts if largest(cost, even) > WORTH_IT * largest(cost, counts) else None

    def best(self, even: list[Layout], balanced: list[Layout]) -> list[tuple[Layout, int | None]]:
        """Of each layout the one with vLLM's split or the other, whichever is worth it, and the other's tokens."""
        others = {replace(one.deployment, layer_counts=None): one for one in balanced}
        found = []
        for one in even:
            other = others.get(one.deployment)
            worth = other is not None and other.verdict == LOADS and other.tokens > WORTH_IT * one.tokens
            if other is not None and other.verdict == LOADS and one.verdict == CROSSES:
                found.append((other, None))
            else:
                found.append((other, one.tokens) if worth else (one, None))
        return found


def of_layout(messages: list[Message], at: int) -> list[Message]:
    """Those of the layout with this number, and those of all."""
    return [one for one in messages if not isinstance(one, StageResult) or one.run.layout == at]


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
    types = text_config(checkpoint.config).get("layer_types")
    types = types if isinstance(types, list) else []
    return [(hash(tuple(sorted(found))), *map(str, types[at : at + 1])) for at, found in enumerate(tensors)]


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
    if failing.verdict == INCOMPLETE and failing.cuts:
        return f"{failing.label}: {len(failing.cuts)} tensors cut, {failing.cuts[0].tensor} first: {failing.cuts[0]}"
    if failing.verdict == INCOMPLETE:
        left = failing.unaccounted
        return f"{failing.label}: {len(left)} parameters at init or in part, {left[0]} first: {failing.left[left[0]]}"
    return f"{failing.label}: {' '.join(str(failing.message or '').split())[:200]}"
