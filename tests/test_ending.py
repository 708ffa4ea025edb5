"""However the command ends, its exit code is no verdict that nobody found, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from glmpp.cli.ending import ended
from glmpp.dryrun import scratch
from glmpp.dryrun.scratch import clear_scratch, make_scratch, remove_scratch
from glmpp.errors import GlmppError, KitError

CONFIG = ROOT / "data" / "glm-5.1-fp8" / "config.json"
PLAN = [sys.executable, "-m", "glmpp", "plan", str(CONFIG), "--pp", "2"]
FULL = Path("/dev/full")


def raises(error: BaseException) -> int:
    def work() -> int:
        raise error

    return ended(work)


def came_of(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def lacks(number: int, *file: str) -> OSError:
    return OSError(number, os.strerror(number), *file)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (GlmppError("no such folder"), 2, "glmpp: no such folder\n"),
        (KeyboardInterrupt(), 130, "glmpp: interrupted\n"),
        (MemoryError(), 2, "glmpp: this machine's memory ran out\n"),
        (came_of(ImportError("x"), ImportError("failed to map segment")), 2, "glmpp: this machine's memory ran out\n"),
        (lacks(errno.ENOSPC), 2, "glmpp: what is to be said cannot be written: No space left on device\n"),
        (lacks(errno.ENOSPC, "x/y"), 2, "glmpp: x/y: No space left on device\n"),
        (lacks(errno.EACCES, "x/y"), 2, "glmpp: x/y: Permission denied\n"),
        (lacks(errno.EMFILE, "x/y"), 2, "glmpp: x/y: Too many open files\n"),
        (BrokenPipeError(), 141, ""),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "glmpp: torch cannot be imported "),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("said elsewhere"), 2, ""),
        (KitError("told"), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
        (ZeroDivisionError(), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
        (RecursionError(), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
        (FileNotFoundError(errno.ENOENT, "", "x/y"), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
        (ImportError("glmpp.x", name="glmpp.x"), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
        (AssertionError(), 3, "glmpp: a fault of glmpp, and no verdict; please report it with "),
    ],
)
def test_every_end_has_an_exit_code_and_a_line_at_most(error, code, said, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("glmpp.cli.ending._drop", lambda stream: None)
    assert raises(error) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == bool(said)
    if code == 3:
        (report,) = tmp_path.iterdir()
        assert report.name in err and (str(error) or type(error).__name__) in report.read_text()
        assert "Python 3." in report.read_text()


def test_what_the_work_says_is_the_exit_code():
    assert [ended(lambda code=code: code) for code in range(4)] == [0, 1, 2, 3]


def test_a_report_that_cannot_be_kept_is_said(capfd, monkeypatch):
    def full(*_, **__):
        raise lacks(errno.ENOSPC)

    monkeypatch.setattr("glmpp.cli.ending.tempfile.NamedTemporaryFile", full)
    assert raises(ZeroDivisionError("by nothing")) == 3
    assert "ZeroDivisionError: by nothing" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_and_its_handler_is_put_back(name, capfd):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(number, handler)
    try:

        def work() -> int:
            try:
                os.kill(os.getpid(), number)
                time.sleep(60)
            except BaseException as error:
                raise ValueError("a library makes another exception of it") from error

        assert ended(work) == 128 + number
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err.count("\n") == 1


def test_a_second_signal_while_it_cleans_up_changes_nothing(capfd):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:

        def work() -> int:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

        assert ended(work) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "glmpp: terminated\n"


def test_a_signal_that_is_ignored_stays_ignored(capfd):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nobody_reads():
    program = "import sys; from glmpp.cli.ending import ended\nsys.exit(ended(lambda: print('x' * 10**6) or 0))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.skipif(not FULL.exists(), reason="Linux has it")
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
@pytest.mark.parametrize("lines", [1, 100_000])  # written when it ends, or before
def test_what_cannot_be_written(streams, lines):
    program = f"import sys; from glmpp.cli.ending import ended\nsys.exit(ended(lambda: print('x\\n' * {lines}) or 0))"
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, full),
        )
    assert done.returncode == (2 if "stdout" in streams else 0)
    assert done.stderr in (None, b"") or b"cannot be written: No space left on device" in done.stderr
    assert not done.stderr or done.stderr.count(b"\n") == 1


def test_without_any_stream():
    program = "import os, sys; os.close(1); os.close(2)\nimport subprocess\n" + (
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    assert subprocess.run([sys.executable, "-c", program, *PLAN]).returncode == 0
    assert subprocess.run([sys.executable, "-c", program, *PLAN[:4], "nowhere"]).returncode == 2


def test_an_interrupt_while_it_imports_is_a_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time; print('imports', flush=True); time.sleep(100)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", f"{program}from glmpp.__main__ import main; main()"]
    command += ["make-checkpoint", str(CONFIG), str(tmp_path / "new")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "glmpp: interrupted\n")


# --- nothing stays ------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_what_a_killed_process_left_the_next_one_clears_and_nothing_else(temporary):
    (temporary / "glmpp.dryrun.scratch.notes").mkdir()  # somebody's own
    (temporary / "glmpp.dryrun.scratch.abcdefgh").write_text("a file")
    (temporary / "glmpp.dryrun.scratch.abcdefg1").symlink_to(temporary / "glmpp.dryrun.scratch.notes")
    program = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from glmpp.dryrun.scratch import make_scratch\n"
        "folder, lock = make_scratch(); (folder / 'held').mkdir(); print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, temporary]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        clear_scratch()
        assert (folder / "held").is_dir()  # its process lives
        process.kill()
        process.wait()
    clear_scratch()
    left = {path.name for path in temporary.iterdir()}
    assert left == {"glmpp.dryrun.scratch.notes", "glmpp.dryrun.scratch.abcdefgh", "glmpp.dryrun.scratch.abcdefg1"}


def test_nobody_takes_a_folder_that_has_just_been_made_for_a_leftover(temporary, monkeypatch):
    """Another process clears between the making of the folder and its lock, once."""
    make, times = scratch.tempfile.mkdtemp, []

    def mkdtemp(**options) -> str:
        folder = make(**options)
        if not times:
            times.append(1)
            clear_scratch()
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", mkdtemp)
    folder, lock = make_scratch()
    assert folder.is_dir() and times
    os.close(lock)


def test_a_file_that_comes_while_the_folder_is_removed_does_not_stay(temporary, monkeypatch):
    """A fork that is being ended makes its log."""
    folder, lock = make_scratch()
    remove, times = scratch.shutil.rmtree, []

    def rmtree(path: Path, **options) -> None:
        if not times:
            times.append(1)
            path = path / "nothing"
            (folder / "0.log").touch()
        remove(path, **options)

    monkeypatch.setattr(scratch.shutil, "rmtree", rmtree)
    remove_scratch(folder)
    assert not folder.exists() and times
    os.close(lock)


def test_a_temporary_folder_that_cannot_be_used_is_an_error_that_names_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(GlmppError, match=r"no temporary folder can be made \(No such file or directory\): TMPDIR"):
        make_scratch()


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("SIGTERM", "while vLLM is imported"),
        ("SIGKILL", "while vLLM is imported"),
        ("SIGTERM", "while a stage is loaded"),
    ],
)
def test_nothing_stays_when_a_signal_ends_it(tmp_path, tiny, name, when):
    pytest.importorskip("vllm")
    temporary, paths = tmp_path / "temporary", os.environ["PYTHONPATH"]
    temporary.mkdir()
    program = (
        "import sys, signal; signal.signal(2, signal.default_int_handler)\n"
        "from glmpp import __main__, dry_run, Deployment, Checkpoint\n"
        "from glmpp.dryrun.deployment import Helper\n"
        "deployment = Deployment(2, gpu='cpu', guard=Helper(sys.argv[2]))\n"
        "__main__.run = lambda arguments: dry_run(Checkpoint.from_directory(sys.argv[1]), deployment, progress=False)\n"
        "__main__.main()"
    )
    at_work = tmp_path / "at_work"
    os.mkfifo(at_work)
    says = f"import time\nopen({str(at_work)!r}, 'w').write('x')\ntime.sleep(1000)\n"
    helper = tmp_path / "helper.py"
    helper.write_text(says)
    if when == "while vLLM is imported":
        (tmp_path / "paths" / "vllm").mkdir(parents=True)
        (tmp_path / "paths" / "vllm" / "__init__.py").write_text(says)
        paths = f"{tmp_path / 'paths'}{os.pathsep}{paths}"
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": paths}
    command = [sys.executable, "-c", program, tiny.directory, f"{helper}:helper"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        with open(os.open(at_work, os.O_RDONLY | os.O_NONBLOCK)) as fifo:
            while not fifo.read(1):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        said = process.stderr.read()
    if name == "SIGKILL":
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + getattr(signal, name) and said.count("\n") == 1, said
        assert list(temporary.iterdir()) == []
    for _ in range(600):  # the process that imports vLLM ends by itself, and takes what is its own with it
        if len(list(temporary.iterdir())) <= (name == "SIGKILL"):
            break
        time.sleep(0.05)
    left = list(temporary.iterdir())
    assert len(left) <= (name == "SIGKILL") and not any((folder / "request.json").exists() for folder in left[1:])


def test_too_little_memory_for_an_import_is_told_as_that(tiny, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (400_000_000,) * 2)\n"
    command = [sys.executable, "-c", f"{limited}from glmpp.__main__ import main\nmain()"]
    command += ["make-checkpoint", tiny.directory / "config.json", tmp_path / "new"]  # imports torch
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "glmpp: this machine's memory ran out\n")


def test_no_file_is_left_open(tiny):
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "glmpp", "plan", tiny.directory, "--pp", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
