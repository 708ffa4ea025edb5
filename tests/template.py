"""A process that has imported everything slow and nothing of the kit. It forks for every mutant, which then need not import
torch, pandas and matplotlib, nor what vLLM's import pulls in; vLLM itself each mutant imports anew, for its platform is the
kit's.

`python template.py` reads JSON, one value a line: first the modules to import, then [folder, test] for each mutant. A fork
runs the test with the package that lies in the folder, what pytest says goes into `folder/said`, and the exit code comes
back as a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

SERVER = "glmpp.engine.child"  # in the command that starts the dry run's server
SECONDS = 900  # for a mutant that hangs; one that does not takes a few


def preload(modules: list[str]) -> None:
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  as in the dry run's child: a grammar built for 3.6 s
    for name in modules:
        if not name.startswith(("glmpp", "vllm", "__main__")):
            with contextlib.suppress(Exception):  # one that cannot be imported by itself is left to the mutants
                importlib.import_module(name)
    own = [name for name in sys.modules if name.partition(".")[0] in ("glmpp", "vllm")]
    assert not own, f"mutants must import these themselves: {own}"
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no threads but its own"


def run_mutant(folder: str, node: str) -> None:
    """In a fork: never returns."""
    said = os.open(os.path.join(folder, "said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.alarm(SECONDS)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": folder, "GLMPP_MUTANT": folder}
    sys.path.insert(0, folder)
    Popen.spare = Spare()
    import pytest

    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", node])
    sys.stdout.flush()
    os._exit(code)  # no exit handlers: they are the template's


class Popen(subprocess.Popen):
    """In a mutant the dry run's server is not a new interpreter but the spare process; all else is as ever."""

    spare: Spare | None = None

    def __new__(cls, args, *rest, **options):
        if cls.spare is None or SERVER not in " ".join(map(str, args)):
            return super().__new__(cls)
        spare, cls.spare = cls.spare, None
        return spare.become(args, **options)


class Spare:
    """A process forked before the mutant imports anything of the kit, which waits to be told what program to be.

    It gives the dry run what that asks of a `subprocess.Popen`.
    """

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            mine.close()
            wait_to_become(theirs)
        theirs.close()
        self.socket = mine

    def become(self, args, *, stdin, stdout, stderr, pass_fds=(), start_new_session=False, env=None, cwd=None) -> Spare:
        with open(os.devnull) as nothing:
            streams = [nothing if stream == subprocess.DEVNULL else stream for stream in (stdin, stdout, stderr)]
            fds = [*(stream.fileno() for stream in streams), *pass_fds]
            numbers = [0, 1, 2, *pass_fds]
            order = [list(map(str, args)), numbers, start_new_session, dict(env or os.environ), str(cwd or os.getcwd())]
            socket.send_fds(self.socket, [json.dumps(order).encode()], fds)
        self.socket.close()
        return self

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode


def wait_to_become(orders: socket.socket) -> None:
    """In the spare process: never returns."""
    content, fds, *_ = socket.recv_fds(orders, 1_000_000, 10)
    if not content:
        os._exit(0)  # the mutant ended without
    try:
        (_, *args), numbers, new_session, environment, folder = json.loads(content)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in fds]  # out of the way of the numbers that are wanted
        for fd, number in zip(high, numbers, strict=True):
            os.dup2(fd, number)
        limit = os.sysconf("SC_OPEN_MAX")
        for low, top in zip([2, *sorted(numbers[3:])], [*sorted(numbers[3:]), limit]):
            os.closerange(low + 1, top)
        if new_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        while args[0] not in ("-c", "-m"):  # options of the interpreter
            del args[0]
        how, program, *sys.argv[1:] = args
        if how == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = "-c"
            sys.path[:0] = ["", *environment["PYTHONPATH"].split(os.pathsep)]  # as the interpreter does
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main() -> None:
    del sys.path[0]  # the tests' folder: pytest adds it behind the mutant's
    gc.disable()
    preload(json.loads(sys.stdin.readline()))
    gc.enable()
    gc.freeze()  # a mutant need not look through what it inherits
    subprocess.Popen = Popen
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_mutant(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
