"""The project's own files agree with each other and carry nothing of the machine they were made on."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from conftest import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_installs_what_pyproject_declares():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "glmpp"
    *conda, pip = environment["dependencies"]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    python = conda[0].removeprefix("python=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    constraints, package = pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", package)[1].split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])
    assert constraints == "-c constraints.txt"
    assert f".[{','.join(extras)}]" in (ROOT / "Makefile").read_text()


def test_vllm_is_pinned_to_the_last_affected_release_on_linux_only():
    vllm = PROJECT["optional-dependencies"]["vllm"]
    assert "vllm==0.22.1; sys_platform == 'linux'" in vllm
    assert all("sys_platform == 'linux'" in requirement for requirement in vllm)


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    wanted = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    names = {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - pinned <= {"tomli"}


def tracked() -> list:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_no_path_of_a_machine_is_committed():
    pattern = re.compile(r"(?<![\w.])/(?:root|home|Users|work)/[\w.-]+")
    for path in tracked():
        if path.suffix == ".png" or not path.exists() or path.parent.name == "tests":
            continue
        assert not (match := pattern.search(path.read_text())), f"{path.name}: {match[0]}"


def test_nothing_generated_is_committed():
    assert not [path for path in tracked() if path.suffix == ".safetensors" or path.parts[-2] in ("generated", "build")]


def test_ci_runs_the_test_command_of_the_readme():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert "make test" in (ROOT / "README.md").read_text() and "make walkthrough" in (ROOT / "README.md").read_text()


def test_importing_the_kit_does_not_import_vllm():
    import sys

    program = (
        "import glmpp, glmpp.figures, glmpp.notebook, sys; sys.exit('vllm' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
