"""The committed notebooks, and a fresh run of each without vLLM. All of them live: `make walkthrough`."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
import walkthrough

NOTEBOOKS = walkthrough.NOTEBOOKS
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work|tmp|opt|usr|var|private)/[\w.-]+|site-packages|[A-Z]:\\\\")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and len(numbers) >= 8


def faults(notebook: dict) -> list[str]:
    """What a reader would trip over in a committed notebook."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("execution counts are not 1..n")
    for cell in code:
        if len(cell["source"].splitlines()) > 15:
            found.append(f"cell {cell['execution_count']} has more than 15 lines")
        for output in cell["outputs"]:
            if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", []):
                found.append(f"cell {cell['execution_count']} ends in {output['ename']}")
            if match := MACHINE_PATH.search(re.sub(r'"image/png": ".*?"', "", json.dumps(output))):
                found.append(f"cell {cell['execution_count']} shows the path {match[0]}")
            if set(output.get("data", {})) == {"application/vnd.jupyter.widget-view+json"}:
                found.append(f"cell {cell['execution_count']} shows a widget only")
    return found


@each
def test_committed_notebook_is_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert faults(notebook) == []
    assert path.stat().st_size < 300_000
    assert 15 <= len(notebook.cells) <= 30
    assert walkthrough.count_verdicts(notebook)[0] >= walkthrough.count_verdicts(notebook)[1] > 0


@each
def test_opening_and_closing_cells_keep_the_contract(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "\n> " in cells[0].source
    assert all(f"*{word}:*" in cells[0].source for word in ("Needs", "Takes", "Reads", "Writes"))
    assert "environment()" in cells[1].source
    assert "**What this shows:**" in cells[-1].source and "**What it does not:**" in cells[-1].source
    linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", "".join(cell.source for cell in cells))
    assert all((path.parent / name).exists() for name in linked)


def test_the_checks_on_notebooks_can_fail():
    cell = nbformat.v4.new_code_cell("1", execution_count=3)
    cell.outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="'x'", traceback=["/" + "root/x"])]
    found = faults(nbformat.v4.new_notebook(cells=[cell]))
    assert len(found) == 3 and any("KeyError" in fault for fault in found)


def test_progress_bars_leave_no_trace():
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="  0%|   | 0/9\r100%|###| 9/9"),
        nbformat.v4.new_output("stream", name="stderr", text="\r            \r"),
        nbformat.v4.new_output("stream", name="stdout", text="kept\nhalf\rwhole\n"),
    ]
    walkthrough.tidy(cell)
    assert [output.text for output in cell.outputs] == ["kept\nwhole\n"]


@pytest.mark.notebooks
@pytest.mark.parametrize(("name", "live"), [("00_start_here", True), ("01_reproduce_the_keyerror", False)])
def test_a_kernel_that_runs_everything_twice_gives_the_same_verdicts(name, live, tmp_path, monkeypatch):
    if not live:
        monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    notebook, outcome = walkthrough.execute(cells_twice(path, tmp_path))
    assert outcome.error is None, outcome.error
    assert outcome.ok
    half = len(notebook.cells) // 2
    assert verdicts(notebook.cells[:half]) == verdicts(notebook.cells[half:]) != []


def cells_twice(path: Path, folder: Path) -> Path:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += copy.deepcopy(notebook.cells)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


def verdicts(cells) -> list[str]:
    return [line for cell in cells for line in str(cell.get("outputs")).split("\\n") if "match: True" in line]


@pytest.mark.notebooks
@each
def test_runs_without_vllm_and_says_that_results_are_recorded(path, monkeypatch):
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    notebook, outcome = walkthrough.execute(path)
    assert outcome.error is None, outcome.error
    text = str(notebook)
    assert "live (python" not in text
    asks_vllm = any("dry_run(" in cell.source or "vllm_pp_indices(" in cell.source for cell in notebook.cells)
    assert not asks_vllm or "recorded on" in text or "not compared" in text


@pytest.mark.notebooks
def test_a_wrong_claim_fails_its_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell('from glmpp import claim\nclaim("two", expected=2, got=1 + 2)')]
    )
    nbformat.write(notebook, tmp_path / "99_wrong.ipynb")
    _, outcome = walkthrough.execute(tmp_path / "99_wrong.ipynb")
    assert not outcome.ok and "expected 2, got 3, match: False" in outcome.error


def test_a_verdict_that_is_missing_fails_its_notebook_where_vllm_is_installed(monkeypatch):
    outcome = walkthrough.Outcome("00_some.ipynb", seconds=1.0, passed=2, expected=3, error=None)
    monkeypatch.setattr("glmpp.dryrun.installed.vllm_version", lambda: "0.22.1")
    assert not outcome.ok and "FAILED: verdicts are missing" in outcome.row()
    monkeypatch.setattr("glmpp.dryrun.installed.vllm_version", lambda: None)
    assert outcome.ok
