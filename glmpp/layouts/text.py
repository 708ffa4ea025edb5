"""Layouts as a terminal shows them, as JSON, and as commands to paste."""

from __future__ import annotations

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.advice import serve_line
from glmpp.dryrun.fit import LEFT_OUT
from glmpp.layouts.layout import CRITERION, Layout, Layouts
from glmpp.partition import PARTITION_VARIABLE
from glmpp.words import MESSAGE, joined, shown


def layouts_text(model: str, checkpoint: Checkpoint, found: Layouts, plugins: str | None = None) -> str:
    """For a terminal: a line for each layout, best first, and the commands of those that serve."""
    gpus, context = found.asked
    share = next((one.fit.share for one in found.layouts if one.fit), found.utilization or 0)
    versions = shown(", ".join(f"{name} {version}" for name, version in found.versions.items()), MESSAGE)
    lines = [
        *checkpoint.headline,
        f"{gpus} x {found.gpu.name}, {share:.0%} of {found.gpu.memory / 1e9:.1f} GB each; requests of {context:,} tokens",
        versions,
        "",
        f"{'layout':<14} {'verdict':<18} {'GB on the fullest':>18} {'tokens':>12} {'requests':>9}",
    ]
    for one in found.layouts:
        sizes = f"{one.fit.fullest / 1e9:>18.1f} {one.tokens:>12,} {one.requests:>9.1f}" if one.fit else ""
        lines.append(f"{one.deployment.layout:<14} {one.answer:<18} {sizes}".rstrip())
        if one.even is not None:
            lines.append(
                f"{'':<15}with {PARTITION_VARIABLE}={one.deployment.partition}; {one.even:,} tokens with vLLM's split"
            )
        elif one.deployment.partition:
            lines.append(f"{'':<15}with {PARTITION_VARIABLE}={one.deployment.partition}; vLLM's split is read across")
        if one.why:
            lines.append(f"{'':<15}{shown(one.why, MESSAGE)}")
    lines += [f"{sizes:<14} not tried: {why}" for sizes, why in found.left.items()]
    lines += ["", f"best first: {CRITERION}", f"left out of the memory: {LEFT_OUT}", ""]
    serving = [one for one in found.layouts if one.serves]
    lines += [serve_line(model, one.deployment, context, found.utilization, plugins) for one in serving]
    if any(one.deployment.guard == "loader" for one in serving):
        lines.append("(--load-format glmpp where vLLM's own load dies; glmpp has to be installed where vLLM runs)")
    ran = sum(one.ran for one in found.layouts)
    lines += ["", f"run: {ran} ranks, of stages with the same kinds of layers one, its first and last shard"]
    return joined(lines)


def layouts_json(model: str, checkpoint: Checkpoint, found: Layouts, plugins: str | None = None) -> dict:
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
        "layouts": [_as_json(model, one, found, plugins) for one in found.layouts],
    }


def _as_json(model: str, one: Layout, found: Layouts, plugins: str | None) -> dict:
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
        "command": serve_line(model, one.deployment, found.asked[1], found.utilization, plugins) if one.serves else None,
    }
