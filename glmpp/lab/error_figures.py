"""The figures of notebook 04, one function each. All return a matplotlib Figure on opaque white."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from glmpp.lab.error import ErrorStats
from glmpp.lab.figures import BLUE, GREY, ORANGE, RED, in_style, stage_colour
from glmpp.partition import Stage

KINDS = {"FP8 quantisation": (BLUE, "o"), "BF16 rounding": (ORANGE, "s"), "both": (RED, "x")}


@in_style
def error_curves(table: pd.DataFrame) -> Figure:
    """RMS relative error against magnitude, the three kinds apart (from `error.error_by_magnitude`)."""
    fig, ax = plt.subplots(figsize=(7.2, 3.4))
    for name, (colour, marker) in KINDS.items():
        ax.plot(table.index, table[name], marker=marker, color=colour, ms=5, lw=1.2)
    ax.axvline(2.0**-6, color=GREY, lw=1, ls=":")
    ax.text(2.0**-6 * 1.1, 0.4, "smallest normal code", va="top", fontsize=8)
    last = table.index[-1]
    for name, more in (("FP8 quantisation", "\n(and both)"), ("BF16 rounding", "")):
        ax.text(last * 1.3, table[name].iloc[-1], name + more, va="center")
    ax.set(xlabel="|value| / scale, in FP8 units (448 is the largest code)", ylabel="RMS relative error", yscale="log")
    ax.set_xscale("log", base=2)
    ax.set_xlim(right=last * 30)
    return fig


@in_style
def step_errors(edges: torch.Tensor, shares: dict[str, torch.Tensor]) -> Figure:
    """Histograms of the quantisation error in units of the FP8 step, one panel each."""
    fig, axes = plt.subplots(1, len(shares), figsize=(4.2 * len(shares), 2.8), sharey=True, squeeze=False)
    for ax, (name, share) in zip(axes[0], shares.items()):
        ax.stairs(100 * share.numpy(), edges.numpy(), fill=True, color=BLUE)
        for half in (-0.5, 0.5):
            ax.axvline(half, color=RED, lw=1, ls="--")
        ax.set(title=name, xlabel="error / FP8 step", ylabel="% of elements")
        ax.label_outer()
    return fig


@in_style
def errors_by_layer(table: pd.DataFrame, stages: list[Stage]) -> Figure:
    """SQNR of every FP8 tensor by layer, and of each stage as a whole (from `error.tensor_errors`)."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    for stage in stages:
        own, first, last = table[table.layer.isin(stage.layers)], stage.layers[0], stage.layers[-1]
        ax.plot(own.layer, own.sqnr_db, "o", color=stage_colour(stage.rank), ms=3.5, alpha=0.6)
        whole = 10 * np.log10(own.norm_sq.sum() / own.error_sq.sum())
        ax.plot([first - 0.4, last + 0.4], [whole] * 2, color="black", lw=2)
        ax.text((first + last) / 2, whole, f"stage {stage.rank}\n{whole:.2f} dB", ha="center", va="bottom")
    ax.plot([], [], "o", color=GREY, ms=3.5, label="one tensor, in its stage's colour")
    ax.plot([], [], color="black", lw=2, label="the stage's tensors together")
    ax.set(xlabel="layer", ylabel="SQNR, dB")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return fig


@in_style
def gallery_panels(original: torch.Tensor, results: dict[str, tuple[torch.Tensor, ErrorStats]]) -> Figure:
    """log10 of |restored / original|, medians of 8 x 8 elements, for the right dequantisation and the wrong ones."""
    fig, axes = plt.subplots(2, 3, figsize=(8, 5.4))
    n = len(original) // 8
    # Linear up to a factor of two, logarithmic beyond: a shifted border and ten powers of ten in one scale.
    look = {"cmap": "PuOr", "norm": SymLogNorm(0.3, vmin=-10, vmax=10), "extent": (0, 8 * n, 8 * n, 0)}
    for ax, (name, (values, stats)) in zip(axes.flat, results.items()):
        ratio = (values.abs() / original.abs()).log10().nan_to_num(0, posinf=10, neginf=-10)
        ratio = ratio[: n * 8, : n * 8].view(n, 8, n, 8).transpose(1, 2).flatten(2).median(-1).values.numpy()
        image = ax.imshow(ratio, interpolation="nearest", **look)
        ax.set_title(f"{name}\n{stats.sqnr_db:.1f} dB", fontsize=9)
        ax.set(xticks=range(0, 513, 128), yticks=range(0, 513, 128))
    ticks = [-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10]
    fig.colorbar(image, ax=axes, shrink=0.6, label="log10 |restored / original|", ticks=ticks, format="%g")
    return fig


@in_style
def overlap_curves(table: pd.DataFrame, k: int) -> Figure:
    """Top-k overlap against the length of the context (from `error.overlap_by_context`)."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    last = table.index[-1]
    for (name, values), (colour, marker) in zip((100 * table).items(), [(ORANGE, "s"), (BLUE, "o"), (RED, "x")]):
        ax.plot(values, marker=marker, color=colour)
        ax.text(last * 1.03, values[last], name, va="center")
    ax.set_xscale("log", base=2)
    ax.set_xticks(table.index, [f"{n:,}" for n in table.index])
    ax.minorticks_off()
    ax.set(xlabel="context, tokens", ylabel=f"% of the {k} picked tokens\nthat stay picked")
    ax.set_xlim(right=last * 1.6)
    return fig


@in_style
def dequantisation_bench(rows: pd.DataFrame, tensor: str) -> Figure:
    """Time and peak extra memory of every peer at one shape, with the ratio to vLLM's scaled_dequantize."""
    here = rows[rows.tensor == tensor].set_index("peer").sort_values("seconds_median")
    ms, extra = 1e3 * here.seconds_median, (here.peak_extra_bytes / here.output_bytes).clip(lower=0)
    faster = ms["vLLM scaled_dequantize"] / ms
    colours = [{"glmpp": BLUE, "copy": GREY}.get(name.replace(",", " ").split()[0], ORANGE) for name in here.index]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.0), sharey=True, width_ratios=[3, 2])
    labels = [f"{value:.1f}  (x{ratio:.1f})" for value, ratio in zip(ms, faster)]
    left.bar_label(left.barh(here.index, ms, color=colours), labels, padding=3, fontsize=8)
    left.set(xscale="log", xlabel="ms, median (in brackets: times faster than vLLM's)")
    left.set_xlim(right=ms.max() * 6)
    right.bar_label(right.barh(here.index, extra, color=colours), fmt="{:.2f}", padding=3, fontsize=8)
    right.set(xlabel="peak extra memory / output", xlim=(0, extra.max() * 1.2))
    return fig
