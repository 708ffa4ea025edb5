"""Will every rank of a layout load this checkpoint, on the vLLM that is installed? No GPU, no weights.

The work is done in forks of a process that has imported vLLM (`glmpp.dryrun.child.main`), which `server` starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.messages import End, Message, StageRequest, StageResult
from glmpp.dryrun.report import DryRunReport, Question, assemble
from glmpp.dryrun.workers import TIMEOUT, run_group, run_stages
from glmpp.errors import GlmppError, short, whole
from glmpp.partition import EXPERT
from glmpp.progress import progress_bar
from glmpp.records import digest, recording
from glmpp.serving import fixes

MAX_CONTEXT = 10**9  # tokens of a request


@dataclass(frozen=True)
class Options:
    """How ranks are run.

    Attributes:
        weights: "meta" feeds tensors without data; "real" reads the folder's bytes onto the CPU with vLLM's reader.
        strict: no stand-ins for parts of the model; a model that needs one cannot be built then.
        all_failures: drop the tensor that a stage dies at, go on, and list every failure.
        context: tokens of the longest request that the KV cache is counted for; default what vLLM takes for this model.
        cache: vLLM's name of the KV cache's dtype.
        timeout: seconds that each rank may take, and the import of vLLM before the first.
        keep: folder that each rank's parameters are saved to, by `torch.save`: "{stage}-{rank}-{replica}.pt", of a drafter
            with "drafter-" before; weights "real" only.
        real_group: one process per rank in real gloo groups, all of them, instead of processes with rewritten ranks.
        progress: whether a bar is shown; None: if it would be seen.

    Raises:
        GlmppError: an option that cannot be, or two that exclude each other.
    """

    weights: str = "meta"
    strict: bool = False
    all_failures: bool = False
    context: int | None = None
    cache: str = "auto"
    timeout: float = TIMEOUT
    keep: str | Path | None = None
    real_group: bool = False
    progress: bool | None = None

    def __post_init__(self):
        if self.context is not None:
            object.__setattr__(self, "context", whole("context", self.context, 1, MAX_CONTEXT))
        if self.weights not in ("meta", "real"):
            raise GlmppError(f"weights={self.weights!r}: choose 'meta', or 'real' for a checkpoint with files")
        if self.keep is not None and self.weights != "real":
            raise GlmppError("keep: parameters without data are not saved; pass weights='real'")


DEFAULTS = Options()


def dry_run(
    checkpoint: Checkpoint,
    deployment: Deployment | int,
    *,
    ranks: str | list[int] | list[tuple[int, int, int]] | None = None,
    control: bool = True,
    recorded: str | Path | None = None,
    **options,
) -> DryRunReport:
    """Build and load every stage with the installed vLLM's own classes, in processes of its own, one for each core.

    Args:
        checkpoint: from a folder, from the Hub, or from a config alone.
        deployment: how it is to be served; a number of pipeline stages is short for `Deployment(pp=…)`.
        ranks: "all"; a list of (stage, tensor rank, data rank), or of stages; default `Deployment.representative_ranks`: of
            each stage the first and the last rank, of the first and last replica.
        control: also run PP=1, with as many ranks for a stage (a single stage is its own control).
        recorded: a saved report to return, labelled as such, where vLLM is not installed; written when GLMPP_RECORD=1.
            It may hold more ranks than are asked for, which are left out; its times are those of all of them.
        options: see `Options`.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), bad arguments, or the child
            broke down.
    """
    deployment, how = Deployment.of(deployment), Options(**options)
    if how.weights == "real" and checkpoint.directory is None:
        raise GlmppError("weights='real' needs a checkpoint with files")
    if how.real_group and deployment.dp > 1:
        raise GlmppError("real_group is for one replica: dp=1")
    deployment.stages(checkpoint.config)  # refuses what cannot be
    default = ranks is None and not how.real_group
    runs = [deployment.run(*rank) for rank in chosen_ranks(deployment, "all" if how.real_group else ranks)]
    if deployment.drafter:
        runs += [deployment.run(deployment.pp - 1, rank, drafter=True) for rank in sorted({0, deployment.tp - 1})]
    if control and deployment.pp > 1 and not how.real_group:
        runs.append(deployment.control)
    asked = question(checkpoint, deployment, how)
    if vllm_version() is None:
        if recorded is None or how.keep is not None:
            raise GlmppError(NO_VLLM)
        return DryRunReport.load(recorded, checkpoint, asked, runs)
    request, started = stage_request(checkpoint, deployment, how), time.perf_counter()
    what = f"vLLM dry run, {deployment.layout}, {deployment.guard}"
    with progress_bar(what=what, total=len(runs), show=how.progress) as bar:
        if how.real_group:
            messages = run_group(checkpoint, request, runs, bar, how.timeout)
        else:
            messages = run_stages(checkpoint, request, runs, bar, timeout=how.timeout)
            if default and (others := other_ranks(messages, checkpoint, deployment)):
                more = [deployment.run(*rank) for rank in others]
                bar.total += len(more)
                messages = with_ranks(messages, run_stages(checkpoint, request, more, bar, timeout=how.timeout))

    report = assemble(messages, checkpoint, deployment, asked, time.perf_counter() - started)
    if recorded is not None and recording():
        report.save(recorded)
    return report


def other_ranks(messages: list[Message], checkpoint: Checkpoint, deployment: Deployment) -> list[tuple[int, int, int]]:
    """The ranks between the corners, of stages where it cannot be told from the corners what becomes of theirs.

    Those are stages of which it is not known what the ranks between read, and, where experts are spread, all that were run
    if the experts of a layer are not alike.
    """
    from glmpp.dryrun.cuts.readings import Readings  # and numpy, which a plan can do without

    if len(deployment.representative_ranks) == len(deployment.all_ranks):
        return []
    results = [one for one in messages if isinstance(one, StageResult)]
    asked = set(Readings(results, checkpoint, (deployment.tp, deployment.dp)).stages_to_run())
    if deployment.ep and not has_like_experts(checkpoint):
        asked |= {one.run.stage for one in results if not (one.run.control or one.run.drafter)}
    return [rank for rank in deployment.all_ranks if rank[0] in asked and rank not in deployment.representative_ranks]


def has_like_experts(checkpoint: Checkpoint) -> bool:
    """Whether the experts of each layer have tensors of the same names, dtypes and shapes."""
    found: dict[str, dict[str, list]] = {}
    for spec in checkpoint.values():
        if expert := EXPERT.search(spec.name):
            layer, rest = spec.name[: expert.start()], spec.name[expert.end() :]
            found.setdefault(layer, {}).setdefault(expert[1], []).append((rest, spec.dtype, spec.shape))
    return all(len({tuple(sorted(one)) for one in experts.values()}) == 1 for experts in found.values())


def with_ranks(messages: list[Message], more: list[Message]) -> list[Message]:
    """The messages of two calls as one: ranks in their order, then drafters and the control."""
    results = [one for one in [*messages, *more] if isinstance(one, StageResult)]
    results.sort(key=lambda one: (one.run.control, one.run.drafter, one.run.stage, one.run.dp_rank, one.run.tp_rank))
    ready, *others = (one for one in [*messages, *more] if not isinstance(one, StageResult))
    return [ready, *results, *(one for one in others if isinstance(one, End))]


def question(checkpoint: Checkpoint, deployment: Deployment, options: Options = DEFAULTS) -> Question:
    """What a report is about, as it is recorded."""
    helper = deployment.guard if isinstance(deployment.guard, Helper) else None
    return Question(
        checkpoint=digest(checkpoint),
        pp_size=deployment.pp,
        tp_size=deployment.tp,
        dp_size=deployment.dp,
        ep=deployment.ep,
        layer_counts=deployment.partition,
        drafter=deployment.drafter,
        guard=str(deployment.guard),
        helper=helper and helper.place.rpartition("/")[2],  # of a reader's own file not the folder
        callers=helper and helper.callers,
        fixes=deployment.fixes,
        gpu=deployment.gpu,
        weights=options.weights,
        strict=options.strict,
        all_failures=options.all_failures,
        context=options.context,
        real_group=options.real_group,
    )


def chosen_ranks(deployment: Deployment, ranks: str | list[int] | list[tuple[int, int, int]] | None) -> list:
    """Ranks of a layout, from what `dry_run` was asked for. Raises GlmppError for a stray one."""
    if isinstance(ranks, str) and ranks == "all":
        return deployment.all_ranks
    if ranks is None:
        return deployment.representative_ranks
    if isinstance(ranks, str) or not isinstance(ranks, Iterable):
        raise GlmppError(f"ranks={short(ranks)}: expected 'all', or a list of stages or of (stage, tensor rank, data rank)")
    chosen = []
    for asked in ranks:
        if type(asked) is int:
            if not 0 <= asked < deployment.pp:
                raise GlmppError(f"there is no stage {asked} of {deployment.pp}")
            chosen += deployment.corners_of(asked)
        elif is_rank(asked, (deployment.pp, deployment.tp, deployment.dp)):
            chosen.append(tuple(asked))
        else:
            raise GlmppError(f"there is no rank {short(asked)}, (stage, tensor rank, data rank), of {deployment.layout}")
    return chosen


def is_rank(asked: object, sizes: tuple[int, int, int]) -> bool:
    """Whether something is the ranks of a layout of such sizes."""
    if not isinstance(asked, tuple | list) or len(asked) != len(sizes):
        return False
    return all(type(at) is int and 0 <= at < size for at, size in zip(asked, sizes))


def stage_request(checkpoint: Checkpoint, deployment: Deployment, options: Options) -> StageRequest:
    """What the child has to know to build and load stages of a checkpoint."""
    helper = deployment.guard if isinstance(deployment.guard, Helper) else Helper()
    return StageRequest(
        config=checkpoint.config,
        tensors=[(spec.name, spec.dtype, spec.shape) for spec in (*checkpoint.twins, *checkpoint.values())],
        files=None if checkpoint.directory is None else checkpoint.files,
        guard=str(deployment.guard),
        helper=helper.absolute,
        callers=helper.callers,
        fixes=fixes.chosen(deployment.fixes, vllm_version(), checkpoint.config.get("architectures") or []),
        gpu=deployment.gpu,
        weights=options.weights,
        strict=options.strict,
        all_failures=options.all_failures,
        context=options.context,
        cache=options.cache,
        keep=None if options.keep is None else str(Path(options.keep).resolve()),
    )
