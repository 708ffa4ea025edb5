"""The project's own files agree with each other and carry nothing of the machine they were made on."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import environment
import pytest
import versions
import yaml
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sweep.cases import Sweep

from glmpp.serving import fixes

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WANTED = [Requirement(r) for r in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]
LOCK = (ROOT / "constraints.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LOCK]
# Some packages draw a line within a Python's releases.
PYTHONS = ["3.10.0", "3.10.19", "3.11.0", "3.11.14", "3.12.0", "3.12.12", "3.13.0", "3.13.9"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def marker_environment(python: str, platform: str, machine: str) -> dict[str, str]:
    return {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "implementation_version": python,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": platform,
        "platform_system": platform.title(),
        "platform_machine": machine,
        "os_name": "posix",
    }


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


def locked(where: dict[str, str]) -> dict[str, str]:
    """Version of every name there."""
    here = [pin for pin in PINS if applies(pin, where)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}
    assert len(versions) == len(here), "a name has two pins"
    return versions


def test_environment_yml_installs_what_pyproject_declares():
    conda_file = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda_file["name"] == "glmpp"
    *conda, pip = conda_file["dependencies"]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    python = conda[0].removeprefix("python=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    constraints, package = pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", package)[1].split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])
    assert constraints == "-c constraints.txt"
    assert f"EXTRAS ?= {','.join(extras)}\n" in (ROOT / "Makefile").read_text()
    assert tuple(map(int, python.split("."))) in environment.PYTHONS


def test_vllm_is_pinned_to_the_last_affected_release_on_linux_only():
    vllm = PROJECT["optional-dependencies"]["vllm"]
    assert "vllm==0.22.1; sys_platform == 'linux'" in vllm
    assert all("sys_platform == 'linux'" in requirement for requirement in vllm)


def test_the_lock_is_names_versions_and_markers_only():
    marker = r"[\w ()<>=!.']+"
    for line in LOCK:
        assert re.fullmatch(rf"[A-Za-z0-9._-]+==[\w.+!-]+( ; {marker})?", line), line
    assert len(LOCK) > 200


@pytest.mark.parametrize(("python", "platform"), list(itertools.product(PYTHONS, PLATFORMS)))
def test_the_lock_has_one_version_of_every_requirement_on_each_python_and_platform(python, platform):
    where = marker_environment(python, *platform)
    versions = locked(where)
    wanted = [requirement for requirement in WANTED if applies(requirement, where)]
    assert len(wanted) > 20
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)], prereleases=True), requirement


def test_the_lock_is_made_for_the_pythons_and_platforms_that_are_tested_here():
    named = {tuple(map(int, python.split(".")[:2])) for python in PYTHONS}
    assert named == set(environment.PYTHONS)
    assert PROJECT["requires-python"] == f">={environment.dotted(environment.PYTHONS[0])}"
    assert [f"sys_platform == '{system}' and platform_machine == '{machine}'" for system, machine in PLATFORMS] == (
        PYPROJECT["tool"]["uv"]["environments"]
    )
    assert locked(marker_environment("3.13.0", "win32", "AMD64")) == {}


def test_the_lock_pins_nothing_for_the_sake_of_venv():
    names = {canonicalize_name(pin.name) for pin in PINS}
    assert not names & {"pip", "wheel", "glmpp"}
    [build] = map(Requirement, PYPROJECT["build-system"]["requires"])
    for python, platform in itertools.product(PYTHONS, PLATFORMS):
        version = locked(marker_environment(python, *platform))["setuptools"]
        assert version in build.specifier, "a Python 3.11's venv brings 65.5.0, vLLM wants 77 or newer"


def test_the_lock_has_what_the_installed_packages_require():
    """All the way down, as the packages of this environment say it."""
    here = default_environment()
    if not (versions := locked(here)):
        pytest.skip("nothing is locked for this machine")
    todo = [requirement for requirement in WANTED if applies(requirement, here)]
    seen, checked = set(), 0
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(versions[name], prereleases=True), requirement
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            described = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # left out on purpose: EXTRAS=...
            continue
        checked += 1
        for one in map(Requirement, described):
            if any(applies(one, here | {"extra": extra}) for extra in ["", *requirement.extras]):
                todo.append(one)
    assert checked > 50


def test_a_python_without_lock_is_told_so(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 to 3\.13; .* is 3\.9"):
        environment.check_python()


def test_a_python_without_ensurepip_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=rf"apt install python3\.{sys.version_info.minor}-venv"):
        environment.check_python()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="is not an environment: left alone"):
        environment.make(tmp_path, "test")
    assert (tmp_path / "thesis.tex").exists()


def test_an_install_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fails_at_uv(command, **_):
        return subprocess.CompletedProcess(command, 1 if "-e" in command else 0)

    monkeypatch.setattr(subprocess, "run", fails_at_uv)
    with pytest.raises(SystemExit, match=r"vLLM has wheels for .* make \.\.\. EXTRAS=lab,weights,test$"):
        environment.make(tmp_path / "new", "lab,vllm,readers,weights,test")


def test_no_other_python_is_an_error_and_a_shim_is_not_taken_for_one(tmp_path, monkeypatch):
    shim = tmp_path / "python3.13"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"No Python other than .* Nothing was tested"):
        environment.other(tmp_path, "")
    with pytest.raises(SystemExit, match=r"'3\.9' is not one of those locked"):
        environment.other(tmp_path, "3.9")
    versions = tmp_path / "none" / "versions" / f"{environment.dotted(sys.version_info)}.0" / "bin"
    versions.mkdir(parents=True)
    (versions / "python3").symlink_to(Path(sys.executable).resolve())
    assert environment.other(tmp_path, environment.dotted(sys.version_info)) == str(versions / "python3")


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


def test_ci_runs_the_commands_of_the_readme_and_the_mutants():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("walkthrough", "test", "test-mutants"):
        assert re.search(rf"^make {command}$", ci, flags=re.M)
    assert "make test" in (ROOT / "README.md").read_text() and "make walkthrough" in (ROOT / "README.md").read_text()


def test_ci_leaves_out_of_the_matrix_only_what_the_test_command_has_run():
    ci = (ROOT / ".ci" / "run").read_text()
    release = re.search(r"^make test-matrix TESTED=(\S+)$", ci, flags=re.M)[1]
    assert f"\nvllm=={release} ;" in (ROOT / "constraints.txt").read_text()
    assert ci.index("export GLMPP_EVERY_CASE=1\n") < ci.index("\nmake test\n") < ci.index("make test-matrix")
    assert all(
        (ROOT / suite).exists() and suite.startswith("tests/test_") for suite in (*versions.SUITES, *versions.ON_THE_ENDS)
    )


def test_ci_runs_the_unit_tests_as_a_stranger_and_the_keyerror_on_another_python():
    assert re.search(r"^make test-python$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    makefile = (ROOT / "Makefile").read_text()
    live = re.search(r"^LIVE := (\w+)$", makefile, flags=re.M)[1]
    assert f"def {live}(" in (ROOT / "tests" / "test_vllm_dry_run.py").read_text()
    assert "$(MAKE) test-stranger test-live" in makefile


def test_a_files_tests_stay_on_one_worker(tmp_path):
    """Groups by marks were lost without a word when pytest changed under pytest-xdist."""
    pytest.importorskip("xdist")
    own = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom workers import pytest_xdist_make_scheduler\n"
    (tmp_path / "conftest.py").write_text(own)
    test = (
        "import os, pytest, time\n"
        "@pytest.mark.parametrize('n', range(20))\n"
        "def test_one(n):\n"
        "    time.sleep(0.05)\n"
        "    with open(__file__ + '.said', 'a') as file:\n"
        "        file.write(os.environ['PYTEST_XDIST_WORKER'] + chr(10))\n"
    )
    names = ["test_a.py", "test_b.py", "test_notebooks.py"]
    for name in names:
        (tmp_path / name).write_text(test)
    makefile = (ROOT / "Makefile").read_text()
    how = re.search(r"^SIDE_BY_SIDE := (.+)$", makefile, flags=re.M)[1].replace("logical", "2").split()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *how, str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    workers = [(tmp_path / f"{name}.said").read_text().split() for name in names]
    assert [len(one) for one in workers] == [20, 20, 20]
    assert [len(set(one)) for one in workers] == [1, 1, 2]


def test_importing_the_kit_does_not_import_vllm():
    program = (
        "import glmpp, glmpp.lab.figures, glmpp.lab.notebook, sys; "
        "sys.exit('vllm' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# --- findings -----------------------------------------------------------------------------------------------------

sys.path.append(str(ROOT / "tests" / "findings"))
import findings  # noqa: E402

RECORDS = sorted((ROOT / "data" / "recorded").glob(f"sweep-vllm-{findings.RELEASE}-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_row_of_the_recorded_sweep_is_a_finding_or_says_why_it_is_none(path):
    sweep = Sweep.load(path)
    cases = [case for case in sweep.counted if case.findings or case.left]
    assert len(cases) > 20 or sweep.tried > len(sweep.cases)  # of that one only what differs from another target's
    assert {(case.architecture, case.variant): unknown for case in cases if (unknown := findings.uncovered(case))} == {}


def test_every_finding_is_in_the_record():
    """What was fixed in a release does not stay in the list of the next."""
    cases = [case for path in RECORDS for case in Sweep.load(path).counted]
    for entry in findings.FINDINGS + findings.OTHERS:
        for architecture in entry.architectures:
            mine = [case for case in cases if case.architecture == architecture and entry.is_about(case)]
            places = {found.place for case in mine for found in case.findings}
            assert places & set(entry.places) or any(entry.covers(name) for case in mine for name in case.left), architecture


def test_every_finding_has_its_folder_and_every_folder_its_finding():
    folders = {path.parent.name for path in (ROOT / "upstream").glob("*/ISSUE.md")}  # stage_filter has a proposal
    assert {entry.name for entry in findings.FIXED} <= folders <= {entry.name for entry in findings.FINDINGS}
    for entry in findings.FIXED:
        fix = fixes.fix(entry.name)
        assert findings.RELEASE in fix.RELEASES and set(entry.architectures) <= set(fix.ARCHITECTURES)
    assert all(entry.why for entry in findings.OTHERS)


def test_the_page_of_findings_has_their_table():
    assert "\n".join(["|---|---|---|", *findings.table(), ""]) in (ROOT / "upstream" / "README.md").read_text()
