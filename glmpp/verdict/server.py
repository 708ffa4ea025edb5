"""The parent's side of the process that imports vLLM: started once for each kernel, it forks for every request.

A notebook's kernel never imports or patches vLLM, and no request sees another's patches. The first request takes the time
of the imports, later ones do not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import quote, unquote

from glmpp.errors import GlmppError
from glmpp.gpus import CPU, default_target

# The kit is imported from where the parent has it.
START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("glmpp", sys.argv[1])
sys.modules["glmpp"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["glmpp"])
from glmpp.engine.child import main
main(int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
"""


# Where the child starts. `python -c` and `-m` put the working directory first on the path, and an empty or relative entry of
# PYTHONPATH leads there, too: into a stranger's files, if it is the folder that the user has just downloaded.
ELSEWHERE = "/"


# Set for the processes that a process starts, to let them use its servers: of each its target (quoted), address, process id,
# and whose code it runs.
SHARED = "GLMPP_SERVER"
PACKAGE = Path(__file__).parents[1] / "__init__.py"
FAULT = 70  # the exit code of `glmpp.engine.child` after a fault of the kit


class Server:
    """The process that has imported vLLM and forks for every request, started on first use.

    There is one for each kernel and target: what vLLM imports, and what it remembers of a device, depends on the platform.

    Attributes:
        current: target -> the server that pretends it.
        process: None for one that another process has started and shares.
        pid: its process id, whoever started it.
    """

    current: ClassVar[dict[str, Server]] = {}

    def __init__(
        self, target: str, address: bytes | None = None, turn: BinaryIO | None = None, pid: int | None = None
    ) -> None:
        """Start one, or connect to the one at an address.

        Args:
            turn: an open file; those that are started with it import one after another.
            pid: of the one at the address.
        """
        self.target = target
        self.process: subprocess.Popen | None = None
        self.owner = os.getpid()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        atexit.register(self.socket.close)
        if address is None:
            self._start(turn)
            self.pid = self.process.pid
        else:
            self.pid = pid
            self.socket.connect(address)

    def _start(self, turn: BinaryIO | None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind("")  # Linux chooses a name that no file stands for
            listening.listen()
            self.socket.connect(listening.getsockname())
            turns = [] if turn is None else [turn.fileno()]
            # A session of its own: interrupting the notebook's kernel must not end it.
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(PACKAGE), str(listening.fileno()), self.target, *map(str, turns)],
                cwd=ELSEWHERE,
                pass_fds=[listening.fileno(), *turns],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
            )

    @classmethod
    def running(cls, target: str | None = None, turn: BinaryIO | None = None) -> Server:
        """The server of a target; for a question that no target has a part in, any that is there."""
        mine = (server for server in cls.current.values() if server.owner == os.getpid() and not server.ended())
        for server in mine:
            if target in (None, server.target):
                return server
        try:
            target = target or default_target()
        except GlmppError:  # the user has to say which GPU is meant; not for such a question
            target = CPU
        cls.current[target] = cls._shared(target) or cls(target, turn=turn)
        return cls.current[target]

    @classmethod
    def _shared(cls, target: str) -> Server | None:
        for entry in os.environ.get(SHARED, "").split(os.pathsep):
            name, address, pid, package = [*entry.split(" ", 3), "", "", ""][:4]
            if (unquote(name), package) == (target, str(PACKAGE)):
                with contextlib.suppress(OSError):  # it has ended
                    return cls(target, bytes.fromhex(address), pid=int(pid))
        return None

    @classmethod
    def share(cls, *targets: str) -> None:
        """Start servers now, for this process and those that it starts. They end with the last of them.

        They import one after another: in a new environment the first compiles what the others then find.
        """
        with tempfile.TemporaryFile() as turn:
            servers = [cls.running(target, turn) for target in targets]
        told = [
            (quote(each.target, safe=""), each.socket.getpeername().hex(), str(each.pid), str(PACKAGE)) for each in servers
        ]
        addresses = [" ".join(each) for each in told]
        os.environ[SHARED] = os.pathsep.join(addresses)

    def ended(self) -> bool:
        """Whether the process is gone or on its way out. The socket tells it before anything else does."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def had_fault(self) -> bool:
        """Of one that has ended: whether a fault of the kit ended it."""
        return self.process is not None and self.process.wait() == FAULT

    def last_words(self, lines: int) -> str:
        """The end of what it said, complete once it has ended."""
        if self.process is None:
            return "the process that imports vLLM, which another process had started, has ended"
        self.process.wait()
        self.log.seek(0)
        return "".join(self.log.readlines()[-lines:])
