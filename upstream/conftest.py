"""`pytest upstream/NAME` runs a finding's test on the installed vLLM as it is, `--fixed` with the fix beside the test."""

import importlib.util

import pytest


def pytest_addoption(parser):
    parser.addoption("--fixed", action="store_true", help="apply the fix.py beside each test first")


@pytest.fixture(scope="module", autouse=True)
def fixed(request):
    if not request.config.getoption("--fixed"):
        return
    path = request.path.with_name("fix.py")
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    fix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fix)
    fix.apply()
