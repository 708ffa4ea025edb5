"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path, PurePath

import msgspec

from glmpp.errors import GlmppError, short
from glmpp.formats.files import read_bytes
from glmpp.words import quoted

INDEX_FILE = "model.safetensors.index.json"
_LONGEST = 1000  # characters of the name of a file in the folder


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def load_index(path: str | Path) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor -> file name. Raises GlmppError if it has none."""
    return parse_index(read_bytes(Path(path)), str(path))


def parse_index(raw: bytes, label: str) -> dict[str, str]:
    """Tensor -> file name from the bytes of an index. Raises GlmppError, in which it is called `label`."""
    try:
        weight_map = msgspec.json.decode(raw, type=_Index).weight_map
    except msgspec.ValidationError:
        raise GlmppError(f"{label}: is no JSON object with a 'weight_map' from tensors to files; get it again") from None
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise GlmppError(f"{label}: not readable as JSON: {error}") from None
    if not weight_map:
        raise GlmppError(f"{label}: its weight_map names no tensor, and so vLLM opens no file; get it again")
    return weight_map


def shard_path(directory: str | Path, file: str) -> Path:
    """Where a shard that an index names lies: in the folder, or, for a snapshot of the Hub's cache, among its blobs.

    Raises:
        GlmppError: the name leads out of the folder: absolute, by "..", or by a link.
    """
    if len(file) > _LONGEST:
        raise GlmppError(f"{directory}: the index names the shard {short(file)}, a name of {len(file):,} characters")
    directory, name = Path(directory), PurePath(file)
    leads_out = name.is_absolute() or ".." in name.parts or not name.parts or "\0" in file
    path = directory / name
    if not leads_out and (os.path.islink(path) or len(name.parts) > 1):
        home, place = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
        snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
        leads_out = not place.is_relative_to(snapshots.parent if snapshots else home)
    if name.is_absolute() and "\0" not in file and os.path.realpath(name.parent) == os.path.realpath(directory):
        raise GlmppError(
            f"{directory}: the index names the shard {quoted(file)} by its whole path: vLLM finds it only where it is given "
            "the folder by that very path. Name it by its file name"
        )
    if leads_out:
        raise GlmppError(f"{directory}: the index names the shard {quoted(file)}, which is not a file of this folder")
    return path


def natural_key(file: str) -> list[str | int]:
    """Sort key that puts shard 2 before shard 10, the order in which vLLM's default loader opens shards."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,999})", file)]


def longest_list(names: Iterable[str]) -> int:
    """Modules in the longest numbered list that names speak of: 78 for "model.layers.0.…" to "model.layers.77.…"."""
    found: dict[str, set[str]] = {}
    for name in names:
        for match in islice(re.finditer(r"\.(\d{1,9})(?=\.)", name), 4):
            found.setdefault(name[: match.start()], set()).add(match[1])
    return max(map(len, found.values()), default=0)
