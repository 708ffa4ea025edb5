"""What each stage of a plan holds, by the names and sizes in the checkpoint, and the balanced split."""

from __future__ import annotations

from dataclasses import replace

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import NO_FIT
from glmpp.formats.config import layer_count_said, text_config
from glmpp.layouts.layer_list import layer_list
from glmpp.layouts.split import balance
from glmpp.partition import (
    MAX_GPUS,
    PARTITION_VARIABLE,
    Stage,
    part_sizes,
    partition_layers,
    stage_bytes,
    stage_sizes,
)
from glmpp.words import joined, shown

LARGEST_TP = 8  # GPUs of a node: those that share a stage exchange data in every layer


def smallest_layouts(checkpoint: Checkpoint, like: Deployment, room: float, cache: float = 0) -> list[Deployment]:
    """Layouts with room on every rank by names and sizes, of each number of GPUs that with the smallest fullest rank.

    Args:
        like: what else is asked. Its layers are dealt out anew, and its replicas stay as many.
        room: bytes of a GPU.
        cache: bytes that a request takes in one layer.

    Returns:
        The fewest GPUs first; [] if the config does not say how many layers there are.
    """
    total = layer_count_said(checkpoint.config)
    if total is None:
        return []
    sizes = stage_bytes(
        checkpoint, replace(like, layer_counts=None, pp=total, tp=1, dp=1, ep=False).stages(checkpoint.config)
    )
    best: dict[int, tuple[float, Deployment]] = {}
    for tp in [tp for tp in range(1, LARGEST_TP + 1) if LARGEST_TP % tp == 0]:
        for pp in range(1, min(total, MAX_GPUS // (tp * like.dp)) + 1):
            layers = partition_layers(total, pp)
            shares = tp * (like.dp if like.ep else 1)
            fullest = max(sum(sizes[one.start : one.stop]) / shares + cache * len(one) for one in layers)
            one = replace(like, layer_counts=None, pp=pp, tp=tp, ep=like.ep and tp * like.dp > 1)
            if fullest <= room and fullest < best.get(one.gpus, (room + 1, None))[0]:
                best[one.gpus] = fullest, one
    return [best[gpus][1] for gpus in sorted(best)]


def plan_text(checkpoint: Checkpoint, deployment: Deployment, gpu_gb: float | None = None, tp_size: int = 1) -> str:
    """The text of `plan`."""
    return plan(checkpoint, deployment, gpu_gb, tp_size)[0]


def plan(checkpoint: Checkpoint, deployment: Deployment, gpu_gb: float | None = None, tp_size: int = 1) -> tuple[str, bool]:
    """What each stage holds, by the names and sizes in the checkpoint, and the balanced split.

    Args:
        gpu_gb: memory of one GPU, GB = 1e9 bytes. What is left is for activations, the KV cache and CUDA itself.
        tp_size: GPUs that share a stage evenly.

    Returns:
        The text, and whether no stage is larger than its GPUs.
    """
    layers = layer_list(checkpoint)
    stages = deployment.stages(checkpoint.config, layer_list=layers)
    held = stage_sizes(checkpoint, stages)
    sizes = [nbytes for _, nbytes in held]
    room = "left of a GPU" if tp_size == 1 else "left, at most"
    lines = [
        *checkpoint.headline,
        "",
        f"{'stage':<6} {'layers':<9} {'tensors':>9} {'GB':>9}" + (f"{room:>16}" if gpu_gb else ""),
    ]
    for stage, (tensors, size) in zip(stages, held):
        left = f"{gpu_gb - size / tp_size / 1e9:>13.1f} GB" if gpu_gb else ""
        lines.append(f"{stage.rank:<6} {stage.span:<9} {tensors:>9,} {size / 1e9:>9.3f}{left}")
    here = part_sizes(checkpoint, stages[0])
    rest = [size for part, size in here.items() if not any(stage.owns_part(part) for stage in stages)]
    if rest:
        tensors, size = map(sum, zip(*rest))
        lines.append(f"{'no stage':<16} {tensors:>9,} {size / 1e9:>9.3f}  MTP layers, and parts beside {shown(layers)}")
    starts = computing_layers(checkpoint)
    counts = balance(checkpoint, deployment.pp, deployment.drafter, starts)
    balanced = replace(deployment, layer_counts=counts or balance(checkpoint, deployment.pp, deployment.drafter))
    smallest = max(stage_bytes(checkpoint, balanced.stages(checkpoint.config, layer_list=layers)))
    lines += ["", f"balanced: {PARTITION_VARIABLE}={balanced.partition}"]
    change = 100 * (smallest / max(sizes) - 1)
    than = f"{abs(change):.1f} % {'more' if change > 0 else 'less'} than" if change else "as"
    lines.append(f"its largest stage has {smallest / 1e9:.3f} GB, {than} the {max(sizes) / 1e9:.3f} GB of this one")
    if starts is not None:
        lines += shared_indices_lines(stages, starts, counts is not None)
    if gpu_gb and tp_size > 1:
        lines.append(f"at most: as if TP={tp_size} shared every tensor; what each GPU holds whole `glmpp check` counts")
    fits = gpu_gb is None or max(sizes) <= gpu_gb * 1e9 * tp_size
    if not fits:
        lines += ["", f"{NO_FIT}: {max(sizes) / tp_size / 1e9:.3f} GB for a GPU of {gpu_gb:g} GB"]
        enough = smallest_layouts(checkpoint, deployment, gpu_gb * 1e9)[:1]
        lines += [f"{one.gpus} such GPUs hold the weights, and nothing else is counted: {one.layout}" for one in enough]
    return joined(lines), fits


def computing_layers(checkpoint: Checkpoint) -> list[int] | None:
    """Layers that compute their own top-k indices, by the config's `indexer_types`; None if it says nothing of that."""
    types = text_config(checkpoint.config).get("indexer_types")
    return [layer for layer, kind in enumerate(types) if kind != "shared"] if isinstance(types, list) else None


def shared_indices_lines(stages: list[Stage], starts: list[int], is_uncut: bool) -> list[str]:
    """Whether the stages of a split, and of the balanced one, begin with a layer that computes its own top-k indices."""
    cut = ", ".join(str(stage.rank) for stage in stages[1:] if stage.layers and stage.layers[0] not in starts)
    lines = [
        f"stages {cut} begin with a layer that reads the top-k indices of the stage before, which vLLM does not hand over:",
        "    it loads, and reads memory that nobody has written",
    ]
    balanced = "cuts nothing" if is_uncut else f"does so, too: at most {len(starts)} stages cut nothing"
    return [*(lines if cut else []), f"the balanced split {balanced}"]
