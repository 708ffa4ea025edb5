"""Faults while the kit works: the error says what happened, nothing half-written looks finished, the next run works."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.shard import read_shard
from glmpp.synthetic import write_checkpoint
from glmpp.verdict import forks
from glmpp.verdict.deployment import Deployment, Helper
from glmpp.verdict.dry_run import dry_run
from glmpp.verdict.server import Server
from glmpp.verdict.stage_report import LOADS

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
    for _ in range(100 if "GLMPP_MUTANT" in os.environ else 600):
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
    with pytest.raises(GlmppError, match=r"was killed after .*by the system if memory ran out"):
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
        "import glmpp, sys; from glmpp.verdict.server import Server\n"
        "from glmpp.verdict.deployment import Deployment, Helper\n"
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
        "import os, sys, time; from glmpp.engine.child import end_with_parent\n"
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


def process_of(handle: int) -> int:
    (line,) = (line for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines() if line.startswith("Pid:"))
    return int(line.split()[1])


class FakeFork:
    """A `Fork` of which this process is the server: the other end of its pipe, and the processes that it would have killed.

    Nothing is killed: a fault of the code under test could name any process.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.killed: list[int] = []
        monkeypatch.setattr(forks.os, "kill", lambda pid, _: self.killed.append(pid))
        monkeypatch.setattr(forks.signal, "pidfd_send_signal", lambda handle, _: self.killed.append(process_of(handle)))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            turns = forks._turns([])
            self.fork = forks.Fork(
                folder / "request.json", 0, (0, 1, 1), turns, SimpleNamespace(socket=ours, pid=os.getpid())
            )
            os.close(turns)
            _, (self.pipe, turns), *_ = socket.recv_fds(theirs, 4096, 2)
            os.close(turns)

    def says(self, pid: object) -> None:
        os.write(self.pipe, json.dumps({"kind": "pid", "pid": pid}).encode() + b"\n")
        self.fork.read()


@pytest.fixture
def fake_fork(tmp_path, monkeypatch):
    return FakeFork(tmp_path, monkeypatch)


@pytest.fixture
def sleeping():
    """Start processes that do nothing; they end with the test, and need not be killed for it."""
    started = []

    def start(**options) -> subprocess.Popen:
        started.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, **options))
        return started[-1]

    yield start
    for one in started:
        one.communicate()


@linux
@pytest.mark.parametrize("with_handles", [True, False])
def test_a_fork_that_is_at_work_is_killed(fake_fork, sleeping, monkeypatch, with_handles):
    if not with_handles:  # a Linux before 5.3
        monkeypatch.delattr(forks.os, "pidfd_open", raising=False)
    child = sleeping(pass_fds=[fake_fork.pipe])
    fake_fork.says(child.pid)
    os.close(fake_fork.pipe)
    files = len(os.listdir("/proc/self/fd"))
    fake_fork.fork.close()
    assert fake_fork.killed == [child.pid]
    assert len(os.listdir("/proc/self/fd")) == files - 1 - with_handles


@linux
@pytest.mark.parametrize("with_handles", [True, False])
@pytest.mark.parametrize("when", ["before its message is read", "after its message is read"])
def test_a_fork_that_has_gone_is_not_killed_for_its_number_may_be_anothers(
    fake_fork, sleeping, monkeypatch, when, with_handles
):
    if not with_handles:
        monkeypatch.delattr(forks.os, "pidfd_open", raising=False)
    other = sleeping()  # a fork of the same server, which has been given the number
    if when == "after its message is read":
        fake_fork.says(other.pid)
        os.close(fake_fork.pipe)
    else:
        os.write(fake_fork.pipe, json.dumps({"kind": "pid", "pid": other.pid}).encode() + b"\n")
        os.close(fake_fork.pipe)
        fake_fork.fork.read()
    fake_fork.fork.close()
    assert fake_fork.killed == [] and other.poll() is None


@linux
@pytest.mark.parametrize("pid", [-1, 0, 1, True, 1.5, "7", None, [1], "mine", "my parent's", 2**22 + 1, 10**30])
def test_no_process_is_killed_that_is_no_fork_of_the_server(fake_fork, pid):
    named = {"mine": os.getpid(), "my parent's": os.getppid()}
    fake_fork.says(named.get(pid, pid) if isinstance(pid, str) else pid)
    fake_fork.fork.close()
    os.close(fake_fork.pipe)
    assert fake_fork.killed == []


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
    assert files_then == files
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
