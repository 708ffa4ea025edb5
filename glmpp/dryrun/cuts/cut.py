"""A tensor whose elements do not all get to where they belong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """A tensor whose elements do not all get to where they belong.

    Attributes:
        tensor: of the checkpoint.
        dimension: of it, that is cut.
        elements: first and last index along it: of what is read by nobody, or of what this rank reads; (): all.
        scales: None; or the tensor with the scales of these elements, where those that the rank reads are of others.
        read: first and last index of the scales that the rank reads; () if it reads none.
        group: elements of the dimension that share a scale.
    """

    tensor: str
    dimension: int
    elements: tuple[tuple[int, int], ...]
    scales: str | None = None
    read: tuple[tuple[int, int], ...] = ()
    group: float | None = None

    def __str__(self) -> str:
        which = f"{_spans(self.elements)} of dimension {self.dimension}"
        if self.scales is None:
            return f"{which}: read by no rank" if self.elements else "read by no rank"
        if not self.read:
            return f"it is loaded, and nothing is read of its {self.scales.rpartition('.')[2]}"
        groups = ", ".join(f"{first / self.group:g} to {(last + 1) / self.group:g}" for first, last in self.elements)
        return f"{which}: groups {groups} of {self.group:g} as stored, and of the scales {_spans(self.read)} are read"


def _spans(spans: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
