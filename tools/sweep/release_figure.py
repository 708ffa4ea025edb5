"""The figure of the record of releases in notebook 06."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pandas import DataFrame

from glmpp.dryrun.releases import NOT_KNOWN, NOT_THERE, Record
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.lab.figures import BLUE, GREY, ORANGE, PALE, PURPLE, RED, as_grid, cell, in_style

CELLS = {
    LOADS: (BLUE, ""),
    DIES: (RED, "dies"),
    CANNOT_BUILD: (PURPLE, "not built"),
    INCOMPLETE: (ORANGE, "incomplete"),
    NOT_KNOWN: (GREY, "?"),
    NOT_THERE: (PALE, ""),
}
CONTROL = "GlmMoeDsaForCausalLM"


@in_style
def since_when(record: Record) -> Figure:
    """Architectures (rows) by releases (columns), the worst verdict of the variants at PP=1 and 2; the control on top."""
    table = not_loading(record)
    names = [CONTROL, *(name for name in table.index if name != CONTROL)]
    fig, ax = plt.subplots(figsize=(10, 0.21 * len(names) + 0.6))
    for y, name in enumerate(names):
        for x, verdict in enumerate(table.loc[name]):
            cell(ax, (x, y), *CELLS[verdict], (0.96, 0.88), va="center_baseline", fontsize=6.5)
    as_grid(ax, table.columns, names)
    ax.axhline(0.5, color="black", lw=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    return fig


def not_loading(record: Record) -> DataFrame:
    """Verdicts, architecture by release, of those that do not load on every release that has them."""
    names = sorted({one for release in record.releases.values() for one in release.architectures})
    verdicts = {name: [release.verdict(one) for one in names] for name, release in record.releases.items()}
    table = DataFrame(verdicts, index=names)
    return table[~table.isin([LOADS, NOT_THERE]).all(axis=1)]
