"""The parent's side of the process that imports vLLM: started once for each kernel, it forks for every request.

A notebook's kernel never imports or patches vLLM, and no request sees another's patches. The first request takes the time
of the imports, later ones do not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import site
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import quote, unquote

from glmpp.dryrun.same_user import peer_is_this_user
from glmpp.dryrun.scratch import make_scratch, remove_scratch
from glmpp.errors import GlmppError
from glmpp.gpus import CPU, default_target

# The kit is imported from where the parent has it.
START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("glmpp", sys.argv[1])
sys.modules["glmpp"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["glmpp"])
from glmpp.dryrun.child.main import main
main(int(sys.argv[2]), *sys.argv[3:5], *map(int, sys.argv[5:]))
"""


# Where the child starts. `python -c` and `-m` put the working directory first on the path, and an empty or relative entry of
# PYTHONPATH leads there, too: into a stranger's files, if it is the folder that the user has just downloaded.
ELSEWHERE = "/"


# Set for the processes that a process starts, to let them use its servers: of each its target (quoted), address, and whose
# code it runs.
SHARED = "GLMPP_SERVER"
PACKAGE = Path(__file__).parents[1] / "__init__.py"

# The child's surroundings: what a verdict needs of them. Options of Python itself would take vLLM's assertions away, or its
# docstrings; a launcher's variables would make a rank wait for others; secrets are nobody's business.
KEPT = re.compile(
    r"PATH|LD_\w+|LANG|LC_\w+|TZ|USER|LOGNAME|VIRTUAL_ENV|CONDA_PREFIX|(OMP|MKL)_\w+|VLLM_\w+|GLMPP_\w+"
    r"|PYTHON(PATH|HOME|NOUSERSITE|PYCACHEPREFIX|DONTWRITEBYTECODE|UTF8)"
)
LEFT_OUT = re.compile(
    r"VLLM_(DP_\w+|PP_LAYER_PARTITION|(CONFIGURE_)?LOGGING\w*|\w+_(ROOT|CACHE|DIR|PATH)|TRACE_\w+|DEBUG_\w+|HOST_IP|PORT)"
    r"|VLLM_(USE_MODELSCOPE|API_KEY|S3_\w+)|GLMPP_SERVER"
)


def surroundings(folder: Path) -> dict[str, str]:
    """The child's environment.

    Args:
        folder: its own: its home, and where it puts what is temporary.
    """
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name) and not LEFT_OUT.fullmatch(name)}
    users = {"PYTHONUSERBASE": site.getuserbase()} if site.ENABLE_USER_SITE else {}  # where pip puts packages without root
    return {"USER": "glmpp", **kept, **users, "HOME": str(folder), "TMPDIR": str(folder)}


class Server:
    """The process that has imported vLLM and forks for every request, started on first use.

    There is one for each kernel and target: what vLLM imports, and what it remembers of a device, depends on the platform.

    Attributes:
        current: target -> the server that pretends it.
        process: None for one that another process has started and shares.
        address: where it listens.
    """

    current: ClassVar[dict[str, Server]] = {}

    def __init__(self, target: str, address: bytes | None = None, turn: BinaryIO | None = None) -> None:
        """Start one, or connect to the one at an address.

        Args:
            turn: an open file; those that are started with it import one after another.

        Raises:
            OSError: nobody is at the address, or another user.
        """
        self.target, self.owner = target, os.getpid()
        self.process: subprocess.Popen | None = None
        if address is None:
            self._start(turn)
        else:
            self.address = address
            self.socket = self.connect()
        atexit.register(self.socket.close)

    def _start(self, turn: BinaryIO | None) -> None:
        try:
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        except OSError as error:
            raise GlmppError(f"no temporary file can be made ({error.strerror}): TMPDIR says where") from None
        folder, lock = make_scratch()  # the child's, and locked for as long as it lives
        self.folder = folder
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                listening.bind("")  # Linux chooses a name that no file stands for
                listening.listen(1024)
                self.address = listening.getsockname()
                self.socket = self.connect()  # it ends when this is closed, even while it imports
                held = [listening.fileno(), *([] if turn is None else [turn.fileno()])]
                arguments = [str(PACKAGE), str(held[0]), self.target, str(folder), *map(str, held[1:])]
                # A session of its own: interrupting the notebook's kernel must not end it.
                self.process = subprocess.Popen(
                    [sys.executable, "-c", START, *arguments],
                    cwd=ELSEWHERE,
                    env=surroundings(folder),
                    pass_fds=[*held, lock],
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=self.log,
                    start_new_session=True,
                )
        finally:
            os.close(lock)
            if self.process is None:
                remove_scratch(folder)

    def connect(self) -> socket.socket:
        """A connection to it. Raises OSError if there is none, or if it is another user's process that listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self.address)
            if not peer_is_this_user(connection):
                raise PermissionError("another user's process")
        except BaseException:
            connection.close()
            raise
        return connection

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
            name, address, package = [*entry.split(" ", 2), "", ""][:3]
            if (unquote(name), package) == (target, str(PACKAGE)):
                with contextlib.suppress(OSError, ValueError):  # it has ended, or is another user's
                    return cls(target, bytes.fromhex(address))
        return None

    @classmethod
    def share(cls, *targets: str) -> None:
        """Start servers now, for this process and those that it starts. They end with the last of them.

        They import one after another: in a new environment the first compiles what the others then find.
        """
        with tempfile.TemporaryFile() as turn:
            servers = [cls.running(target, turn) for target in targets]
        told = [(quote(each.target, safe=""), each.address.hex(), str(PACKAGE)) for each in servers]
        os.environ[SHARED] = os.pathsep.join(" ".join(each) for each in told)

    @classmethod
    def close_all(cls) -> None:
        """Leave all of them; waits for the end of those that nobody else uses, which leave nothing behind."""
        for server in cls.current.values():
            server.socket.close()
            if server.process is not None and server.owner == os.getpid():
                try:
                    server.process.wait(5)
                except subprocess.TimeoutExpired:
                    if SHARED not in os.environ:  # something in it keeps it from looking: a plugin
                        server.process.kill()
                        server.process.wait()
                        remove_scratch(server.folder)
        cls.current.clear()

    def ended(self) -> bool:
        """Whether the process is gone or on its way out. The socket tells it before anything else does."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def last_words(self, lines: int) -> list[str]:
        """The end of what it said, complete once it has ended."""
        if self.process is None:
            return ["the process that imports vLLM, which another process had started, has ended"]
        self.process.wait()
        self.log.seek(0)
        return self.log.read().splitlines()[-lines:]
