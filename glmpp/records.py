"""Records: what was found once, where and when, shown where it cannot be found again, and only to who asks the same."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError

T = TypeVar("T")
SYSTEM = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
MACHINE = SYSTEM.partition(" ")[2] + ", CPU only"


def recording() -> bool:
    """Whether what is run is recorded, by the environment."""
    return os.environ.get("GLMPP_RECORD") == "1"


def installed(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def today() -> str:
    return f"on {time.strftime('%Y-%m-%d')}"


def caption(recorded: str | None, versions: dict[str, str], *more: str) -> str:
    """One line under a result: live, or when it was recorded; with which versions, and what else has a part in it."""
    told = "; ".join([", ".join(f"{name} {value}" for name, value in versions.items()), *more])
    return f"recorded {recorded} ({told})" if recorded else f"live ({told})"


def as_text(head: dict, name: str, rows: Iterable | dict) -> str:
    """JSON of an object whose member `name`, a list or an object, has a line for each of its rows."""
    pairs = isinstance(rows, dict)
    lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()] if pairs else map(json.dumps, rows)
    start, end = "{}" if pairs else "[]"
    return f"{json.dumps(head)[:-1]}, {json.dumps(name)}: {start}\n" + ",\n".join(lines) + f"\n{end}}}"


def write(path: str | Path, head: dict, name: str, rows: Iterable | dict) -> None:
    Path(path).write_text(as_text(head, name, rows) + "\n")


def read(path: str | Path, asked: dict | None = None) -> dict:
    """A record. Raises GlmppError if it is not the answer to what is asked, see `check`."""
    content = json.loads(Path(path).read_text())
    check(path, asked or {}, content)
    return content


def decode(path: str | Path, kind: type[T]) -> T:
    """A record of a type. Raises GlmppError if it is none."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise GlmppError(f"{path}: no record of a {kind.__name__}: {error}") from None


def check(path: str | Path, asked: dict, recorded: dict) -> None:
    """Compare a question with the one that a record was made for, field by field; a record need not say all of them.

    Raises:
        GlmppError: they differ; the message says in what.
    """
    asked, recorded = (msgspec.json.decode(msgspec.json.encode(one)) for one in (asked, recorded))  # lists for tuples
    differ = [name for name in asked if name in recorded and recorded[name] != asked[name]]
    if differ:
        said = "; ".join(f"{name}: {asked[name]!r} is asked for, {recorded[name]!r} is recorded" for name in differ)
        raise GlmppError(f"{path}: the record answers another question ({said}). Without vLLM there is no other answer")


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's config, and of the names, dtypes and shapes of its tensors in their order."""
    told = [checkpoint.config, [(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
