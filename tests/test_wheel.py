"""What an installed wheel brings into a serving process: the load format, and nothing of the rest of the kit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the kit alone, installed from a wheel; built in a copy, for building leaves files beside the source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "glmpp", source / "glmpp", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-cache", "--no-deps"]
    where = ["--python", sys.executable, "--no-build-isolation", "--target", target]
    subprocess.run([*command, *where, source], check=True)
    return target


def test_of_vllms_entry_points_it_has_the_load_format_s_alone(installed):
    (found,) = distributions(path=[str(installed)])
    entries = {(entry.group, entry.name): entry.value for entry in found.entry_points if entry.group != "console_scripts"}
    assert entries == {("vllm.general_plugins", "glmpp"): "glmpp.serving.load_format:register"}
    assert {path.parts[0] for path in found.files if path.suffix == ".py"} == {"glmpp"}


@pytest.mark.vllm
def test_a_process_with_vllms_plugins_has_the_load_format_and_nothing_of_verdicts_notebooks_or_the_platform(installed):
    pytest.importorskip("vllm")
    program = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
loader = sys.modules[type(get_model_loader(LoadConfig(load_format="glmpp"))).__module__]
print(json.dumps([loader.__name__, loader.__file__, [name for name in sys.modules if name.startswith("glmpp")]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}  # not the tests' own plugins
    environment.pop("VLLM_PLUGINS", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=installed)
    assert done.returncode == 0, done.stderr
    name, file, modules = json.loads(done.stdout.splitlines()[-1])  # after what vLLM logs
    assert name == "glmpp.serving.load_format" and Path(file).is_relative_to(installed)
    assert [
        one for one in modules if one.startswith(("glmpp.dryrun", "glmpp.layouts", "glmpp.lab", "glmpp_reference", "sweep"))
    ] == []
