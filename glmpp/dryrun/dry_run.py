"""Will every rank of a layout load this checkpoint, on the vLLM that is installed? No GPU, no weights.

The work is done in forks of a process that has imported vLLM (`glmpp.dryrun.child.main`), which `server` starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.report import DryRunReport, assemble
from glmpp.dryrun.workers import TIMEOUT, run_group, run_stages
from glmpp.errors import GlmppError, short, whole
from glmpp.partition import EXPERT
from glmpp.progress import progress_bar
from glmpp.records import digest, recording
from glmpp.serving import fixes

MAX_CONTEXT = 10**9  # tokens of a request


def dry_run(
    checkpoint: Checkpoint,
    deployment: Deployment | int,
    *,
    weights: str = "meta",
    ranks: str | list[int] | list[tuple[int, int, int]] | None = None,
    control: bool = True,
    real_group: bool = False,
    strict: bool = False,
    all_deaths: bool = False,
    context: int | None = None,
    cache: str = "auto",
    timeout: float = TIMEOUT,
    keep: str | Path | None = None,
    recorded: str | Path | None = None,
    progress: bool | None = None,
) -> DryRunReport:
    """Build and load every stage with the installed vLLM's own classes, in processes of its own, one for each core.

    Args:
        checkpoint: from a folder, from the Hub, or from a config alone.
        deployment: how it is to be served; a number of pipeline stages is short for `Deployment(pp=…)`.
        weights: "meta" feeds tensors without data; "real" reads the folder's bytes onto the CPU with vLLM's reader.
        ranks: "all"; a list of (stage, shard, replica), or of stages; default
            `Deployment.representative_ranks`: of each stage the first and the last shard, of the first and last replica.
        control: also run PP=1, with as many shards (a single stage is its own control).
        real_group: one process per rank in real gloo groups, all of them, instead of processes with rewritten ranks.
        strict: no stand-ins for parts of the model; a model that needs one cannot be built then.
        all_deaths: drop the tensor that a stage dies at, go on, and list every death.
        context: tokens of the longest request that the KV cache is counted for; default what vLLM takes for this model.
        cache: vLLM's name of the KV cache's dtype.
        timeout: seconds that each rank may take, and the import of vLLM before the first.
        keep: folder that each rank's parameters are saved to, by `torch.save`: "{stage}-{shard}-{replica}.pt", of a
            drafter with "drafter-" before; weights "real" only.
        recorded: a saved report to return, labelled as such, where vLLM is not installed; written when GLMPP_RECORD=1.
            It may hold more ranks than are asked for, which are left out; its times are those of all of them.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), bad arguments, or the child
            broke down.
    """
    deployment = Deployment.of(deployment)
    pp = deployment.pp
    context = None if context is None else whole("context", context, 1, MAX_CONTEXT)
    if weights not in ("meta", "real") or (weights == "real" and checkpoint.directory is None):
        raise GlmppError(f"weights={weights!r}: choose 'meta', or 'real' for a checkpoint with files")
    if keep is not None and weights != "real":
        raise GlmppError("keep: parameters without data are not saved; pass weights='real'")
    stages = deployment.stages(checkpoint.config)  # refuses what cannot be
    default, ranks = ranks is None, chosen_ranks(deployment, "all" if real_group else ranks)
    if real_group and deployment.dp > 1:
        raise GlmppError("real_group is for one replica: dp=1")
    runs = [run_of(deployment, *rank) for rank in ranks]
    if deployment.drafter:
        shards = sorted({0, deployment.tp - 1})
        runs += [run_of(deployment, pp - 1, shard, drafter=True) for shard in shards]
    if control and pp > 1 and not real_group:
        runs.append({**run_of(deployment, 0, control=True), "size": 1})
    asked = {"weights": weights, "strict": strict, "all_deaths": all_deaths, "context": context, "real_group": real_group}
    asked |= question(checkpoint, deployment)
    if vllm_version() is None:
        if recorded is None or keep is not None:
            raise GlmppError(NO_VLLM)
        return DryRunReport.load(recorded, checkpoint, asked, runs)
    request = stage_request(checkpoint, deployment, weights, strict, all_deaths, context)
    request["kv_cache_dtype"] = cache
    request["keep"] = None if keep is None else str(Path(keep).resolve())
    started = time.perf_counter()
    with progress_bar(what=f"vLLM dry run, {deployment.layout}, {deployment.guard}", total=len(runs), show=progress) as bar:
        if real_group:
            messages = run_group(checkpoint, request, runs, pp, deployment.tp, bar, timeout)
        else:
            messages = run_stages(checkpoint, request, runs, bar, timeout=timeout)
            if default and (others := other_ranks(messages, checkpoint, deployment)):
                more = [run_of(deployment, *rank) for rank in others]
                bar.total += len(more)
                messages = with_ranks(messages, run_stages(checkpoint, request, more, bar, timeout=timeout))

    evidence = {**asked, "seconds": time.perf_counter() - started, "messages": messages}
    report = assemble(evidence, checkpoint, deployment, stages)
    if recorded is not None and recording():
        report.save(recorded)
    return report


def other_ranks(messages: list[dict], checkpoint: Checkpoint, deployment: Deployment) -> list[tuple[int, int, int]]:
    """The ranks between the corners, of stages where it cannot be told from the corners what becomes of theirs.

    Those are stages of which it is not known what the ranks between read, and, where experts are spread, all that were run
    if the experts of a layer are not alike.
    """
    from glmpp.dryrun.cuts.readings import Readings

    if len(deployment.representative_ranks) == len(deployment.all_ranks):
        return []
    stages = [message for message in messages if message["kind"] == "stage"]
    asked = set(Readings(stages, checkpoint, (deployment.tp, deployment.dp)).stages_to_run())
    if deployment.ep and not has_like_experts(checkpoint):
        asked |= {message["rank"] for message in stages if not (message["control"] or message["drafter"])}
    return [rank for rank in deployment.all_ranks if rank[0] in asked and rank not in deployment.representative_ranks]


def has_like_experts(checkpoint: Checkpoint) -> bool:
    """Whether the experts of each layer have tensors of the same names, dtypes and shapes."""
    found: dict[str, dict[str, list]] = {}
    for spec in checkpoint.values():
        if expert := EXPERT.search(spec.name):
            layer, rest = spec.name[: expert.start()], spec.name[expert.end() :]
            found.setdefault(layer, {}).setdefault(expert[1], []).append((rest, spec.dtype, spec.shape))
    return all(len({tuple(sorted(one)) for one in experts.values()}) == 1 for experts in found.values())


def with_ranks(messages: list[dict], more: list[dict]) -> list[dict]:
    """The messages of two calls as one: ranks in their order, then drafters and the control."""
    stages = [message for message in [*messages, *more] if message["kind"] == "stage"]
    stages.sort(key=lambda m: (m["control"], m["drafter"], m["rank"], m["replica"], m["shard"]))
    rest = [message for message in [*messages, *more] if message["kind"] != "stage"]
    return [*rest[:1], *stages, *(message for message in rest[1:] if message["kind"] == "end")]


def question(checkpoint: Checkpoint, deployment: Deployment) -> dict:
    """What a report is about, as it is recorded: the checkpoint, and how it is to be served."""
    helper = deployment.guard if isinstance(deployment.guard, Helper) else None
    return {
        "checkpoint": digest(checkpoint),
        "pp_size": deployment.pp,
        "tp_size": deployment.tp,
        "dp_size": deployment.dp,
        "ep": deployment.ep,
        "drafter": deployment.drafter,
        "guard": str(deployment.guard),
        "helper": helper and helper.place.rpartition("/")[2],  # of a reader's own file not the folder
        "callers": helper and helper.callers,
        "fixes": list(deployment.fixes),
        "gpu": deployment.gpu,
        "layer_counts": deployment.partition,
    }


def chosen_ranks(deployment: Deployment, ranks: str | list[int] | list[tuple[int, int, int]] | None) -> list:
    """Ranks of a layout as (stage, shard, replica), from what `dry_run` was asked for. Raises GlmppError for a stray one."""
    if isinstance(ranks, str) and ranks == "all":
        return deployment.all_ranks
    if ranks is None:
        return deployment.representative_ranks
    if isinstance(ranks, str) or not isinstance(ranks, Iterable):
        raise GlmppError(f"ranks={short(ranks)}: expected 'all', or a list of stages or of (stage, shard, replica)")
    chosen = []
    for asked in ranks:
        if type(asked) is int:
            if not 0 <= asked < deployment.pp:
                raise GlmppError(f"there is no stage {asked} of {deployment.pp}")
            chosen += deployment.corners_of(asked)
        elif is_rank(asked, (deployment.pp, deployment.tp, deployment.dp)):
            chosen.append(tuple(asked))
        else:
            raise GlmppError(f"there is no rank {short(asked)}, (stage, shard, replica), of {deployment.layout}")
    return chosen


def is_rank(asked: object, sizes: tuple[int, int, int]) -> bool:
    """Whether something is a stage, a shard and a replica of so many."""
    if not isinstance(asked, tuple | list) or len(asked) != len(sizes):
        return False
    return all(type(at) is int and 0 <= at < size for at, size in zip(asked, sizes))


def run_of(
    deployment: Deployment, rank: int, shard: int = 0, replica: int = 0, drafter: bool = False, control: bool = False
) -> dict:
    """A run of one rank for the child: the attributes of its `Place`, and whether it is the control."""
    return {
        "rank": rank,
        "size": deployment.pp,
        "shard": shard,
        "shards": deployment.tp,
        "replica": replica,
        "replicas": deployment.dp,
        "ep": deployment.ep,
        "drafter": drafter,
        "control": control,
    }


def stage_request(
    checkpoint: Checkpoint,
    deployment: Deployment,
    weights: str = "meta",
    strict: bool = False,
    all_deaths: bool = False,
    context: int | None = None,
) -> dict:
    """What the child has to know to build and load stages of a checkpoint."""
    helper = deployment.guard if isinstance(deployment.guard, Helper) else Helper()
    return {
        "kind": "dry_run",
        "config": checkpoint.config,
        "tensors": [(spec.name, spec.dtype, spec.shape) for spec in (*checkpoint.twins, *checkpoint.values())],
        "files": None if checkpoint.directory is None else checkpoint.files,
        "guard": str(deployment.guard),
        "helper": helper.absolute,
        "callers": helper.callers,
        "fixes": fixes.chosen(deployment.fixes, vllm_version(), checkpoint.config.get("architectures") or []),
        "weights": weights,
        "gpu": deployment.gpu,
        "strict": strict,
        "all_deaths": all_deaths,
        "context": context,
        "layer_counts": deployment.partition,
    }
