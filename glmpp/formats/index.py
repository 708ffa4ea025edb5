"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Set
from pathlib import Path, PurePath

import msgspec

from glmpp.errors import GlmppError
from glmpp.formats.files import read_bytes

INDEX_FILE = "model.safetensors.index.json"


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
        weight_map = None
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise GlmppError(f"{label}: not readable as JSON: {error}") from None
    if not weight_map:
        raise GlmppError(f"{label}: is no JSON object with a 'weight_map' from tensors to files; get it again")
    return weight_map


def check_index(path: Path | str, listed: set[str], held: Set[str]) -> None:
    """Whether a shard holds what the index places in it, no more and no less.

    Raises:
        GlmppError: it does not; the message names the shard and a tensor.
    """
    if missing := sorted(listed - held):
        raise GlmppError(
            f"{path}: the index places {missing[0]!r} here ({len(missing)} such), but the shard does not hold it"
        )
    if extra := sorted(held - listed):
        raise GlmppError(f"{path}: holds {extra[0]!r} ({len(extra)} such), which the index does not place here")


def shard_path(directory: str | Path, file: str) -> Path:
    """Where a shard that an index names lies: in the folder, or, for a snapshot of the Hub's cache, among its blobs.

    Raises:
        GlmppError: the name leads out of the folder: absolute, by "..", or by a link.
    """
    directory, name = Path(directory), PurePath(file)
    leads_out = name.is_absolute() or ".." in name.parts or not name.parts or "\0" in file
    path = directory / name
    if not leads_out and (path.is_symlink() or len(name.parts) > 1):
        home = directory.resolve()
        leads_out = not path.resolve().is_relative_to(home.parent.parent if home.parent.name == "snapshots" else home)
    if leads_out:
        raise GlmppError(f"{directory}: the index names the shard {file!r}, which is not a file of this folder")
    return path


def is_numbered(file: str, listed: Collection[str]) -> bool:
    """Whether a file that an index does not name is called like the shards that it does name."""
    numbers = r"-\d+-of-\d+\.safetensors$"
    return file not in listed and any(re.sub(numbers, "", one) == re.sub(numbers, "", file) != file for one in listed)


def natural_key(file: str) -> list[str | int]:
    """Sort key that puts shard 2 before shard 10, the order in which vLLM's default loader opens shards."""
    return [int(part[:4000]) if part.isdecimal() else part for part in re.split(r"(\d+)", file)]  # int takes 4300 digits
