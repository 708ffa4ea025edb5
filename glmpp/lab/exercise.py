"""The exercise of notebook 00, *write the skip yourself*: what a helper does, beside what it should do.

A helper is judged by what it leaves behind, not by how it is written: what is in the parameters, in the buffer, in
`loaded`, and what it returned. The cases are made here from names alone and know nothing of the kit's own helper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from glmpp.dequant import FP8
from glmpp.lab.figures import ORANGE, PALE, RED, as_grid, cell, in_style, stage_colour, stage_ticks
from glmpp.partition import partition_layers
from glmpp.words import printable

STORED, DROPPED, KEPT, LEFT = "stored", "dropped", "kept in the buffer", "left to the other branches"
NUM_LAYERS, PP_SIZE, HIDDEN = 12, 4, 256  # of the small model that the cases are about


@dataclass(frozen=True)
class Case:
    """Tensors handed to a helper one after another, and what should have become of them in the end.

    Attributes:
        what: the situation, in words.
        held: layers of the stage.
        tensors: (layer, tensor name within the indexer, dtype) in the order of arrival.
        spec: STORED, DROPPED, KEPT or LEFT.
    """

    what: str
    held: range
    tensors: tuple[tuple[int, str, torch.dtype], ...]
    spec: str


def _pair(layer: int, *parts: str) -> tuple[tuple[int, str, torch.dtype], ...]:
    kinds = {"weight": ("wk.weight", FP8), "scale": ("wk.weight_scale_inv", torch.float32)}
    return tuple((layer, *kinds[part]) for part in parts)


CASES = [
    Case("a layer of this stage", range(3, 6), _pair(4, "weight", "scale"), STORED),
    Case("a layer of this stage, scale first", range(3, 6), _pair(4, "scale", "weight"), STORED),
    Case("another stage's layer", range(3, 6), _pair(0, "weight", "scale"), DROPPED),
    Case("another stage's layer, scale first", range(3, 6), _pair(7, "scale", "weight"), DROPPED),
    Case("another stage's weight, its scale still to come", range(3, 6), _pair(0, "weight"), DROPPED),
    Case("own weight, its scale still to come", range(3, 6), _pair(4, "weight"), KEPT),
    Case("layer 11 is held, layer 1 is not", range(9, 12), _pair(11, "weight", "scale"), STORED),
    Case("no pipeline parallelism", range(12), _pair(0, "weight", "scale"), STORED),
    Case("own weights_proj", range(3, 6), ((4, "weights_proj.weight", torch.bfloat16),), LEFT),
    Case("own wk, stored in BF16", range(3, 6), ((4, "wk.weight", torch.bfloat16),), LEFT),
]


def _fused(layer: int) -> str:
    return f"layers.{layer}.self_attn.indexer.wk_weights_proj.weight"


def _tensor(part: str, dtype: torch.dtype) -> torch.Tensor:
    shape = (1, HIDDEN // 128) if part.endswith("weight_scale_inv") else (4, HIDDEN) if "weights" in part else (128, HIDDEN)
    return torch.ones(shape).to(dtype)


def shorten(text: str, limit: int = 30) -> str:
    """A text in one line, cut after so many characters."""
    return printable(text) if len(text) <= limit else f"{printable(text[:limit])}…"


class ToyStage:
    """The little of a stage that a helper sees: parameters of its layers, prefixes of the others, an empty buffer."""

    def __init__(self, held: range):
        self.written: set[str] = set()
        self.params = {_fused(layer): self._parameter(_fused(layer)) for layer in held}
        self.missing = [f"layers.{layer}." for layer in range(NUM_LAYERS) if layer not in held]
        self.pending: dict = {}
        self.loaded: set[str] = set()

    def _parameter(self, name: str) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(132, HIDDEN, dtype=torch.bfloat16), requires_grad=False)

        def write(param: torch.nn.Parameter, tensor: torch.Tensor, shard: int) -> None:
            param.data[:128].copy_(tensor)
            self.written.add(name)

        parameter.weight_loader = write
        return parameter

    def hand_over(self, helper: Callable[..., bool], tensors: tuple[tuple[int, str, torch.dtype], ...]) -> str:
        """What became of the tensors: STORED, DROPPED, KEPT, LEFT, or the exception that the helper ended in."""
        layer, handled, before = tensors[0][0], [], (set(self.loaded), dict(self.pending))
        for _, part, dtype in tensors:
            name = f"layers.{layer}.self_attn.indexer.{part}"
            try:
                answer = helper(name, _tensor(part, dtype), self.pending, self.params, self.loaded, list(self.missing))
            except Exception as error:
                return f"{type(error).__name__}: {shorten(str(error))}"
            handled.append(answer)
        if not all(isinstance(answer, bool) for answer in handled):
            return f"returned {shorten(repr(next(answer for answer in handled if not isinstance(answer, bool))))}"
        if _fused(layer) in self.written:
            return STORED if _fused(layer) in self.loaded else "stored, but not added to `loaded`"
        if any(str(layer) in str(key).split(".") for key, parts in self.pending.items() if parts):
            return KEPT
        if (self.loaded, self.pending) != before:
            return "dropped, but leaves something"
        return DROPPED if all(handled) else LEFT


def judge(helper: Callable[..., bool]) -> pd.DataFrame:
    """One row per case: the situation, what the helper did, what the specification says, and whether they match."""
    rows = []
    for case in CASES:
        yours = ToyStage(case.held).hand_over(helper, case.tensors)
        rows.append((case.what, yours, case.spec, "match" if yours == case.spec else "differs"))
    return pd.DataFrame(rows, columns=["case", "Yours", "Spec", "verdict"]).set_index("case")


def check(helper: Callable[..., bool]) -> Figure:
    """Print *Yours* beside *Spec* for every case and return a picture of which tensors reached which stage.

    Nothing is raised for a helper that is wrong or broken: what it did is in the table.

    Args:
        helper: signature and contract of `glmpp.loader.load_fp8_indexer_wk`.
    """
    table = judge(helper)
    width = {name: max(map(len, [name, *table[name]])) + 2 for name in ("Yours", "Spec")}
    for case, yours, spec, verdict in [("case", *table.columns), *table.itertuples()]:
        print(f"{case:<50}{yours:<{width['Yours']}}{spec:<{width['Spec']}}{verdict}")
    wrong = table.index[table.verdict != "match"]
    end = f". Not yet: {wrong[0]}." if len(wrong) else ": this is the fix."
    print(f"\n{len(table) - len(wrong)} of {len(table)} cases match{end}")
    return reached(helper)


@in_style
def reached(*helpers: Callable[..., bool]) -> Figure:
    """What became of each layer's wk on four stages, each handed all twelve layers in order; one panel for each helper."""
    fig, axes = plt.subplots(len(helpers), 1, figsize=(8, 2.0 * len(helpers) + 0.5), squeeze=False)
    for ax, helper in zip(axes[:, 0], helpers):
        for rank, held in enumerate(partition_layers(NUM_LAYERS, PP_SIZE, [NUM_LAYERS // PP_SIZE] * PP_SIZE)):
            looks = {
                STORED: (stage_colour(rank), "stored"),
                DROPPED: (PALE, ""),
                KEPT: (ORANGE, "kept"),
                LEFT: ("white", "left"),
            }
            stage, result = ToyStage(held), STORED
            for layer in range(NUM_LAYERS):
                if result not in looks:  # dead
                    cell(ax, (layer, rank), "white", edge=PALE)
                    continue
                result = stage.hand_over(helper, _pair(layer, "weight", "scale"))
                look = looks.get(result, (RED, result.split(":")[0]))
                cell(ax, (layer, rank), *look, edge=PALE, fontsize=7.5, weight="bold")
        as_grid(ax, range(NUM_LAYERS), range(PP_SIZE))
        stage_ticks(ax, list(range(PP_SIZE)))
        ax.set_title(getattr(helper, "__name__", "yours"))
    ax.set_xlabel("layer whose wk is handed to the stage (grey: dropped; white, without a word: never reached)")
    return fig
