"""Temporary folders that go with their process, or with the next one: what was killed could not tidy up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from glmpp.errors import GlmppError

PREFIX = "glmpp.dryrun.scratch."  # and what `mkdtemp` adds: nobody else calls a folder so, and only such are removed
NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the length of the block. Raises GlmppError if there can be none."""
    folder, lock = make_scratch()
    try:
        yield folder
    finally:
        remove_scratch(folder)
        os.close(lock)


def make_scratch() -> tuple[Path, int]:
    """A folder, and the descriptor that locks it: it is somebody's for as long as one process has this open.

    Raises:
        GlmppError: the temporary folder is full, cannot be written to, or is none.
    """
    clear_scratch()
    try:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            if (lock := _locked(folder)) is not None:  # else another process has just taken it for a leftover
                return folder, lock
    except OSError as error:
        raise GlmppError(f"no temporary folder can be made ({error.strerror}): TMPDIR says where") from None


def clear_scratch() -> None:
    """Remove the folders of processes of this user that have gone."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if not NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            if entry.stat(follow_symlinks=False).st_uid == os.getuid() and (lock := _locked(Path(entry.path))) is not None:
                remove_scratch(Path(entry.path))
                os.close(lock)


def remove_scratch(folder: Path) -> None:
    """Remove such a folder, and nothing else, whatever is asked for; again, if a process that is being ended adds a file."""
    if NAME.fullmatch(folder.name):
        for pause in (0, 0.1, 0.3, 1):
            time.sleep(pause)
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break


def _locked(folder: Path) -> int | None:
    """A descriptor of the folder that holds its lock; None if somebody else has it, or if the folder has gone."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # the lock is another's, or the folder went while it was waited for
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    os.close(lock)
    return None
