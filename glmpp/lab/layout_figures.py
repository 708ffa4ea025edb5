"""The figures of notebook 08, one function each. All return a matplotlib Figure on opaque white."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from glmpp.dryrun.stage_report import LOADS
from glmpp.lab.figures import BLUE, ORANGE, PALE, RED, STAGE_COLOURS, as_grid, cell, in_style
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


@in_style
def verdict_grid(several: Sequence[Layouts]) -> Figure:
    """TP (columns) x PP (rows) without EP: verdict, GB of weights on the fullest GPU, tokens of KV cache."""
    layouts = [one for found in several for one in found.layouts if not one.deployment.ep]
    found = {(one.deployment.tp, one.deployment.pp): one for one in layouts}
    tps, pps = (sorted(set(sizes)) for sizes in zip(*found))
    fig, ax = plt.subplots(figsize=(9, 0.95 * len(pps) + 0.8))
    for x, tp in enumerate(tps):
        for y, pp in enumerate(pps):
            if one := found.get((tp, pp)):
                cell(ax, (x, y), *said(one), size=(0.94, 0.9), weight="bold")
            else:
                cell(ax, (x, y), PALE, f"{tp * pp} GPU{'s' * (tp * pp > 1)}", (0.94, 0.9))
    as_grid(ax, [f"TP={tp}" for tp in tps], [f"PP={pp}" for pp in pps])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    return fig


@in_style
def parts_of_layer(tables: dict[str, pd.DataFrame]) -> Figure:
    """Which GPU holds which part of a layer (from `layouts.parts_of_layer`), one panel for each deployment."""
    rows = len(next(iter(tables.values())))
    fig, axes = plt.subplots(len(tables), 1, figsize=(11, (0.36 * rows + 0.6) * len(tables)), squeeze=False)
    for ax, (title, table) in zip(axes[:, 0], tables.items()):
        for y, shares in enumerate(table.to_numpy()):
            for x, share in enumerate(shares):
                cell(ax, (x, y), {HERE: STAGE_COLOURS[0], NOWHERE: PALE}.get(share, STAGE_COLOURS[1]), share, fontsize=7)
        as_grid(ax, table.columns, table.index)
        ax.set_title(title)
    axes[-1, 0].set_xlabel("GPU")
    return fig
