"""One Chromium for the tests of this folder: the system's own, so that nothing has to be downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

SHOTS = ROOT / "build" / "lab"
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[test]'")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where screenshots are left for a human to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    return SHOTS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that failed leaves what the browser showed."""
    report = yield
    page = item.funcargs.get("page") or item.funcargs.get("phone")
    if report.failed and page:
        page.screenshot(path=SHOTS / f"failed-{item.name}.png")
    return report
