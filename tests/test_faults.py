"""Faults while the kit works: the error says what happened, nothing half-written looks finished, the next run works."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.server import Server
from glmpp.dryrun.stage_report import LOADS
from glmpp.errors import GlmppError
from glmpp.formats.shard import read_shard
from glmpp.synthetic import write_checkpoint

PATIENCE = 5 if "GLMPP_MUTANT" in os.environ else 60  # seconds for what comes at once; where it is to fail, not for long
linux = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")
CONFIG = ROOT / "data" / "glm-5.1-fp8" / "config.json"


# --- reading and writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "rewritten in place", "removed"])
def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path, how):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    tensors = read_shard(path)
    next(tensors)
    if how == "replaced":
        save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
    elif how == "removed":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        os.utime(path, ns=(1, 1))
    with pytest.raises(GlmppError, match=r"model\.safetensors: was replaced or changed while it was read"):
        list(tensors)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    """The file size limit stands in for the disk: the library's own write fails."""
    program = (
        "import resource, sys; from glmpp import reduced_config, write_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "write_checkpoint(reduced_config(sys.argv[1]), sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", program, CONFIG, tmp_path / "made"], capture_output=True, text=True)
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []
    assert f"GlmppError: {tmp_path / 'made'}: not written, nothing is left of it" in done.stderr
    assert "File too large" in done.stderr


def test_of_two_runs_that_write_the_same_folder_one_wins_and_the_other_is_told(tiny_config, tmp_path, monkeypatch):
    """The other begins and ends while the first writes its last file."""
    made, original = tmp_path / "made", Path.chmod

    def chmod(path, mode):  # the last step before it looks whether it may take another's place
        monkeypatch.setattr(Path, "chmod", original)
        write_checkpoint(tiny_config, made, seed=2)
        original(path, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    with pytest.raises(GlmppError, match=f"{made}: not written, nothing is left of it"):
        write_checkpoint(tiny_config, made, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    found = dict(Checkpoint.from_directory(made).read())
    whole = dict(write_checkpoint(tiny_config, tmp_path / "whole", seed=2).read())
    assert all(torch.equal(found[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)


@pytest.mark.parametrize("fails", ["the old one", "the new one"])
def test_a_checkpoint_whose_place_cannot_be_taken_stays(tiny_config, tmp_path, monkeypatch, fails):
    """As a mount point's."""
    made, rename = tmp_path / "made", os.rename
    held = dict(write_checkpoint(tiny_config, made, seed=1).read())

    def refuses(source, target):
        if Path(source if fails == "the old one" else target) == made and (fails == "the old one" or not made.exists()):
            monkeypatch.setattr(os, "rename", rename)
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(GlmppError, match="not written, nothing is left of it"):
        write_checkpoint(tiny_config, made, seed=2, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    found = dict(Checkpoint.from_directory(made).read())
    assert all(torch.equal(found[name].view(torch.uint8), held[name].view(torch.uint8)) for name in held)


# --- the dry run's child ------------------------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path):
    """A helper that says which process it is in and then keeps it at work: no test has to be quick to find it there."""
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time\n"
        "def helper(*_):\n"
        "    mark = pathlib.Path(__file__).with_name(f'{os.getpid()}.pid')\n"
        "    mark.touch()\n"
        "    while True: time.sleep(1)\n"
    )
    return f"{tmp_path / 'endless.py'}:helper"


def at_work(helper: str) -> int:
    """The first process that the helper says it is in."""
    while not (marks := list(Path(helper.rpartition(":")[0]).parent.glob("*.pid"))):
        time.sleep(0.05)
    return int(marks[0].stem)


def once_at_work(helper: str, then) -> threading.Thread:
    """Call `then(pid)` as soon as a fork is at work."""
    thread = threading.Thread(target=lambda: then(at_work(helper)))
    thread.start()
    return thread


def gone(pid: int) -> bool:
    """Wait until a process has ended, which it does unless the test fails; where it is to fail, not for long."""
    for _ in range(PATIENCE * 20):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def needs_vllm():
    pytest.importorskip("vllm")


@pytest.mark.vllm
def test_a_child_that_is_killed_is_an_error_that_says_so_and_the_next_run_works(needs_vllm, endless, tiny, side_by_side):
    side_by_side(1)
    killer = once_at_work(endless, lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(GlmppError, match=r"was killed at (stage \d of 2|the PP=1 control), by the system if memory ran out"):
        dry_run(tiny, Deployment(pp=2, guard=Helper(endless)), progress=False)
    killer.join()
    assert dry_run(tiny, Deployment(pp=2, guard="loader"), progress=False).loads


@pytest.mark.vllm
def test_an_interrupt_ends_the_child_and_the_next_run_works(needs_vllm, endless, tiny, interruptible):
    seen = []

    def interrupt(pid: int) -> None:
        seen.append(pid)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = once_at_work(endless, interrupt)
    with pytest.raises(KeyboardInterrupt):
        dry_run(tiny, Deployment(pp=2, guard=Helper(endless)), progress=False)
    watcher.join()
    assert gone(seen[0])
    assert dry_run(tiny, Deployment(pp=2, guard="loader"), progress=False).stages[0].verdict == LOADS


@pytest.mark.vllm
def test_no_process_stays_when_the_kernel_is_killed(needs_vllm, own_server, endless):
    program = (
        "import glmpp, sys; from glmpp.dryrun.server import Server\n"
        "from glmpp.dryrun.deployment import Deployment, Helper\n"
        "checkpoint = glmpp.Checkpoint.from_config(sys.argv[1])\n"
        "print(Server.running().process.pid, flush=True)\n"
        "glmpp.dry_run(checkpoint, Deployment(8, guard=Helper(sys.argv[2])), progress=False)"
    )
    command = [sys.executable, "-c", program, CONFIG, endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kernel:
        server = int(kernel.stdout.readline())
        fork = at_work(endless)
        kernel.kill()
    try:
        assert gone(server) and gone(fork)
    finally:
        with contextlib.suppress(ProcessLookupError):  # they are one group: what stays, as in a mutant, is not left behind
            os.killpg(server, signal.SIGKILL)


@pytest.mark.parametrize(("gone", "said"), [(False, "alive"), (True, "")])
def test_a_fork_whose_server_went_before_it_was_tied_to_it_ends(gone, said):
    program = (
        "import os, sys, time; from glmpp.dryrun.child.main import end_with_parent\n"
        "gone = bool(sys.argv[1:])\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    server = os.getpid()\n"
        "    if os.fork() == 0:\n"
        "        while gone and os.getppid() == server: time.sleep(0.01)\n"
        "        end_with_parent(server)\n"
        "        os.write(write, b'alive')\n"
        "        os._exit(0)\n"
        "    if not gone: os.wait()\n"
        "    os._exit(0)\n"
        "os.close(write)\n"
        "print(os.read(read, 10).decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, *["gone"] * gone], capture_output=True, text=True)
    assert done.stdout == f"{said}\n", done.stderr


# What the process that imports vLLM does with requests, without vLLM: the fork says that it is at work, and stays so.
SERVER = """
import os, socket, sys, time
from glmpp.dryrun.child.main import fork_for_each, watched
connection = socket.socket(fileno=int(sys.argv[1]))
def work(message, pipe, turns):
    os.write(pipe, str(os.getpid()).encode())
    if message != b"ends":
        time.sleep(1000)
with watched(connection, lambda: os._exit(7)):
    print("imports", flush=True)
    if sys.argv[2:] == ["imports"]:
        time.sleep(1000)
fork_for_each(connection, work)
print("alone", flush=True)
"""


class Served:
    """A process with `SERVER`, and the connection that keeps it."""

    def __init__(self, *arguments: str):
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-c", SERVER, str(theirs.fileno()), *arguments]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "imports\n"

    def fork(self, message: bytes = b"stays") -> tuple[int, int]:
        """The descriptor that keeps a fork, and its process."""
        (read, write), (asked, asker) = os.pipe(), os.pipe()
        socket.send_fds(self.connection, [message], [write, write, asked])
        os.close(write)
        os.close(asked)
        with os.fdopen(read, "rb", 0) as pipe:
            return asker, int(pipe.read(20))


@pytest.fixture
def served():
    started = []

    def start(*arguments: str) -> Served:
        started.append(Served(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.connection.close()
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()


@linux
def test_a_fork_ends_when_its_asker_has_gone_and_no_other_does(served):
    server = served()
    (one, first), (other, second) = server.fork(), server.fork()
    assert is_at_work(first) and is_at_work(second)
    os.close(one)
    assert gone(first) and is_at_work(second)
    os.close(other)
    assert gone(second) and server.process.poll() is None


@linux
def test_all_forks_end_with_the_connection_before_the_process_does(served):
    server = served()
    forks = [server.fork() for _ in range(3)]
    server.connection.close()
    assert server.process.stdout.read() == "alone\n"
    for asker, pid in forks:
        assert not Path(f"/proc/{pid}").exists()
        os.close(asker)


@linux
def test_a_fork_ends_with_the_process_that_it_came_from(served):
    server = served()
    asker, pid = server.fork()
    try:
        server.process.kill()
        assert gone(pid)
    finally:
        os.close(asker)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@linux
def test_a_fork_that_has_ended_by_itself_disturbs_no_other(served):
    server = served()
    ended = [server.fork(b"ends") for _ in range(3)]
    last, pid = server.fork()
    assert all(gone(one) for _, one in ended)
    for asker, _ in ended:
        os.close(asker)
    another, second = server.fork()
    assert is_at_work(pid) and is_at_work(second) and server.process.poll() is None
    os.close(last)
    os.close(another)


@linux
def test_a_process_that_imports_ends_with_its_connection(served):
    server = served("imports")
    server.connection.close()
    assert server.process.wait(PATIENCE) == 7


def is_at_work(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


# --- load ---------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_200_verdicts_in_a_row_take_no_more_memory_and_no_more_files(needs_vllm, own_server, tiny):
    def held() -> tuple[int, int, int]:
        """Resident bytes of this process and of the server, and open files of both."""
        pids = [os.getpid(), Server.running().process.pid]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return *(n * os.sysconf("SC_PAGE_SIZE") for n in pages), sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

    for _ in range(5):
        dry_run(tiny, Deployment(pp=4, guard="loader"), control=False, progress=False)
    mine, servers, files = held()
    for _ in range(50):
        report = dry_run(tiny, Deployment(pp=4, guard="loader"), control=False, progress=False)
        assert [stage.loads for stage in report.stages] == [True] * 4
    mine_then, servers_then, files_then = held()
    assert files_then < files + 10  # a leak would be one for each verdict at least; one may be on its way out
    assert mine_then - mine < 20e6 and servers_then - servers < 5e6


@pytest.mark.parametrize("shards", [1, 11, 1000])
def test_all_names_in_one_eleven_or_a_thousand_shards_are_the_same_checkpoint(full, tmp_path, shards):
    """119,028 tensors of one byte or two."""
    names = list(full)
    size = -(-len(names) // shards)
    weight_map = {}
    for number, start in enumerate(range(0, len(names), size), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        held = names[start : start + size]
        save_file({name: torch.tensor([number % 256], dtype=torch.uint8) for name in held}, tmp_path / file)
        weight_map |= dict.fromkeys(held, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(full.config))
    started = time.process_time()
    checkpoint = Checkpoint.from_directory(tmp_path)
    assert checkpoint.keys() == full.keys() and len({spec.file for spec in checkpoint.values()}) == -(-len(names) // size)
    assert sum(int(tensor) for _, tensor in checkpoint.read(names[::1000])) > 0
    assert time.process_time() - started < 30
