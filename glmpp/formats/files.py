"""Bytes and JSON from files, with errors that name them."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from glmpp.errors import GlmppError, short

MAX_CONFIG_BYTES = 10_000_000  # of a config.json; its values take thirty times as much
MAX_JSON_BYTES = 100_000_000  # the safetensors library's limit of a header; a config or an index is no longer either
_DIGITS = 1000  # of a number in JSON; Python makes no int of more than 4,300
_DEPTH = 100  # of lists and objects in each other
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
_WAITS = (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)  # whoever reads one may wait for ever, or read for ever


def opened(path: str | Path) -> BinaryIO:
    """A regular file, opened without a buffer and without waiting.

    Raises:
        GlmppError: it cannot be opened, or is no regular file: a FIFO would keep the reader waiting, a device has no end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise GlmppError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise GlmppError(f"{path}: is {_KINDS.get(kind, 'a device')}, expected a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bytes(path: str | Path, most: int = MAX_JSON_BYTES) -> bytes:
    """All of a JSON file. Raises GlmppError if it cannot be read, or has more bytes than that."""
    with io.BufferedReader(opened(path)) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(path, size, most)
        try:
            raw = file.read(most + 1)
        except OSError as error:
            raise GlmppError(f"{path}: cannot be read: {error.strerror}") from None
    _check_size(path, len(raw), most)
    return raw


def _check_size(path: str | Path, size: int, most: int) -> None:
    if size > most:
        raise GlmppError(f"{path}: has {size:,} bytes, expected a JSON file of at most {most:,}")


def exists(path: str | Path) -> bool:
    """Whether something lies there, links followed. Raises GlmppError where that cannot be told: no access, a loop of links,
    a name that is too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise GlmppError(f"{path}: cannot be looked at: {getattr(error, 'strerror', None) or error}") from None
    return True


def list_folder(directory: str | Path) -> set[str]:
    """Names of what lies in a folder that holds a model.

    Raises:
        GlmppError: it cannot be read, or holds a FIFO, a device, or a config of more than MAX_JSON_BYTES: vLLM opens files
            by their names, and would read for ever.
    """
    names = set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                names.add(entry.name)
                if entry.is_symlink() or not (entry.is_file() or entry.is_dir()) or entry.name.endswith("config.json"):
                    _check_entry(entry)
    except (OSError, ValueError) as error:
        raise GlmppError(f"{directory}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return names


def names_below(directory: str | Path) -> set[str]:
    """Paths of all files below a folder, relative to it; links to folders are not followed."""
    every = (os.path.join(place, name) for place, _, names in os.walk(directory) for name in names)
    return {os.path.relpath(path, directory).replace(os.sep, "/") for path in every}


def _check_entry(entry: os.DirEntry) -> None:
    try:
        found = entry.stat()
    except OSError:  # a link that leads nowhere: whoever opens it is told
        return
    if entry.name.endswith("config.json"):
        _check_size(entry.path, found.st_size, MAX_CONFIG_BYTES if entry.name == "config.json" else MAX_JSON_BYTES)
    if (kind := stat.S_IFMT(found.st_mode)) in _WAITS:
        raise GlmppError(f"{entry.path}: is {_KINDS.get(kind, 'a device')}; a model's folder holds files, take it away")


def parse_json(raw: bytes, label: str, once: Collection[str] | None = ()) -> dict:
    """A JSON object from bytes.

    Args:
        label: what to call them in errors.
        once: names that no object may hold twice with different values; None: all. Of others the last counts, as in vLLM.

    Raises:
        GlmppError: no JSON, no object, such a name, a number of thousands of digits, or a hundred lists in each other.
    """

    def number(digits: str) -> int:
        if len(digits) > _DIGITS:
            before = raw[: max(raw.find(digits.encode()), 0)][-100:]
            found = re.search(rb'"([^"]{1,60})"\s*:[\s\[]*$', before)
            field = repr(found[1].decode(errors="replace")) if found else "one value"
            raise ValueError(f"{field} is a number of {len(digits):,} digits, expected at most {_DIGITS:,}")
        return int(digits)

    def members(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            first: dict[str, object] = {}
            for name, value in pairs:
                if first.setdefault(name, value) != value and (once is None or name in once):
                    said = f"{short(first[name])} and {short(value)}"
                    raise ValueError(f"{name} occurs twice, as {said}: expected one value")
        return found

    try:
        value = json.loads(raw, parse_int=number, object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise GlmppError(f"{label}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise GlmppError(f"{label}: expected a JSON object, found {type(value).__name__}")
    level: list = [value]
    for _ in range(_DEPTH):
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level = [part for part in level if isinstance(part, (dict, list))]
    if level:
        raise GlmppError(f"{label}: expected at most {_DEPTH} objects and lists in each other")
    return value
