"""Forks of the server at work: the stages of a request are dealt to several, one for each core."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.messages import Begins, End, Load, Message, Ready, Refused, Request, Run, StageRequest, StageResult, World
from glmpp.dryrun.scratch import scratch
from glmpp.dryrun.server import Server
from glmpp.errors import GlmppError, KitError, positive

# Seconds that a stage may take, and vLLM's import before the first: generous, for a stage takes some on a busy machine.
TIMEOUT = 1800.0


class Fork:
    """One fork of the server at work on a request; its messages come through a pipe that closes when it ends.

    `asker` is a pipe that nothing is written into: when it closes, be it because this process is gone, the server ends it.
    """

    def __init__(self, world: World, turns: int, server: Server):
        """Start it.

        Args:
            turns: descriptor that the numbers of the runs are read from, see `_turns`; it may be shared.
        """
        self.log, self.server, self.ended, self.rest = Path(world.log), server, False, b""
        self.messages: list[Message] = []
        self.at, self.since = "the import of vLLM", time.monotonic()
        self.pipe, answer = os.pipe()
        asked, self.asker = os.pipe()
        with contextlib.suppress(OSError):  # the server has just ended: the pipe says so, too
            socket.send_fds(server.socket, [msgspec.json.encode(world)], [answer, turns, asked])
        os.close(answer)
        os.close(asked)

    def read(self) -> list[Message]:
        """The messages that have come, at least one unless the fork has ended."""
        came: list[Message] = []
        while not came:
            data = os.read(self.pipe, 1 << 20)
            if not data:
                break
            *lines, self.rest = (self.rest + data).split(b"\n")
            came = [msgspec.json.decode(line, type=Message) for line in lines]
        self.since = time.monotonic()
        for message in came:
            self.at = message.what if isinstance(message, Begins) else self.at
            self.ended = self.ended or isinstance(message, End)
        self.messages += [message for message in came if not isinstance(message, Begins)]
        return came

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        """End it if it is still at work."""
        os.close(self.pipe)
        os.close(self.asker)

    def check(self) -> None:
        """Raise a GlmppError with its last words if it ended before its work did, a KitError if the kit is to blame."""
        if self.ended:
            return
        for message in self.messages:
            if isinstance(message, Refused):
                raise (KitError if message.fault else GlmppError)(message.message, message.details)
        words = self.last_words()
        how, hint = ("broke off", ":") if words else ("was killed", ", by the system if memory ran out")
        raise GlmppError(f"the vLLM child process {how} at {self.at}{hint}", words)

    def last_words(self, lines: int = 15) -> list[str]:
        """The end of the fork's traceback, [] if it wrote none; of a fork that never began, what the server said."""
        if self.log.exists():
            said = self.log.read_text(errors="replace")
            return said[said.rfind("Traceback") :].splitlines()[-lines:] if "Traceback" in said else []
        return self.server.last_words(lines) if self.server.ended() else []


def collect(forks: Sequence[Fork], bar: tqdm | None = None, timeout: float = TIMEOUT) -> list[Message]:
    """All messages of forks that work side by side, fork by fork.

    Args:
        bar: moved on by one for each run that is done.
        timeout: seconds for each of their runs, after which all of them are ended.

    Raises:
        GlmppError: one of them broke down, was killed, or took too long. The others are ended then.
    """
    positive("timeout", timeout, 10**6)
    with selectors.DefaultSelector() as at_work:
        for fork in forks:
            at_work.register(fork.pipe, selectors.EVENT_READ, fork)
        while watched := at_work.get_map():
            slowest: Fork = min((key.data for key in watched.values()), key=lambda fork: fork.since)
            ready = at_work.select(max(0.0, slowest.since + timeout - time.monotonic()))
            if not ready:
                raise GlmppError(f"{slowest.at} was not done after {timeout:g} s, and was ended; --timeout allows more")
            for key, _ in ready:
                fork: Fork = key.data
                came = fork.read()
                if bar is not None:
                    bar.update(sum(isinstance(message, StageResult | Load) for message in came))
                if not came:
                    at_work.unregister(key.fileobj)
                    fork.check()
    for fork in forks:
        fork.check()
    return [message for fork in forks for message in fork.messages]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _folder(request: Request) -> Iterator[Path]:
    """A folder with the request in it. Yields the request's path."""
    with scratch() as folder:
        path = Path(folder, "request.json")
        path.write_bytes(msgspec.json.encode(request))
        yield path


@contextlib.contextmanager
def _stages(checkpoint: Checkpoint, request: StageRequest, runs: Sequence[Run]) -> Iterator[Path]:
    """The same for runs; the model's config lies there, too, if the checkpoint has no folder of its own."""
    with scratch() as folder:
        if checkpoint.directory is None:
            Path(folder, "config.json").write_bytes(msgspec.json.encode(checkpoint.config))
        model = str(Path(checkpoint.directory or folder).resolve())
        path = Path(folder, "request.json")
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(request, model=model, runs=list(runs))))
        yield path


def _world(path: Path, number: int, rank: int = 0, size: int = 1, tp_size: int = 1) -> World:
    """Of the fork with this number of those that work on the same request."""
    group = path.with_name("group" if size > 1 else f"group-{number}")
    return World(str(path), str(path.with_name(f"{number}.log")), str(group), rank, size, tp_size)


def _turns(numbers: Sequence[int]) -> int:
    """A pipe's reading end that gives out numbers, two bytes each, to whoever reads next, and then ends."""
    read, write = os.pipe()
    with os.fdopen(write, "wb") as end:
        end.write(array("H", numbers))
    return read


def ask(request: Request, bar: tqdm | None = None, timeout: float = TIMEOUT) -> list[Message]:
    """The messages of one fork for a request that has no runs to share. Raises GlmppError as `collect` does."""
    with _folder(request) as path:
        turns = _turns([])
        try:
            fork = Fork(_world(path, 0), turns, Server.running(request.gpu))
        finally:
            os.close(turns)
        with fork:
            return collect([fork], bar, timeout)


def run_stages(
    checkpoint: Checkpoint,
    request: StageRequest,
    runs: Sequence[Run],
    bar: tqdm | None = None,
    workers: int | None = None,
    timeout: float = TIMEOUT,
) -> list[Message]:
    """The messages for runs of stages, in the order of the runs.

    Args:
        workers: forks that share them, each taking the next one that is left; default one for each core.
        timeout: seconds for each run.

    Raises:
        GlmppError: as `collect`.
    """
    with _stages(checkpoint, request, runs) as path, contextlib.ExitStack() as started:
        # The control goes first: it has all layers and takes the longest.
        turns = _turns(sorted(range(len(runs)), key=lambda at: not runs[at].control))
        try:
            number = min(workers or cores(), max(len(runs), 1))
            server = Server.running(request.gpu)
            forks = [started.enter_context(Fork(_world(path, each), turns, server)) for each in range(number)]
        finally:
            os.close(turns)
        return _in_order(collect(forks, bar, timeout))


def run_group(
    checkpoint: Checkpoint, request: StageRequest, runs: Sequence[Run], bar: tqdm | None = None, timeout: float = TIMEOUT
) -> list[Message]:
    """The same with one fork for each rank, all joined in vLLM's process groups. There is no PP=1 control in it."""
    tp_size, size = runs[0].tp_size, runs[0].pp_size * runs[0].tp_size
    with _stages(checkpoint, request, runs) as path, contextlib.ExitStack() as started:
        forks = []
        for rank in range(size):
            turns = _turns([at for at, run in enumerate(runs) if run.stage * tp_size + run.tp_rank == rank])
            try:
                fork = Fork(_world(path, rank, rank, size, tp_size), turns, Server.running(request.gpu))
                forks.append(started.enter_context(fork))
            finally:
                os.close(turns)
        return _in_order(collect(forks, bar, timeout))


def _in_order(messages: list[Message]) -> list[Message]:
    """One `Ready`, the results in the order of the runs, every `End`."""
    ready = [message for message in messages if isinstance(message, Ready)][:1]
    results = sorted((one for one in messages if isinstance(one, StageResult)), key=lambda one: one.at)
    return ready + results + [message for message in messages if isinstance(message, End)]
