"""Shared fixtures: the GLM-5.1-FP8 config, a tiny one of the same structure, and a tiny checkpoint with real bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import glmpp
from glmpp.checkpoint import Checkpoint
from glmpp.formats.config import load_config
from glmpp.formats.glm5 import reduced_config
from glmpp.gpus import CPU, default_target
from glmpp.synthetic import write_checkpoint
from glmpp.verdict import forks, server
from glmpp.verdict.installed import vllm_version

ROOT = Path(__file__).resolve().parent.parent
# Where the vLLM process finds a plugin of the tests, as if it were installed; see plugins/faulty.py.
PLUGINS = str(ROOT / "tests" / "plugins")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PLUGINS)))
collect_ignore = [
    "upstream",  # meant to fail on an affected release: `make test-matrix` runs it
    "findings",  # of the newest release: `make test-upstream` runs it
    "lab",  # needs a browser: `make test-lab` runs it
]

# test_mutations.py runs tests against a changed copy of the package: make sure that it is the copy that is imported.
if expected := os.environ.get("GLMPP_MUTANT"):
    assert Path(glmpp.__file__).is_relative_to(expected), f"imported {glmpp.__file__}, expected the copy in {expected}"

# No example fails for being slow: the machine may be busy with something else.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# What takes longest, in this order: begun first, so that in the end no worker waits long for another. `make test`.
LONGEST = [
    "test_vllm_plugin",
    "test_vllm_quantised",
    "test_vllm_layouts",
    "test_vllm_targets",
    "test_faults",
    "test_vllm_check",
    "test_vllm_losses",
    "test_vllm_memory",
    "test_vllm_dry_run",
    "test_vllm_child",
    "test_vllm_sweep",
    "notebooks that read all names",
    "notebook",
    "mutants with vLLM",
    "mutants",
]
SPREAD = ("test_notebooks.py", "test_mutations.py")


def pytest_collection_modifyitems(config, items):
    if not hasattr(config, "workerinput"):
        return

    def kind(item) -> str:
        marks = {mark.name for mark in item.iter_markers()}
        if "mutation" in marks:
            return "mutants with vLLM" if "vllm" in marks else "mutants"
        if "notebooks" in marks:
            return "notebooks that read all names" if "05_" in item.name else "notebook"
        return item.path.stem

    items.sort(key=lambda item: LONGEST.index(kind(item)) if kind(item) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker, with their fixtures and servers; notebooks and mutants go where there is room.

    Not by the mark `xdist_group`: pytest-xdist 3.8 appends it to a name that pytest 9.2 no longer asks for.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(SPREAD) else file

    return ByFile(config, log)


def pytest_configure(config):
    """One process imports vLLM for all workers, and for the kernels of the notebooks that they run."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput") and vllm_version():
        server.Server.share(default_target(), CPU)


@pytest.fixture
def own_server(monkeypatch):
    """A process that imports vLLM for this test alone, and is ended with it."""
    monkeypatch.setattr(server.Server, "current", {})
    monkeypatch.delenv(server.SHARED, raising=False)
    yield
    for one in server.Server.current.values():
        one.process.kill()


@pytest.fixture
def interruptible():
    """As at a terminal. What a shell starts in the background ignores interrupts, and so does all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def side_by_side(monkeypatch):
    """How many forks share the stages of a dry run, whatever the number of cores."""
    return lambda number: monkeypatch.setattr(forks, "cores", lambda: number)


@pytest.fixture(autouse=True)
def no_partition_variable(monkeypatch):
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)


@pytest.fixture(scope="session")
def config() -> dict:
    return load_config(ROOT / "data" / "glm-5.1-fp8" / "config.json")


@pytest.fixture(scope="session")
def full(config) -> Checkpoint:
    """All tensors of GLM-5.1-FP8, without data."""
    return Checkpoint.from_config(config)


@pytest.fixture(scope="session")
def tiny_config(config) -> dict:
    return reduced_config(config)


@pytest.fixture(scope="session")
def tiny(tiny_config, tmp_path_factory) -> Checkpoint:
    """A tiny GLM-5 checkpoint with real bytes in several shards."""
    return write_checkpoint(tiny_config, tmp_path_factory.mktemp("checkpoint") / "tiny")
