"""The parent's side of the process that imports vLLM: started once for each kernel, it forks for every request.

A notebook's kernel never imports or patches vLLM, and no request sees another's patches. The first request takes the time
of the imports, later ones do not.
"""

from __future__ import annotations

import atexit
import os
import re
import site
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

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
main(int(sys.argv[2]), *sys.argv[3:])
"""


# Where the child starts. `python -c` and `-m` put the working directory first on the path, and an empty or relative entry of
# PYTHONPATH leads there, too: into a stranger's files, if it is the folder that the user has just downloaded.
ELSEWHERE = "/"


PACKAGE = Path(__file__).parents[1] / "__init__.py"

# The child's surroundings: what a verdict needs of them. Options of Python itself would take vLLM's assertions away, or its
# docstrings; a launcher's variables would make a rank wait for others; secrets are nobody's business.
KEPT = re.compile(
    r"PATH|LD_\w+|LANG|LC_\w+|TZ|USER|LOGNAME|VIRTUAL_ENV|CONDA_PREFIX|(OMP|MKL)_\w+|VLLM_\w+|GLMPP_\w+"
    r"|PYTHON(PATH|HOME|NOUSERSITE|PYCACHEPREFIX|DONTWRITEBYTECODE|UTF8)"
)
LEFT_OUT = re.compile(
    r"VLLM_(DP_\w+|PP_LAYER_PARTITION|(CONFIGURE_)?LOGGING\w*|\w+_(ROOT|CACHE|DIR|PATH)|TRACE_\w+|DEBUG_\w+|HOST_IP|PORT)"
    r"|VLLM_(USE_MODELSCOPE|API_KEY|S3_\w+)"
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
        socket: where requests go. The process ends when this is closed, even while it imports.
    """

    current: ClassVar[dict[str, Server]] = {}

    def __init__(self, target: str) -> None:
        self.target, self.owner = target, os.getpid()
        try:
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        except OSError as error:
            raise GlmppError(f"no temporary file can be made ({error.strerror}): TMPDIR says where") from None
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.folder, lock = make_scratch()  # the child's, and locked for as long as it lives
        try:
            # A session of its own: interrupting the notebook's kernel must not end it.
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(PACKAGE), str(theirs.fileno()), target, str(self.folder)],
                cwd=ELSEWHERE,
                env=surroundings(self.folder),
                pass_fds=[theirs.fileno(), lock],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
            )
        except BaseException:
            remove_scratch(self.folder)
            raise
        finally:
            os.close(lock)
            theirs.close()
        atexit.register(self.socket.close)

    @classmethod
    def running(cls, target: str | None = None) -> Server:
        """The server of a target; for a question that no target has a part in, any that is there."""
        for server in cls.current.values():
            if target in (None, server.target) and server.owner == os.getpid() and not server.ended():
                return server
        try:
            target = target or default_target()
        except GlmppError:  # the user has to say which GPU is meant; not for such a question
            target = CPU
        cls.current[target] = cls(target)
        return cls.current[target]

    @classmethod
    def close_all(cls) -> None:
        """End all of them, and wait until nothing of them is left."""
        for server in cls.current.values():
            server.socket.close()
            if server.owner == os.getpid():
                try:
                    server.process.wait(5)
                except subprocess.TimeoutExpired:  # something in it keeps it from looking: a plugin
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
        self.process.wait()
        self.log.seek(0)
        return self.log.read().splitlines()[-lines:]
