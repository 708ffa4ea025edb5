"""Who asks the process that has imported vLLM, and its forks, each of which lives no longer than who asked for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from glmpp.dryrun.same_user import peer_is_this_user


class Clients:
    """Who is connected, and the forks that are at work for them.

    A connection is a client's own, which keeps this process alive, or a fork's, which is ended when it is closed: be it that
    the client has what it wants, has waited long enough, or is gone.
    """

    def __init__(self, descriptor: int):
        self.listening, self.server, self.forks = socket.socket(fileno=descriptor), os.getpid(), {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listening, selectors.EVENT_READ)
        self.accept()

    def accept(self) -> socket.socket | None:
        client, _ = self.listening.accept()
        if not peer_is_this_user(client):
            return client.close()
        self.selector.register(client, selectors.EVENT_READ)
        return client

    @contextlib.contextmanager
    def watched(self, alone: Callable[[], None]) -> Iterator[None]:
        """Call a function when the last client goes. No thread is left after the block."""
        read, write = os.pipe()

        def watch() -> None:
            poll, here = select.poll(), set(self.selector.get_map()) - {self.listening.fileno()}
            for descriptor in here:
                poll.register(descriptor, 0)  # a hang-up is always told
            poll.register(self.listening, select.POLLIN)
            poll.register(read, select.POLLIN)
            while here:
                for descriptor, _ in poll.poll():
                    if descriptor == read:
                        return
                    if descriptor in here:
                        poll.unregister(descriptor)
                        here.remove(descriptor)
                    elif client := self.accept():
                        poll.register(client, 0)
                        here.add(client.fileno())
            alone()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.write(write, b"x")
            thread.join()
            os.close(read)
            os.close(write)

    def requests(self) -> Iterator[tuple[socket.socket, bytes, list[int]]]:
        """Connection, message and descriptors of each request, until the last connection is closed."""
        while len(self.selector.get_map()) > 1:
            for key, _ in self.selector.select():
                self.reap()
                if key.fileobj is self.listening:
                    self.accept()
                elif found := self.received(key.fileobj):
                    yield key.fileobj, *found

    def received(self, client: socket.socket) -> tuple[bytes, list[int]] | None:
        """What came on a connection; None if it was closed, and then its fork is ended."""
        try:
            message, descriptors, *_ = socket.recv_fds(client, 65536, 2)
        except OSError:
            message, descriptors = b"", []
        if message:
            return message, descriptors
        self.selector.unregister(client)
        client.close()
        if (pid := self.forks.pop(client, None)) is not None:  # it is not reaped yet: the number is its own
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return None

    def reap(self) -> None:
        """Let go of forks that have ended by themselves."""
        for client, pid in list(self.forks.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.forks[client]

    def fork(self, client: socket.socket) -> bool:
        """Whether this is the fork, which has none of the connections."""
        pid = os.fork()
        if pid:
            self.forks[client] = pid
            return False
        end_with_parent(self.server)
        for other in list(self.selector.get_map().values()):
            other.fileobj.close()
        return True


def end_with_parent(parent: int) -> None:
    """Let the kernel of the system end this process with the server, which ends with the kernel of the notebook.

    Args:
        parent: the server's process id, as it was before the fork: what had gone until now is told to nobody.
    """
    with contextlib.suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
