"""The figures of notebook 08, one function each. All return a matplotlib Figure on opaque white."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from glmpp.dryrun.stage_report import LOADS
from glmpp.lab.figures import BLUE, ORANGE, PALE, RED, STAGE_COLOURS, STYLE, ink
from glmpp.lab.layouts import HERE, NOWHERE
from glmpp.layouts.layout import Layout, Layouts


def said(one: Layout) -> tuple[str, str]:
    """The colour of a layout's cell, and what stands in it."""
    if one.verdict != LOADS:
        return RED, one.answer
    gigabytes = f"{one.fit.fullest / 1e9:.0f} GB"
    if not one.serves:
        return ORANGE, f"{one.answer}\n{gigabytes}"
    split = "\nown split" if one.deployment.layer_counts else ""
    return BLUE, f"loads\n{gigabytes}\n{one.tokens / 1e6:.2f} M tokens{split}"


def verdict_grid(several: Sequence[Layouts]) -> Figure:
    """TP (columns) x PP (rows) without EP: verdict, GB of weights on the fullest GPU, tokens of KV cache."""
    layouts = [one for found in several for one in found.layouts if not one.deployment.ep]
    tps = sorted({one.deployment.tp for one in layouts})
    pps = sorted({one.deployment.pp for one in layouts})
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(9, 0.95 * len(pps) + 0.8))
        for x, tp in enumerate(tps):
            for y, pp in enumerate(pps):
                one = next((one for one in layouts if (one.deployment.tp, one.deployment.pp) == (tp, pp)), None)
                colour, text = (PALE, f"{tp * pp} GPU{'s' * (tp * pp > 1)}") if one is None else said(one)
                ax.add_patch(plt.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour, lw=0))
                weight = {"weight": "normal" if one is None else "bold"}
                ax.text(x, y, text, ha="center", va="center", color=ink(colour), fontsize=8, **weight)
        ax.set_xticks(range(len(tps)), [f"TP={tp}" for tp in tps])
        ax.set_yticks(range(len(pps)), [f"PP={pp}" for pp in pps])
        ax.set(xlim=(-0.55, len(tps) - 0.45), ylim=(len(pps) - 0.5, -0.5))
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
    plt.close(fig)
    return fig


def parts_of_layer(tables: dict[str, pd.DataFrame]) -> Figure:
    """Which GPU holds which part of a layer (from `layouts.parts_of_layer`), one panel for each deployment."""
    with plt.style.context(STYLE):
        rows = len(next(iter(tables.values())))
        fig, axes = plt.subplots(len(tables), 1, figsize=(11, (0.36 * rows + 0.6) * len(tables)), squeeze=False)
        for ax, (title, table) in zip(axes[:, 0], tables.items()):
            for y, part in enumerate(table.index):
                for x, share in enumerate(table.loc[part]):
                    whole, nothing = share == HERE, share == NOWHERE
                    colour = PALE if nothing else STAGE_COLOURS[0] if whole else STAGE_COLOURS[1]
                    ax.add_patch(plt.Rectangle((x - 0.47, y - 0.42), 0.94, 0.84, color=colour, lw=0))
                    ax.text(x, y, share, ha="center", va="center", color=ink(colour), fontsize=7)
            ax.set_yticks(range(rows), table.index)
            ax.set_xticks(range(table.shape[1]), table.columns)
            ax.set(title=title, xlim=(-0.55, table.shape[1] - 0.45), ylim=(rows - 0.5, -0.5))
            ax.tick_params(length=0)
            ax.spines[["left", "bottom"]].set_visible(False)
        axes[-1, 0].set_xlabel("GPU")
    plt.close(fig)
    return fig
