"""JupyterLab as a new team member meets it: open notebook 00 by its address, Run All Cells, follow the link to 01."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from walkthrough import count_verdicts

START, NEXT = "00_start_here.ipynb", "01_reproduce_the_keyerror.ipynb"
OVERRIDES = {
    # All cells in the document, not only those in view; no news, no look for updates.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
CELLS = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-CodeCell"
PROMPTS = "cells => cells.map(cell => cell.querySelector('.jp-InputPrompt').textContent)"
# Run All gives every cell [*], then its number; after an error the rest go back to [ ].
FINISHED = f"""() => {{
  const prompts = [...document.querySelectorAll("{CELLS} .jp-InputPrompt")].map(prompt => prompt.textContent);
  return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes("*"));
}}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the notebooks: Run All and autosave write into them. The package stays the installed one."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


@pytest.fixture(scope="module")
def lab(browser, checkout, tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab that knows nothing of the user's settings and leaves nothing among them."""
    home = tmp_path_factory.mktemp("jupyter")
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(OVERRIDES))
    variables = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "GLMPP_"))}
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0"]
    command += ["--IdentityProvider.token=", "--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={checkout}"]
    if os.geteuid() == 0:
        command.append("--allow-root")
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            command,
            cwd=checkout,
            env=ours | {name: str(home / folder) for name, folder in variables.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/status", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()  # it shuts its kernels down
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def page(browser, lab):
    """Notebook 00, open and with a kernel that waits, and every address that the browser asks for."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.addresses = []
    page.on("request", lambda asked: page.addresses.append(asked.url))
    page.goto(f"{lab}/lab/tree/notebooks/{START}")
    wait_until_done(page)
    yield page
    page.close()


def wait_until_done(page, seconds: int = 60) -> None:
    """Until no code cell waits or runs, and the kernel, which reports idle after the last output, is there and idle."""
    page.wait_for_function(FINISHED, timeout=1000 * seconds)
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile(r"^Python 3.*\| Idle$")).wait_for(timeout=60_000)


def menu(page, *labels: str) -> None:
    """Choose an entry of the menus, as a mouse does."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{labels[0]}$")).click()
    for label in labels[1:]:
        page.locator(".lm-Menu-itemLabel:visible", has_text=re.compile(f"^{label}$")).click()


def errors(page, path: Path) -> list[str]:
    """Save the notebook and read its errors from the file: on the page an error looks like any text on stderr."""
    menu(page, "File", "Save Notebook")
    page.locator(".lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty)", has_text=path.name).wait_for()
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    return [output.ename for output in outputs if output.output_type == "error"]


def verdicts(page) -> int:
    return sum(text.count("match: True") for text in page.locator(f"{CELLS} .jp-OutputArea-output").all_inner_texts())


def committed() -> tuple[int, int]:
    """Code cells, and verdict lines, of notebook 00 as it is committed."""
    notebook = nbformat.read(ROOT / "notebooks" / START, as_version=4)
    return sum(cell.cell_type == "code" for cell in notebook.cells), count_verdicts(notebook)[0]


def test_opens_as_committed_with_its_outputs(page):
    cells, lines = committed()
    page.wait_for_function(f'() => document.querySelectorAll("{CELLS}").length == {cells}')
    assert page.eval_on_selector_all(CELLS, PROMPTS) == [f"[{n}]:" for n in range(1, cells + 1)]
    assert verdicts(page) == lines


def test_run_all_cells_ends_without_an_error_and_with_every_verdict(page, checkout):
    cells, lines = committed()
    menu(page, "Edit", "Clear Outputs of All Cells")
    page.wait_for_function(f'() => !document.querySelector("{CELLS} .jp-OutputArea-output")')
    assert verdicts(page) == 0
    menu(page, "Run", "Run All Cells")
    wait_until_done(page, seconds=240)
    assert errors(page, checkout / "notebooks" / START) == []
    assert page.eval_on_selector_all(CELLS, PROMPTS) == [f"[{n}]:" for n in range(1, cells + 1)]
    assert verdicts(page) >= lines > 0


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_reads_in_both_themes(page, shots, theme):
    menu(page, "Settings", "Theme", theme)
    page.locator(f'body[data-jp-theme-name="{theme}"]').wait_for(state="attached")
    name = theme.split()[-1].lower()
    for part, selector in (("top", "h1"), ("figure", ".jp-OutputArea-output img")):
        page.locator(f".jp-NotebookPanel:not(.lm-mod-hidden) {selector}").first.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)  # the theme's colours fade in
        page.screenshot(path=shots / f"lab-{name}-{part}.png")


def test_the_link_in_the_last_cell_opens_the_next_notebook(page):
    last = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-MarkdownCell").last
    last.locator(f'a[href*="{NEXT}"]').click()
    page.locator(".lm-TabBar-tab.lm-mod-current .lm-TabBar-tabLabel", has_text=NEXT).wait_for(timeout=30_000)
    wait_until_done(page)
    assert "Where does each stage die" in page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) h1").first.inner_text()


def test_an_error_in_a_cell_is_seen(page, checkout):
    assert errors(page, checkout / "notebooks" / NEXT) == []
    page.locator(CELLS).first.locator(".cm-content").click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")  # a cell below
    page.keyboard.press("Enter")
    page.keyboard.type("1 / 0")
    page.keyboard.press("Shift+Enter")
    wait_until_done(page)
    assert errors(page, checkout / "notebooks" / NEXT) == ["ZeroDivisionError"]


def test_nothing_was_asked_of_another_host(page, lab):
    assert [url for url in page.addresses if not url.startswith((lab, "data:", "blob:"))] == []
