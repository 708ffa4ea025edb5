"""What each stage of a plan holds, by the names and sizes in the checkpoint, and the balanced split."""

from __future__ import annotations

from dataclasses import replace

from glmpp.checkpoint import Checkpoint
from glmpp.partition import PARTITION_VARIABLE, balance, dealt, layer_list, stage_bytes
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.text import headline
from glmpp.words import joined, shown


def plan_text(checkpoint: Checkpoint, deployment: Deployment, gpu_gb: float | None = None, tp_size: int = 1) -> str:
    """What each stage holds, by the names and sizes in the checkpoint, and the balanced split.

    Args:
        gpu_gb: memory of one GPU, GB = 1e9 bytes. What is left is for activations, the KV cache and CUDA itself.
        tp_size: GPUs that share a stage evenly.
    """
    layers = layer_list(checkpoint)
    stages = deployment.stages(checkpoint.config, layer_list=layers)
    held = dealt(checkpoint, stages)
    sizes = [sum(spec.nbytes for spec in specs) for specs in held]
    lines = [
        *headline(checkpoint),
        "",
        f"{'stage':<6} {'layers':<9} {'tensors':>9} {'GB':>9}" + (f"{'left of a GPU':>16}" if gpu_gb else ""),
    ]
    for stage, specs, size in zip(stages, held, sizes):
        left = f"{gpu_gb - size / tp_size / 1e9:>13.1f} GB" if gpu_gb else ""
        lines.append(f"{stage.rank:<6} {stage.span:<9} {len(specs):>9,} {size / 1e9:>9.3f}{left}")
    placed = {spec.name for specs in held for spec in specs}
    if rest := [spec for spec in checkpoint.values() if spec.name not in placed]:
        size = sum(spec.nbytes for spec in rest)
        lines.append(f"{'no stage':<16} {len(rest):>9,} {size / 1e9:>9.3f}  MTP layers, and parts beside {shown(layers)}")
    balanced = replace(deployment, layer_counts=balance(checkpoint, deployment.pp, deployment.drafter))
    smallest = max(stage_bytes(checkpoint, balanced.stages(checkpoint.config, layer_list=layers)))
    lines += ["", f"balanced: {PARTITION_VARIABLE}={balanced.partition}"]
    saved = f"{100 * (1 - smallest / max(sizes)):.1f} % less" if smallest < max(sizes) else "no less"
    lines.append(f"its largest stage has {smallest / 1e9:.3f} GB, {saved} than {max(sizes) / 1e9:.3f} GB")
    return joined(lines)
