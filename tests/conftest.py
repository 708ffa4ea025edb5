"""Shared fixtures: the GLM-5.1-FP8 config, a tiny one of the same structure, and a tiny checkpoint with real bytes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from workers import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import glmpp
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun import server, workers
from glmpp.formats.config import load_config
from glmpp.formats.glm5 import reduced_config
from glmpp.synthetic import write_checkpoint

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
    sys.path.insert(0, os.path.join(expected, "tools"))
    assert Path(glmpp.__file__).is_relative_to(expected), f"imported {glmpp.__file__}, expected the copy in {expected}"

if "PYTEST_XDIST_WORKER" in os.environ:  # so would more forks for a dry run, see `side_by_side`
    workers.cores = lambda: 1

# No example fails for being slow: the machine may be busy with something else.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture
def own_server(monkeypatch):
    """A process that imports vLLM for this test alone, and is ended with it."""
    monkeypatch.setattr(server.Server, "current", {})
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
    return lambda number: monkeypatch.setattr(workers, "cores", lambda: number)


@pytest.fixture
def no_partition_variable(monkeypatch):
    """For tests of the command, which alone reads the variable."""
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)


@pytest.fixture(scope="session")
def config() -> dict:
    return load_config(ROOT / "data" / "glm-5.1-fp8" / "config.json")


@pytest.fixture(scope="session")
def full(config) -> Checkpoint:
    """All tensors of GLM-5.1-FP8, without data."""
    return Checkpoint.from_config(config)


@pytest.fixture(scope="session")
def config_52() -> dict:
    return load_config(ROOT / "data" / "glm-5.2-fp8" / "config.json")


@pytest.fixture(scope="session")
def tiny_config(config) -> dict:
    return reduced_config(config)


@pytest.fixture(scope="session")
def tiny(tiny_config, tmp_path_factory) -> Checkpoint:
    """A tiny GLM-5 checkpoint with real bytes in several shards."""
    return write_checkpoint(tiny_config, tmp_path_factory.mktemp("checkpoint") / "tiny")
