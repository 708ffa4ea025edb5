"""Shared fixtures: the GLM-5.1-FP8 config, a tiny one of the same structure, and a tiny checkpoint with real bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import glmpp
from glmpp.checkpoint import Checkpoint, load_config, reduced_config, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# Where the vLLM process finds a plugin of the tests, as if it were installed; see plugins/faulty.py.
PLUGINS = str(ROOT / "tests" / "plugins")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PLUGINS)))
collect_ignore = [
    "upstream",  # meant to fail on an affected release: `make test-matrix` runs it
    "lab",  # needs a browser: `make test-lab` runs it
]

# test_mutations.py runs tests against a changed copy of the package: make sure that it is the copy that is imported.
if expected := os.environ.get("GLMPP_MUTANT"):
    assert Path(glmpp.__file__).is_relative_to(expected), f"imported {glmpp.__file__}, expected the copy in {expected}"


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
