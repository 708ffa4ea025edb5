"""Execute the notebooks, each in a fresh kernel, and write HTML for reviewers.

Two at a time, since much of a kernel's life keeps one core busy; one at a time those that measure seconds, and all of them
for committers (--in-place). Prints a table notebook / seconds / verdicts passed; ends non-zero if a cell failed or a
verdict is missing. That is how they are tested live; `make test` runs them as they are without vLLM, and two of them twice.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from pages import write_pages
from PIL import Image
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
ALONE = {"05_load_time_per_stage"}  # what it shows is how long something takes
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@dataclass
class Outcome:
    """How one notebook ended."""

    name: str
    seconds: float
    passed: int
    expected: int
    error: str | None

    @property
    def ok(self) -> bool:
        """No cell failed, and no verdict is missing; those that need vLLM may be, where it is not installed."""
        from glmpp.dryrun.installed import vllm_version

        return self.error is None and self.passed >= (1 if vllm_version() is None else self.expected)

    def row(self) -> str:
        """A line of the table, and a second one that says what failed."""
        line = f"{self.name:<36}{self.seconds:>8.1f}  {self.passed} of {max(self.passed, self.expected)}"
        return line if self.ok else f"{line}\n    FAILED: {self.error or 'verdicts are missing'}"


def execute(path: Path, on_cell=lambda: None) -> tuple[nbformat.NotebookNode, Outcome]:
    """Run a notebook top to bottom in a fresh kernel of this interpreter; outputs are those of this run alone."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    started, error = time.perf_counter(), None
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as sockets, open(BUILD / "kernel.log", "a") as log:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=900,
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
            on_cell_complete=lambda **_: on_cell(),
            # Not TCP: a port that is free when it is chosen may be another process's when the kernel wants it.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
        )
        try:
            client.execute(stderr=log)  # what the kernel process itself says, not its cells
        except CellExecutionError as failure:
            error = re.sub(r"\x1b\[[\d;]*m", "", str(failure)).strip().splitlines()[-1]
    for cell in notebook.cells:
        tidy(cell)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    outcome = Outcome(path.name, time.perf_counter() - started, *count_verdicts(notebook), error)
    return notebook, outcome


def execute_all(
    paths: list[Path], at_once: int, on_cell: Callable[[], None]
) -> Iterator[tuple[Path, nbformat.NotebookNode, Outcome]]:
    """Run notebooks some at a time, those of ALONE by themselves and last; yielded as they end, in the order begun."""
    alone = [path for path in paths if path.stem in ALONE and at_once > 1]
    with ThreadPoolExecutor(at_once) as pool:
        together = [path for path in paths if path not in alone]
        for path, (notebook, outcome) in zip(together, pool.map(lambda path: execute(path, on_cell), together)):
            yield path, notebook, outcome
    for path in alone:
        yield path, *execute(path, on_cell)


def tidy(cell: nbformat.NotebookNode) -> None:
    """Leave in a stream what a terminal would show in the end: progress bars overwrite their line."""
    if cell.cell_type != "code":
        return
    merged: list[nbformat.NotebookNode] = []
    for output in cell.outputs:  # a stream comes in pieces: put them together before looking for line ends
        first = next((o for o in merged if o.output_type == "stream" and o.name == output.get("name")), None)
        if output.output_type == "stream" and first is not None:
            first.text += output.text
        else:
            merged.append(output)
    kept = []
    for output in merged:
        if output.output_type == "stream":
            lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.text.rstrip("\r").split("\n")]
            output.text = "\n".join(lines)
            if not output.text.strip():
                continue
        if png := output.get("data", {}).get("image/png"):
            output.data["image/png"] = palette(png)
        kept.append(output)
    cell.outputs = kept


def palette(png: str) -> str:
    """A base64 PNG with 256 colours on white, a third of the size: enough for figures with a handful of them."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    flat.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def count_verdicts(notebook: nbformat.NotebookNode) -> tuple[int, int]:
    """Verdict lines printed, and calls of claim() in the source (a loop prints more than one)."""
    printed = calls = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            calls += len(re.findall(r"^\s*(?:claims\.|glmpp\.)?claim\(", cell.source, flags=re.M))
            text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
            printed += len(re.findall(r"match: True$", text, flags=re.M))
    return printed, calls


def keep(notebook: nbformat.NotebookNode, outcome: Outcome) -> None:
    """Leave the executed notebook in build/ with how it ended: the pages are made from what lies there."""
    finished = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    notebook.metadata["glmpp"] = {**asdict(outcome), "finished": finished}
    nbformat.write(notebook, BUILD / outcome.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all, in order")
    parser.add_argument("--in-place", action="store_true", help="also write the outputs into the notebooks")
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.notebooks] or NOTEBOOKS

    sys.path.insert(0, str(ROOT))
    from glmpp.lab.notebook import tiny_checkpoint
    from glmpp.progress import progress_bar

    at_once = 1 if arguments.in_place else 2
    if at_once > 1:  # more threads than cores would only wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))

    checkpoint = tiny_checkpoint()
    print(f"synthetic checkpoint: {checkpoint.directory.relative_to(ROOT)}, {len(checkpoint)} tensors")
    cells = sum(cell.cell_type == "code" for path in paths for cell in nbformat.read(path, as_version=4).cells)
    outcomes = []
    print(f"\n{'notebook':<36}{'seconds':>8}  verdicts passed")
    with progress_bar(total=cells) as bar:
        for path, notebook, outcome in execute_all(paths, at_once, bar.update):
            outcomes.append(outcome)
            bar.write(outcome.row())
            if arguments.in_place and outcome.error is None:
                nbformat.write(notebook, path)
            keep(notebook, outcome)
    index, *_ = write_pages([BUILD / path.name for path in NOTEBOOKS if (BUILD / path.name).exists()], BUILD)

    print(f"\nHTML: {os.path.relpath(index)}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
