"""The figures of a pipeline and its loads, one function each, and what all figures of the kit share.

All return a matplotlib Figure on opaque white.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.ledger import IGNORED, LOADED, NOT_REACHED, OTHER_RANK, UNEXPECTED
from glmpp.partition import OTHER_STAGE, SPECULATIVE, Stage, partition_layers, stage_bytes

STYLE = Path(__file__).with_name("glmpp.mplstyle")
BLUE, ORANGE, RED, PURPLE, GREY, VIOLET = "#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd"
PALE = "#e8e8ea"
# One colour for each stage in every figure: Paul Tol's "muted" set without its rose, which is near the RED of what dies.
# https://sronpersonalpages.nl/~pault
STAGE_COLOURS = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#aa4499", "#882255"]
LEDGER_COLOURS = {
    LOADED: BLUE,
    OTHER_STAGE: PALE,
    OTHER_RANK: VIOLET,
    SPECULATIVE: PURPLE,
    IGNORED: GREY,
    UNEXPECTED: RED,
    NOT_REACHED: ORANGE,
}
VERDICT_COLOURS = {LOADS: BLUE, DIES: RED, CANNOT_BUILD: PURPLE, INCOMPLETE: ORANGE, CANNOT_TELL: PALE}
LOAD_PARTS = {
    "choosing": ("choosing tensors", VIOLET),
    "reading": ("opening shards, making tensors", BLUE),
    "dequantising": ("dequantising wk", RED),
    "vllm": ("vLLM's loop and copies", ORANGE),
}


def in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the kit's style; the figure is returned, and not left for pyplot to show a second time."""

    @wraps(draw)
    def drawn(*arguments, **keywords) -> Figure:
        with plt.style.context(STYLE):
            figure = draw(*arguments, **keywords)
        plt.close(figure)
        return figure

    return drawn


def stage_colour(rank: int) -> str:
    """The colour of a stage; from the ninth on they repeat."""
    return STAGE_COLOURS[rank % len(STAGE_COLOURS)]


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return "black" if np.dot(to_rgb(colour), [0.299, 0.587, 0.114]) > 0.6 else "white"


def cell(
    ax: Axes, at: tuple[float, float], colour: str, text: str = "", size=(0.94, 0.84), edge: str = "none", **font
) -> None:
    """A filled rectangle around a point, with a text that reads on its colour."""
    (x, y), (width, height) = at, size
    ax.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, fc=colour, ec=edge))
    ax.text(x, y, text, **{"ha": "center", "va": "center", "color": ink(colour), "fontsize": 8} | font)


def as_grid(ax: Axes, columns: Sequence | None, rows: Sequence | None, shape: tuple[int, int] | None = None) -> None:
    """Axes of cells: a column and a row for each label, the first row on top, no lines; None: labelled by the caller."""
    width, height = shape or (len(columns), len(rows))
    if columns is not None:
        ax.set_xticks(range(width), columns)
    if rows is not None:
        ax.set_yticks(range(height), rows)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def stage_ticks(ax: Axes, ranks: list[int], axis: str = "y", positions: list[int] | None = None) -> None:
    """Label an axis "stage 0", "stage 1", … (at their ranks, or at other positions), with a bar in the stage's colour."""
    positions = ranks if positions is None else positions
    labels = [f"stage {rank}" if axis == "y" or len(ranks) <= 8 else str(rank) for rank in ranks]
    (ax.set_yticks if axis == "y" else ax.set_xticks)(positions, labels)
    for rank, place in zip(ranks, positions):
        ends = (place - 0.4, place + 0.4)
        at = ([-0.006, -0.006], ends) if axis == "y" else (ends, [-0.02, -0.02])
        across = ax.get_yaxis_transform() if axis == "y" else ax.get_xaxis_transform()
        ax.plot(*at, color=stage_colour(rank), lw=4, solid_capstyle="butt", transform=across, clip_on=False)
    ax.tick_params(axis=axis, length=0, pad=8)


@in_style
def layers_and_stages(stages: list[Stage], report: DryRunReport | None = None) -> Figure:
    """What each stage keeps and, from a dry run, what it is handed and the layer at which it dies.

    One row per stage, one cell per layer; embedding, final norm, lm_head and the MTP layer at the ends. A line under a cell:
    tensors of that layer were handed to the stage.
    """
    deaths, handed = {}, {}
    for one in report.stages if report else ():
        if one.verdict == DIES and (match := re.search(r"layers\.(\d{1,6})\.", one.key or "")):
            deaths[one.stage.rank] = int(match[1])
        if one.ledger:
            unseen = {NOT_REACHED, OTHER_STAGE} if report.guard == "loader" else {NOT_REACHED}
            seen = (name for name, column in one.ledger.tensors.items() if column not in unseen)
            handed[one.stage.rank] = {one.stage.layer_of(name) for name in seen}
    num_layers = stages[0].num_layers
    ends = {
        "embed": (-2.15, "model.embed_tokens."),
        "MTP": (num_layers + 2.15, f"model.layers.{num_layers}."),
        "norm": (num_layers + 4.65, "model.norm."),
        "lm_head": (num_layers + 7.15, "lm_head."),
    }
    fig, ax = plt.subplots(figsize=(11, 0.42 * len(stages) + 1.5))
    for stage in stages:
        y, colour = stage.rank, stage_colour(stage.rank)
        for layer in range(num_layers):
            cell(ax, (layer + 0.5, y - 0.03), colour if layer in stage.layers else PALE, size=(0.88, 0.7))
            if layer in handed.get(stage.rank, ()):
                ax.plot([layer + 0.06, layer + 0.94], [y + 0.42] * 2, color="black", lw=1.5, solid_capstyle="butt")
        for x, name in ends.values():
            cell(ax, (x, y - 0.03), colour if stage.owns(name) else PALE, size=(1.7, 0.7))
        if stage.layers:
            middle, box = (stage.layers[0] + stage.layers[-1] + 1) / 2, {"fc": colour, "ec": "none", "pad": 1}
            span = "-".join(str(layer) for layer in dict.fromkeys((stage.layers[0], stage.layers[-1])))
            ax.text(middle, y, span, ha="center", va="center", color=ink(colour), weight="bold", fontsize=8, bbox=box)
        if stage.rank in deaths:
            ax.plot(deaths[stage.rank] + 0.5, y, "X", color=RED, ms=9, mec="white", mew=0.8)
    if deaths:
        ax.text(num_layers + 8, -0.9, "X: the layer whose wk it looks up when it dies", color=RED, ha="right")
    if handed:
        ax.text(-3, -0.9, "line below a cell: handed to the stage")
    for part, (x, _) in ends.items():
        ax.text(x, len(stages) - 0.35, part, rotation=40, ha="right", va="top", fontsize=8)
    as_grid(ax, None, None, (num_layers, len(stages)))
    stage_ticks(ax, [stage.rank for stage in stages])
    shown = range(0, num_layers, 10 if num_layers > 20 else 1)
    ax.set_xticks([x + 0.5 for x in shown], shown)
    ax.set(xlim=(-4, num_layers + 9), ylim=(len(stages) - 0.4, -1.3 if report else -0.7))
    ax.set_xlabel("layer (coloured: held by the stage; grey: a PPMissingLayer placeholder without parameters)")
    return fig


@in_style
def remainder(num_layers: range, pp_size: int) -> Figure:
    """Layers per stage, for several layer counts: which stages get the remainder."""
    fig, ax = plt.subplots(figsize=(7, 0.3 * len(num_layers) + 1.1))
    for y, layers in enumerate(num_layers):
        for x, count in enumerate(map(len, partition_layers(layers, pp_size, None))):
            colour, mark = (ORANGE, " +") if count > layers // pp_size else (PALE, "")
            cell(ax, (x, y), colour, f"{count}{mark}", (0.94, 0.88), fontsize=9)
    as_grid(ax, range(pp_size), [f"{n} = {pp_size} x {n // pp_size} + {n % pp_size}" for n in num_layers])
    stage_ticks(ax, list(range(pp_size)), "x")
    return fig


@in_style
def bytes_per_stage(checkpoint: Checkpoint, splits: dict[str, list[Stage]]) -> Figure:
    """Checkpoint GB per stage for several splits; the largest stage of each is marked and labelled."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    width, size = 0.8 / len(splits), len(next(iter(splits.values())))
    for n, (label, stages) in enumerate(splits.items()):
        gb = np.array(stage_bytes(checkpoint, stages)) / 1e9
        x = np.arange(size) - 0.4 + width * (n + 0.5)
        look = {"alpha": 1 if n else 0.55, "hatch": ("////", "", "..")[n], "ec": "white"}
        ax.bar(x, gb, width * 0.94, color=[stage_colour(k) for k in range(size)], **look)
        ax.bar(0, 0, color=GREY, label=f"{label}: {','.join(str(len(stage.layers)) for stage in stages)}", **look)
        at = gb.argmax()
        ax.plot(x[at], gb[at] + 1.2, "v", color="black", ms=5)
        ax.text(x[at], gb[at] + 2.2, f"{gb[at]:.1f}", ha="center", va="bottom", weight="bold")
    stage_ticks(ax, list(range(size)), "x")
    ax.set(ylabel="checkpoint GB (1e9 bytes)", ylim=(0, ax.get_ylim()[1] * 1.08))
    ax.legend(loc="upper left", bbox_to_anchor=(0, 1.24), ncols=1)
    return fig


@in_style
def ledger_bars(report: DryRunReport) -> Figure:
    """What became of every tensor of the checkpoint on every stage: stacked bars, labelled with counts."""
    counts = pd.DataFrame([one.ledger.counts() for one in report.stages])
    fig, ax = plt.subplots(figsize=(9, 0.4 * len(counts) + 1.2))
    left, total = 0, counts.sum(axis=1)
    for column in counts.columns[counts.any()]:
        bars = ax.barh(counts.index, counts[column], left=left, color=LEDGER_COLOURS[column], height=0.72, ec="white")
        bars.set_label(column)
        labels = [f"{n:,}" if n > 0.06 * whole else "" for n, whole in zip(counts[column], total)]
        ax.bar_label(bars, labels, label_type="center", fontsize=8)
        left = left + counts[column]
    for y, count in total.items():
        ax.text(count * 1.005, y, f"{count:,}", va="center", fontsize=8)
    handles = dict(sorted(zip(*ax.get_legend_handles_labels()[::-1]), key=lambda one: [*LEDGER_COLOURS].index(one[0])))
    ax.legend(handles.values(), handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles))
    ax.set(xlabel="tensors of the checkpoint", ylim=(len(counts) - 0.5, -0.5), xlim=(0, ax.get_xlim()[1] * 1.06))
    stage_ticks(ax, [one.stage.rank for one in report.stages], "y", list(counts.index))
    return fig


@in_style
def verdict_matrix(panels: dict[str, list[DryRunReport]]) -> Figure:
    """Verdict of every stage (columns) at several pipeline sizes (rows), one panel for each guard."""
    sizes = [report.pp_size for report in next(iter(panels.values()))]
    figsize = (0.62 * max(sizes) * len(panels) + 1.2, 0.42 * len(sizes) + 1.3)
    fig, axes = plt.subplots(1, len(panels), figsize=figsize, squeeze=False)
    for ax, (title, reports) in zip(axes[0], panels.items()):
        for y, report in enumerate(reports):
            for one in report.stages:
                word = one.verdict.split(",")[0]
                cell(ax, (one.stage.rank, y), VERDICT_COLOURS[one.verdict], word, (0.92, 0.84), weight="bold")
        as_grid(ax, range(max(sizes)), [f"PP={size}" for size in sizes])
        ax.set_title(title)
        stage_ticks(ax, list(range(max(sizes))), "x")
        ax.label_outer()
    return fig


@in_style
def load_time_bars(table: pd.DataFrame, note: str = "") -> Figure:
    """Load time of every stage, stacked by part, one panel for each format; the floor as a line where it was measured.

    Args:
        table: `LoadTimes.median()`, or a projection of the same form: indexed by (rank, format), seconds by part.
        note: goes above the panels.
    """
    by_format = {name: rows.droplevel("format") for name, rows in table.groupby("format")}
    shown = [name for name in ("stock", "glmpp") if name in by_format]
    fig, axes = plt.subplots(1, len(shown), figsize=(10, 3.2), squeeze=False)
    for ax, name in zip(axes[0], shown):
        rows, bottom = by_format[name], 0
        for part, (label, colour) in LOAD_PARTS.items():
            bars = ax.bar(rows.index, rows[part], bottom=bottom, color=colour, label=label, width=0.75)
            bottom = bottom + rows[part]
        ax.bar_label(bars, [f"{total:.2f}" if total < 10 else f"{total:,.0f}" for total in bottom], fontsize=8)
        if name == "glmpp" and (floor := by_format.get("in-memory list")) is not None:
            ax.plot(floor.index, floor.total, "_", color="black", markersize=22, label="floor: from a list in memory")
        ax.set(title=name, ylim=(0, bottom.max() * 1.15))
        stage_ticks(ax, list(rows.index), "x")
    axes[0][0].set_ylabel("seconds")
    fig.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    if note:
        fig.suptitle(note, fontsize=9)
    return fig


@in_style
def bytes_read_and_kept(table: pd.DataFrame, kept: list[int]) -> Figure:
    """Cold: bytes that each stage's load brought into the page cache, beside those it keeps."""
    fig, ax = plt.subplots(figsize=(9, 2.8))
    mb = table.bytes_read.unstack()[["stock", "glmpp"]].add_prefix("read, ") / 1e6
    mb["kept"] = [kept[rank] / 1e6 for rank in mb.index]
    for n, (label, colour) in enumerate(zip(mb, (ORANGE, BLUE, GREY))):
        bars = ax.bar(mb.index + (n - 1) * 0.27, mb[label], width=0.25, color=colour, label=label)
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    stage_ticks(ax, list(mb.index), "x")
    ax.set(ylabel="MB", ylim=(0, mb.max(axis=None) * 1.2))
    ax.legend(loc="upper right", ncols=3, fontsize=8)
    return fig
