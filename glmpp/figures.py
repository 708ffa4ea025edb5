"""Every figure of the notebooks, one function each. All return a matplotlib Figure on opaque white."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from glmpp.checkpoint import Checkpoint
from glmpp.dry_run import DIES, DryRunReport
from glmpp.loader import LOADED, NOT_REACHED, UNEXPECTED
from glmpp.partition import OTHER_STAGE, SPECULATIVE, Stage, partition_layers, stage_bytes

STYLE = Path(__file__).with_name("glmpp.mplstyle")
BLUE, ORANGE, RED, PURPLE, GREY, VIOLET = "#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd"
PALE = "#e8e8ea"


def layers_and_stages(stages: list[Stage], report: DryRunReport | None = None) -> Figure:
    """Which layer lives on which stage, and, from a dry run, the layer at which each stage dies.

    One row per stage, one cell per layer; embedding, final norm, lm_head and the MTP layer at the ends.
    """
    deaths = {}
    for one in report.stages if report else ():
        if one.verdict == DIES and (match := re.search(r"layers\.(\d+)\.", one.key or "")):
            deaths[one.stage.rank] = int(match[1])
    num_layers = stages[0].num_layers
    ends = {"embed": -3, "MTP": num_layers + 1.3, "norm": num_layers + 3.8, "lm_head": num_layers + 6.3}
    names = {
        "embed": "model.embed_tokens.",
        "MTP": f"model.layers.{num_layers}.",
        "norm": "model.norm.",
        "lm_head": "lm_head.",
    }
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(11, 0.42 * len(stages) + 1.5))
        for stage in stages:
            y = stage.rank
            for layer in range(num_layers):
                colour = BLUE if layer in stage.layers else PALE
                ax.add_patch(plt.Rectangle((layer + 0.06, y - 0.38), 0.88, 0.76, color=colour, lw=0))
            for part, x in ends.items():
                ax.add_patch(
                    plt.Rectangle((x, y - 0.38), 1.7, 0.76, color=PURPLE if stage.owns(names[part]) else PALE, lw=0)
                )
            if stage.layers:
                middle = (stage.layers[0] + stage.layers[-1] + 1) / 2
                span = f"{stage.layers[0]}-{stage.layers[-1]}" if len(stage.layers) > 1 else f"{stage.layers[0]}"
                box = {"fc": BLUE, "ec": "none", "pad": 1}
                ax.text(middle, y, span, ha="center", va="center", color="white", weight="bold", fontsize=8, bbox=box)
            if stage.rank in deaths:
                ax.plot(deaths[stage.rank] + 0.5, y, "X", color=RED, ms=9, mec="white", mew=0.8)
        if deaths:
            ax.text(
                num_layers + 8, -0.9, "X: the layer whose wk it looks up when it dies", color=RED, ha="right", fontsize=9
            )
        for part, x in ends.items():
            ax.text(x + 0.85, len(stages) - 0.35, part, rotation=40, ha="right", va="top", fontsize=8)
        ax.set_yticks(range(len(stages)), [f"stage {stage.rank}" for stage in stages])
        step = 10 if num_layers > 20 else 1
        ax.set_xticks([x + 0.5 for x in range(0, num_layers, step)], range(0, num_layers, step))
        ax.set(xlim=(-4, num_layers + 9), ylim=(len(stages) - 0.4, -0.7 if not deaths else -1.3))
        ax.set_xlabel("layer (blue: held by the stage; grey: a PPMissingLayer placeholder without parameters)")
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


def remainder(num_layers: range, pp_size: int) -> Figure:
    """Layers per stage, for several layer counts: which stages get the remainder."""
    counts = [[len(layers) for layers in partition_layers(n, pp_size, None)] for n in num_layers]
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 0.3 * len(counts) + 1.1))
        for y, row in enumerate(counts):
            base = num_layers[y] // pp_size
            for x, count in enumerate(row):
                more = count > base
                ax.add_patch(plt.Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, color=ORANGE if more else PALE, lw=0))
                ax.text(x, y, f"{count}{' +' if more else ''}", ha="center", va="center", color="black")
        ax.set_yticks(range(len(counts)), [f"{n} = {pp_size} x {n // pp_size} + {n % pp_size}" for n in num_layers])
        ax.set_xticks(range(pp_size), [f"stage {k}" for k in range(pp_size)])
        ax.set(xlim=(-0.6, pp_size - 0.4), ylim=(len(counts) - 0.4, -0.6))
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


def bytes_per_stage(checkpoint: Checkpoint, splits: dict[str, list[Stage]]) -> Figure:
    """Checkpoint GB per stage for several splits; the largest stage of each is marked and labelled."""
    with plt.style.context(STYLE):
        size = len(next(iter(splits.values())))
        fig, ax = plt.subplots(figsize=(9, 3.4))
        width = 0.8 / len(splits)
        hatches = ["", "//", ".."]
        for n, (label, stages) in enumerate(splits.items()):
            gb = [b / 1e9 for b in stage_bytes(checkpoint, stages)]
            x = [k - 0.4 + width * (n + 0.5) for k in range(size)]
            layers = ",".join(str(len(stage.layers)) for stage in stages)
            ax.bar(
                x,
                gb,
                width * 0.94,
                color=[BLUE, ORANGE, PURPLE][n],
                hatch=hatches[n],
                ec="white",
                label=f"{label}: {layers}",
            )
            top = max(gb)
            at = gb.index(top)
            ax.plot(x[at], top + 1.2, "v", color="black", ms=5)
            ax.text(x[at], top + 2.2, f"{top:.1f}", ha="center", va="bottom", weight="bold")
        ax.set_xticks(range(size), [f"stage {k}" for k in range(size)])
        ax.set_ylabel("checkpoint GB (1e9 bytes)")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.24), ncols=1)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


LEDGER_COLOURS = {LOADED: BLUE, OTHER_STAGE: PALE, SPECULATIVE: PURPLE, UNEXPECTED: RED, NOT_REACHED: ORANGE}


def ledger_bars(report: DryRunReport) -> Figure:
    """What became of every tensor of the checkpoint on every stage: stacked bars, labelled with counts."""
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(9, 0.4 * len(report.stages) + 1.2))
        for y, one in enumerate(report.stages):
            left = 0
            for column, count in one.ledger.counts().items():
                if not count:
                    continue
                ax.barh(y, count, left=left, color=LEDGER_COLOURS[column], height=0.72, ec="white")
                if count > 0.06 * len(one.ledger.tensors):
                    ax.text(left + count / 2, y, f"{count:,}", ha="center", va="center", fontsize=8)
                left += count
            ax.text(left * 1.005, y, f"{left:,}", va="center", fontsize=8, color="black")
        used = {c for one in report.stages for c, n in one.ledger.counts().items() if n}
        handles = [plt.Rectangle((0, 0), 1, 1, color=LEDGER_COLOURS[c], label=c) for c in LEDGER_COLOURS if c in used]
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles))
        ax.set_yticks(range(len(report.stages)), [f"stage {one.stage.rank}" for one in report.stages])
        ax.set(xlabel="tensors of the checkpoint", ylim=(len(report.stages) - 0.5, -0.5))
        ax.set_xlim(0, ax.get_xlim()[1] * 1.06)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig
