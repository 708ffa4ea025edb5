"""The one place where the command ends: whatever happens, an exit code that says no more than is known, and a line at most.

    0  loads completely (of other commands: done)     1  does not        2  cannot tell, bad input, or this machine's fault
    3  a fault of glmpp, and no verdict               128 + n  ended by signal n; 141: nobody reads what is printed

What Python ends with by itself, 1 after an exception and 120 after an output that cannot be written, would be a verdict.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from glmpp.errors import GlmppError, KitError, chain, says_no_memory
from glmpp.serving.contract import vllm_version
from glmpp.words import printable

CANNOT_TELL, FAULT, NO_READER = 2, 3, 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 141
SAID = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal has gone"}
# What a system call says of the machine, and not of the kit that made it.
_NAMES = ("EACCES", "EAGAIN", "EDQUOT", "EFBIG", "EIO", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENFILE", "ENOMEM", "ENOSPC")
OF_THIS_MACHINE = {getattr(errno, name, None) for name in (*_NAMES, "EPERM", "EROFS", "ESTALE")} - {None}


def ended(work: Callable[[], int]) -> int:
    """Do the work; returns its exit code, or the one for how it ended."""
    came: list[int] = []
    try:
        with _signals(came):
            code = _code(work)
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        code = _told(error, came)
    return code


def _code(work: Callable[[], int]) -> int:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(AttributeError, ValueError):  # a stream of a notebook or a test
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except SystemExit as asked:  # argparse's; it has said why
        return asked.code if isinstance(asked.code, int) else CANNOT_TELL if asked.code else 0


@contextlib.contextmanager
def _signals(came: list[int]) -> Iterator[None]:
    """Let the signals that end a process interrupt it, so that it cleans up; not those that are ignored, as by nohup.

    Args:
        came: takes their numbers: a library may make another exception of it.
    """

    def raise_it(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    kept = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in SAID if hasattr(signal, name)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                kept[number] = signal.signal(number, raise_it)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _told(error: BaseException, came: list[int]) -> int:
    """The exit code for how the work ended, its line printed."""
    if came or isinstance(error, KeyboardInterrupt):
        number = came[0] if came else signal.SIGINT
        return _say(SAID[signal.Signals(number).name], 128 + number)
    if isinstance(error, BrokenPipeError):
        _drop(sys.stdout)
        _drop(sys.stderr)
        return NO_READER
    if isinstance(error, KitError):
        return _fault(str(error))
    if isinstance(error, GlmppError):
        return _say(str(error), CANNOT_TELL)
    if any(map(says_no_memory, chain(error))):
        return _say("this machine's memory ran out", CANNOT_TELL)
    if isinstance(error, OSError) and _is_of_this_machine(error):
        _drop(sys.stdout)
        if error.errno == errno.ENOENT:
            return _say(printable(f"{error.strerror}: TMPDIR says where"), CANNOT_TELL)
        what = printable(str(error.filename or "what is to be said cannot be written"))
        return _say(f"{what}: {error.strerror}", CANNOT_TELL)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in ("", "glmpp"):
        return _say(f"{error.name} cannot be imported ({error}): install glmpp again", CANNOT_TELL)
    return _fault("".join(traceback.format_exception(error)))


def _is_of_this_machine(error: OSError) -> bool:
    """Whether a call failed for what the machine is like. Of no file at all ENOENT is said for want of a temporary folder,
    or of the working directory."""
    return error.errno in OF_THIS_MACHINE or (error.errno == errno.ENOENT and error.filename is None)


def _drop(stream) -> None:
    """Let what could not be written go nowhere: Python would try again when it ends, and end with 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _say(what: str, code: int) -> int:
    """Print a line about the end."""
    if sys.stderr is not None:
        try:
            print(f"glmpp: {what}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _drop(sys.stderr)
    return code


def _fault(said: str) -> int:
    """Name a fault of the kit in one line, and keep what a report needs."""
    report = "\n".join([versions(), f"Python {platform.python_version()}, {platform.platform()}", said])
    try:
        with tempfile.NamedTemporaryFile("w", prefix="glmpp-fault-", suffix=".txt", delete=False) as file:
            file.write(f"{report}\n")
        where = f"please report it with {file.name}"
    except OSError:
        where = f"please report it with this: {printable(said.strip().splitlines()[-1])}"
    return _say(f"a fault of glmpp, and no verdict; {where}", FAULT)


def versions() -> str:
    """Of the kit, and of the vLLM whose classes it runs."""
    try:
        own = version("glmpp")
    except PackageNotFoundError:
        own = "(a checkout that is not installed)"
    return f"glmpp {own}, vLLM {vllm_version() or 'not installed'}"
