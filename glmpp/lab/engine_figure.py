"""Where the real engine's answers leave the oracle's, token by token."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from glmpp.lab.engine import LENGTHS, SIZES, TOLERANCE, Run
from glmpp.lab.figures import in_style

MARKERS = "os^D"


@in_style
def differences(*named: tuple[str, Run]) -> Figure:
    """For each run and prompt the difference of log-probabilities from transformers', over the tokens attended to."""
    fig, axes = plt.subplots(1, len(named), figsize=(2.9 * len(named), 3.2), sharex=True, sharey=True, squeeze=False)
    for ax, (name, run) in zip(axes[0], named):
        for length, marker, steps in zip(LENGTHS, MARKERS, run.differences):
            known = range(length, length + len(steps))
            ax.plot(known, [max(step, 1e-8) for step in steps], marker=marker, ms=4, label=f"prompt of {length} tokens")
        ax.axvline(SIZES["index_topk"] + 0.5, color="grey", lw=1, ls=":")
        ax.axhline(TOLERANCE, color="grey", lw=1)
        ax.set(title=name, xlabel="tokens so far", yscale="log", ylim=(1e-8, 20))
    axes[0, 0].set_ylabel("difference of log-probability")
    axes[0, 0].legend(fontsize=7)
    return fig
