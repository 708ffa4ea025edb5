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

# The kit is imported from where the parent has it.
START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("glmpp", sys.argv[1])
sys.modules["glmpp"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["glmpp"])
from glmpp.engine.child import main
main(int(sys.argv[2]))
"""


# Where the child starts. `python -c` and `-m` put the working directory first on the path, and an empty or relative entry of
# PYTHONPATH leads there, too: into a stranger's files, if it is the folder that the user has just downloaded.
ELSEWHERE = "/"


# Set for the processes that a process starts, to let them use its server: the socket's address and whose code it runs.
SHARED = "GLMPP_SERVER"
PACKAGE = Path(__file__).parents[1] / "__init__.py"


class Server:
    """The process that has imported vLLM and forks for every request. One for each kernel, started on first use.

    Attributes:
        process: None for one that another process has started and shares.
    """

    current: Server | None = None

    def __init__(self, address: bytes | None = None) -> None:
        """Start one, or connect to the one at an address."""
        self.process: subprocess.Popen | None = None
        self.owner = os.getpid()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        atexit.register(self.socket.close)
        if address is None:
            self._start()
        else:
            self.socket.connect(address)

    def _start(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind("")  # Linux chooses a name that no file stands for
            listening.listen()
            self.socket.connect(listening.getsockname())
            # A session of its own: interrupting the notebook's kernel must not end it.
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(PACKAGE), str(listening.fileno())],
                cwd=ELSEWHERE,
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
            )

    @classmethod
    def running(cls) -> Server:
        server = cls.current
        if server is None or server.owner != os.getpid() or server.ended():
            server = cls.current = cls._shared() or cls()
        return server

    @classmethod
    def _shared(cls) -> Server | None:
        address, _, package = os.environ.get(SHARED, "").partition(" ")
        if package != str(PACKAGE):
            return None
        with contextlib.suppress(OSError):  # it has ended
            return cls(bytes.fromhex(address))

    @classmethod
    def share(cls) -> None:
        """Start one now, for this process and those that it starts. It ends with the last of them."""
        os.environ[SHARED] = f"{cls.running().socket.getpeername().hex()} {PACKAGE}"

    def ended(self) -> bool:
        """Whether the process is gone or on its way out. The socket tells it before anything else does."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def last_words(self, lines: int) -> str:
        """The end of what it said, complete once it has ended."""
        if self.process is None:
            return "the process that imports vLLM, which another process had started, has ended"
        self.process.wait()
        self.log.seek(0)
        return "".join(self.log.readlines()[-lines:])
