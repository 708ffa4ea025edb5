"""Every figure of the notebooks, one function each. All return a matplotlib Figure on opaque white."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.figure import Figure

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.lab.error import ErrorStats
from glmpp.ledger import IGNORED, LOADED, NOT_REACHED, OTHER_RANK, UNEXPECTED
from glmpp.partition import OTHER_STAGE, SPECULATIVE, Stage, partition_layers, stage_bytes

STYLE = Path(__file__).with_name("glmpp.mplstyle")
BLUE, ORANGE, RED, PURPLE, GREY, VIOLET = "#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd"
PALE = "#e8e8ea"


# One colour for each stage in every figure: Paul Tol's "muted" set without its rose, which is near the RED of what dies.
# https://sronpersonalpages.nl/~pault
STAGE_COLOURS = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#aa4499", "#882255"]


def stage_colour(rank: int) -> str:
    """The colour of a stage; from the ninth on they repeat."""
    return STAGE_COLOURS[rank % len(STAGE_COLOURS)]


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return "black" if np.dot(to_rgb(colour), [0.299, 0.587, 0.114]) > 0.6 else "white"


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
                colour = stage_colour(stage.rank) if layer in stage.layers else PALE
                ax.add_patch(plt.Rectangle((layer + 0.06, y - 0.38), 0.88, 0.7, color=colour, lw=0))
                if layer in handed.get(stage.rank, ()):
                    ax.plot([layer + 0.06, layer + 0.94], [y + 0.42] * 2, color="black", lw=1.5, solid_capstyle="butt")
            colour = stage_colour(stage.rank)
            for part, x in ends.items():
                ax.add_patch(plt.Rectangle((x, y - 0.38), 1.7, 0.7, color=colour if stage.owns(names[part]) else PALE, lw=0))
            if stage.layers:
                middle = (stage.layers[0] + stage.layers[-1] + 1) / 2
                span = f"{stage.layers[0]}-{stage.layers[-1]}" if len(stage.layers) > 1 else f"{stage.layers[0]}"
                box = {"fc": colour, "ec": "none", "pad": 1}
                ax.text(middle, y, span, ha="center", va="center", color=ink(colour), weight="bold", fontsize=8, bbox=box)
            if stage.rank in deaths:
                ax.plot(deaths[stage.rank] + 0.5, y, "X", color=RED, ms=9, mec="white", mew=0.8)
        if deaths:
            ax.text(
                num_layers + 8, -0.9, "X: the layer whose wk it looks up when it dies", color=RED, ha="right", fontsize=9
            )
        if handed:
            ax.text(-3, -0.9, "line below a cell: handed to the stage", ha="left", fontsize=9)
        for part, x in ends.items():
            ax.text(x + 0.85, len(stages) - 0.35, part, rotation=40, ha="right", va="top", fontsize=8)
        stage_ticks(ax, [stage.rank for stage in stages])
        step = 10 if num_layers > 20 else 1
        ax.set_xticks([x + 0.5 for x in range(0, num_layers, step)], range(0, num_layers, step))
        ax.set(xlim=(-4, num_layers + 9), ylim=(len(stages) - 0.4, -1.3 if report else -0.7))
        ax.set_xlabel("layer (coloured: held by the stage; grey: a PPMissingLayer placeholder without parameters)")
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
        ax.set(xlim=(-0.6, pp_size - 0.4), ylim=(len(counts) - 0.4, -0.6))
        ax.tick_params(length=0)
        stage_ticks(ax, list(range(pp_size)), "x")
        ax.spines[["left", "bottom"]].set_visible(False)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


def bytes_per_stage(checkpoint: Checkpoint, splits: dict[str, list[Stage]]) -> Figure:
    """Checkpoint GB per stage for several splits; the largest stage of each is marked and labelled."""
    with plt.style.context(STYLE):
        size = len(next(iter(splits.values())))
        fig, ax = plt.subplots(figsize=(9, 3.4))
        width = 0.8 / len(splits)
        hatches = ["////", "", ".."]
        for n, (label, stages) in enumerate(splits.items()):
            gb = [b / 1e9 for b in stage_bytes(checkpoint, stages)]
            x = [k - 0.4 + width * (n + 0.5) for k in range(size)]
            layers = ",".join(str(len(stage.layers)) for stage in stages)
            colours = [stage_colour(k) for k in range(size)]
            ax.bar(x, gb, width * 0.94, color=colours, alpha=1 if n else 0.55, hatch=hatches[n], ec="white")
            ax.bar(0, 0, color=GREY, alpha=1 if n else 0.55, hatch=hatches[n], ec="white", label=f"{label}: {layers}")
            top = max(gb)
            at = gb.index(top)
            ax.plot(x[at], top + 1.2, "v", color="black", ms=5)
            ax.text(x[at], top + 2.2, f"{top:.1f}", ha="center", va="bottom", weight="bold")
        stage_ticks(ax, list(range(size)), "x")
        ax.set_ylabel("checkpoint GB (1e9 bytes)")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.24), ncols=1)
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


LEDGER_COLOURS = {
    LOADED: BLUE,
    OTHER_STAGE: PALE,
    OTHER_RANK: VIOLET,
    SPECULATIVE: PURPLE,
    IGNORED: GREY,
    UNEXPECTED: RED,
    NOT_REACHED: ORANGE,
}


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
        ax.set(xlabel="tensors of the checkpoint", ylim=(len(report.stages) - 0.5, -0.5))
        ax.set_xlim(0, ax.get_xlim()[1] * 1.06)
        stage_ticks(ax, [one.stage.rank for one in report.stages], "y", list(range(len(report.stages))))
    plt.close(fig)  # returned, not left for pyplot to show a second time
    return fig


MARKERS = {"FP8 quantisation": (BLUE, "o"), "BF16 rounding": (ORANGE, "s"), "both": (RED, "x")}


def error_curves(table: pd.DataFrame) -> Figure:
    """RMS relative error against magnitude, the three kinds apart (from `error.error_by_magnitude`)."""
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(7.2, 3.4))
        for name, (colour, marker) in MARKERS.items():
            ax.plot(table.index, table[name], marker=marker, color=colour, ms=5, lw=1.2, label=name)
        ax.axvline(2.0**-6, color=GREY, lw=1, ls=":")
        ax.text(2.0**-6 * 1.1, 0.4, "smallest normal code", color="black", va="top", fontsize=8)
        ax.text(table.index[-1] * 1.3, table["FP8 quantisation"].iloc[-1], "FP8 quantisation\n(and both)", va="center")
        ax.text(table.index[-1] * 1.3, table["BF16 rounding"].iloc[-1], "BF16 rounding", va="center")
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="|value| / scale, in FP8 units (448 is the largest code)",
            ylabel="RMS relative error",
        )
        ax.set_xscale("log", base=2)
        ax.set_xlim(right=table.index[-1] * 30)
    plt.close(fig)
    return fig


def step_errors(edges: torch.Tensor, shares: dict[str, torch.Tensor]) -> Figure:
    """Histograms of the quantisation error in units of the FP8 step, one panel each."""
    with plt.style.context(STYLE):
        fig, axes = plt.subplots(1, len(shares), figsize=(4.2 * len(shares), 2.8), sharey=True, squeeze=False)
        for ax, (name, share) in zip(axes[0], shares.items()):
            ax.stairs(100 * share.numpy(), edges.numpy(), fill=True, color=BLUE)
            for half in (-0.5, 0.5):
                ax.axvline(half, color=RED, lw=1, ls="--")
            ax.set(title=name, xlabel="error / FP8 step", ylabel="% of elements")
            ax.label_outer()
    plt.close(fig)
    return fig


def errors_by_layer(table: pd.DataFrame, stages: list[Stage]) -> Figure:
    """SQNR of every FP8 tensor by layer, and of each stage as a whole (from `error.tensor_errors`)."""
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(9, 3.4))
        for stage in stages:
            own = table[table.layer.isin(stage.layers)]
            ax.plot(own.layer, own.sqnr_db, "o", color=stage_colour(stage.rank), ms=3.5, alpha=0.6)
            whole = 10 * np.log10(own.norm_sq.sum() / own.error_sq.sum())
            ax.plot([stage.layers[0] - 0.4, stage.layers[-1] + 0.4], [whole] * 2, color="black", lw=2)
            ax.text(
                (stage.layers[0] + stage.layers[-1]) / 2,
                whole,
                f"stage {stage.rank}\n{whole:.2f} dB",
                ha="center",
                va="bottom",
            )
        ax.plot([], [], "o", color=GREY, ms=3.5, label="one tensor, in its stage's colour")
        ax.plot([], [], color="black", lw=2, label="the stage's tensors together")
        ax.set(xlabel="layer", ylabel="SQNR, dB")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    plt.close(fig)
    return fig


def gallery_panels(original: torch.Tensor, results: dict[str, tuple[torch.Tensor, ErrorStats]]) -> Figure:
    """log10 of |restored / original|, medians of 8 x 8 elements, for the right dequantisation and the wrong ones."""
    with plt.style.context(STYLE):
        fig, axes = plt.subplots(2, 3, figsize=(8, 5.4))
        for ax, (name, (values, stats)) in zip(axes.flat, results.items()):
            ratio = (values.abs() / original.abs()).log10().nan_to_num(0, posinf=10, neginf=-10)
            n = len(ratio) // 8
            ratio = ratio[: n * 8, : n * 8].view(n, 8, n, 8).transpose(1, 2).flatten(2).median(-1).values.numpy()
            # Linear up to a factor of two, logarithmic beyond: a shifted border and ten powers of ten in one scale.
            image = ax.imshow(
                ratio,
                cmap="PuOr",
                norm=SymLogNorm(0.3, vmin=-10, vmax=10),
                extent=(0, 8 * n, 8 * n, 0),
                interpolation="nearest",
            )
            ax.set_title(f"{name}\n{stats.sqnr_db:.1f} dB", fontsize=9)
            ax.set(xticks=[0, 128, 256, 384, 512], yticks=[0, 128, 256, 384, 512])
        ticks = [-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10]
        fig.colorbar(image, ax=axes, shrink=0.6, label="log10 |restored / original|", ticks=ticks, format="%g")
    plt.close(fig)
    return fig


def overlap_curves(table: pd.DataFrame, k: int) -> Figure:
    """Top-k overlap against the length of the context (from `error.overlap_by_context`)."""
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 3.2))
        for (name, values), (colour, marker) in zip(table.items(), [(ORANGE, "s"), (BLUE, "o"), (RED, "x")]):
            ax.plot(table.index, 100 * values, marker=marker, color=colour, label=name)
            ax.text(table.index[-1] * 1.03, 100 * values.iloc[-1], name, va="center")
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(table.index), [f"{n:,}" for n in table.index])
        ax.minorticks_off()
        ax.set(xlabel="context, tokens", ylabel=f"% of the {k} picked tokens\nthat stay picked")
        ax.set_xlim(right=table.index[-1] * 1.6)
    plt.close(fig)
    return fig


def dequantisation_bench(rows: pd.DataFrame, tensor: str) -> Figure:
    """Time and peak extra memory of every peer at one shape, with the ratio to vLLM's scaled_dequantize."""
    here = rows[rows.tensor == tensor].set_index("peer").sort_values("seconds_median")
    reference = here.seconds_median["vLLM scaled_dequantize"]
    with plt.style.context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.0), sharey=True, width_ratios=[3, 2])
        colours = [BLUE if name.startswith("glmpp") else GREY if name.startswith("copy") else ORANGE for name in here.index]
        left.barh(here.index, 1e3 * here.seconds_median, color=colours)
        for y, value in enumerate(here.seconds_median):
            left.text(1e3 * value * 1.06, y, f"{1e3 * value:.1f}  (x{reference / value:.1f})", va="center", fontsize=8)
        left.set(xscale="log", xlabel="ms, median (in brackets: times faster than vLLM's)")
        left.set_xlim(right=1e3 * here.seconds_median.max() * 6)
        extra = (here.peak_extra_bytes / here.output_bytes).clip(lower=0)
        right.barh(here.index, extra, color=colours)
        for y, value in enumerate(extra):
            right.text(value + 0.08, y, f"{value:.2f}", va="center", fontsize=8)
        right.set(xlabel="peak extra memory / output", xlim=(0, extra.max() * 1.2))
    plt.close(fig)
    return fig


PART_COLOURS = {"choosing": VIOLET, "reading": BLUE, "dequantising": RED, "vllm": ORANGE}


PART_NAMES = {
    "choosing": "choosing tensors",
    "reading": "opening shards, making tensors",
    "dequantising": "dequantising wk",
    "vllm": "vLLM's loop and copies",
}


def load_time_bars(table: pd.DataFrame, note: str = "") -> Figure:
    """Load time of every stage, stacked by part, one panel for each format; the floor as a line where it was measured.

    Args:
        table: `LoadTimes.median()`, or a projection of the same form: indexed by (rank, format), seconds by part.
        note: goes above the panels.
    """
    formats = [name for name in ("stock", "glmpp") if name in table.index.get_level_values("format")]
    with plt.style.context(STYLE):
        fig, axes = plt.subplots(1, len(formats), figsize=(10, 3.2), squeeze=False)
        for ax, name in zip(axes[0], formats):
            rows = table.xs(name, level="format")
            bottom = np.zeros(len(rows))
            for part, colour in PART_COLOURS.items():
                ax.bar(rows.index, rows[part], bottom=bottom, color=colour, label=PART_NAMES[part], width=0.75)
                bottom += rows[part].to_numpy(dtype=float)
            for rank, total in zip(rows.index, bottom):
                ax.text(rank, total, f"{total:.2f}" if total < 10 else f"{total:,.0f}", ha="center", va="bottom", fontsize=8)
            if name == "glmpp" and "in-memory list" in table.index.get_level_values("format"):
                floor = table.xs("in-memory list", level="format").total
                ax.plot(floor.index, floor, "_", color="black", markersize=22, label="floor: from a list in memory")
            ax.set(title=name, ylim=(0, bottom.max() * 1.15))
            stage_ticks(ax, list(rows.index), "x")
        axes[0][0].set_ylabel("seconds")
        handles, labels = axes[0][-1].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        if note:
            fig.suptitle(note, fontsize=9)
    plt.close(fig)
    return fig


def bytes_read_and_kept(table: pd.DataFrame, kept: list[int]) -> Figure:
    """Cold: bytes that each stage's load brought into the page cache, beside those it keeps."""
    with plt.style.context(STYLE):
        fig, ax = plt.subplots(figsize=(9, 2.8))
        ranks = sorted(set(table.index.get_level_values("rank")))
        series = {
            "read, stock": (table.xs("stock", level="format").bytes_read, ORANGE),
            "read, glmpp": (table.xs("glmpp", level="format").bytes_read, BLUE),
            "kept": (pd.Series([kept[rank] for rank in ranks], index=ranks), GREY),
        }
        for place, (label, (values, colour)) in enumerate(series.items()):
            x = np.array(ranks) + (place - 1) * 0.27
            ax.bar(x, values / 1e6, width=0.25, color=colour, label=label)
            for at, value in zip(x, values / 1e6):
                ax.text(at, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=7)
        ax.set(ylabel="MB")
        stage_ticks(ax, ranks, "x")
        ax.set_ylim(top=max(values.max() for values, _ in series.values()) / 1e6 * 1.2)
        ax.legend(loc="upper right", ncols=3, fontsize=8)
    plt.close(fig)
    return fig


VERDICT_COLOURS = {LOADS: BLUE, DIES: RED, CANNOT_BUILD: PURPLE, INCOMPLETE: ORANGE, CANNOT_TELL: PALE}


def verdict_matrix(panels: dict[str, list[DryRunReport]]) -> Figure:
    """Verdict of every stage (columns) at several pipeline sizes (rows), one panel for each guard."""
    with plt.style.context(STYLE):
        sizes = [report.pp_size for report in next(iter(panels.values()))]
        fig, axes = plt.subplots(
            1, len(panels), figsize=(0.62 * max(sizes) * len(panels) + 1.2, 0.42 * len(sizes) + 1.3), squeeze=False
        )
        for ax, (title, reports) in zip(axes[0], panels.items()):
            for y, report in enumerate(reports):
                for one in report.stages:
                    x, colour = one.stage.rank, VERDICT_COLOURS[one.verdict]
                    ax.add_patch(plt.Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=colour, lw=0))
                    ink = "black" if colour == PALE else "white"
                    ax.text(x, y, one.verdict.split(",")[0], ha="center", va="center", color=ink, fontsize=8, weight="bold")
            ax.set(title=title, xlim=(-0.6, max(sizes) - 0.4), ylim=(len(sizes) - 0.4, -0.6))
            ax.set_yticks(range(len(sizes)), [f"PP={size}" for size in sizes])
            ax.tick_params(length=0)
            ax.spines[["left", "bottom"]].set_visible(False)
            stage_ticks(ax, list(range(max(sizes))), "x")
            ax.label_outer()
    plt.close(fig)
    return fig
