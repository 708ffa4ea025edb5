"""Progress bars where somebody watches them: on a terminal and in a notebook, never in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(
    items: Iterable | None = None, what: str = "", *, total: int | None = None, show: bool | None = None
) -> tqdm:
    """A plain bar on standard error that vanishes when it is done.

    Args:
        show: whether to show it; None: if it would be seen as it moves.
    """
    return tqdm(items, what, total=total, leave=False, disable=not (is_watched() if show is None else show))


def is_watched() -> bool:
    """Whether standard error is a terminal, or the stream of a notebook's kernel."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
