"""The header of a safetensors file, read and checked before any of its data. Format: https://github.com/huggingface/safetensors."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Annotated, BinaryIO

import msgspec

from glmpp.errors import GlmppError, short
from glmpp.formats.files import MAX_JSON_BYTES as MAX_HEADER_BYTES
from glmpp.formats.tensor import bits
from glmpp.words import quoted

MAX_DIMENSIONS = 64  # torch has no tensor of more
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct, gc=False):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_ENTRIES, _ENTRY = msgspec.json.Decoder(dict[str, msgspec.Raw]), msgspec.json.Decoder(_Entry)


Header = dict[str, tuple[str, tuple[int, ...], int, int]]
"""Tensor -> safetensors dtype, shape, first byte and end in the file."""


def read_header(file: BinaryIO, size: int, label: str) -> Header:
    """Read and check the header of a safetensors file, before any of its data. Format: https://github.com/huggingface/safetensors.

    Args:
        file: at its beginning; nothing past the header is read.
        size: bytes of the whole file, as the header has to account for each of them.
        label: what to call the file in errors.

    Raises:
        GlmppError: whatever the library refuses, and names that occur twice, which it does not.
    """

    def fail(why: str) -> GlmppError:
        return GlmppError(f"{label}: not a complete safetensors file ({why}); download it again")

    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise fail(f"{size} bytes, the header alone should have {length}")
    raw = file.read(length)
    try:
        entries = _ENTRIES.decode(raw) if raw.startswith(b"{") else None
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise fail(f"header is not JSON: {error}") from None
    if entries is None:
        raise fail("the header is not a JSON object")
    about = entries.pop("__metadata__", None)
    try:
        metadata = (about and msgspec.json.decode(about, type=dict[str, str] | None)) or {}
    except (ValueError, msgspec.DecodeError, RecursionError):
        raise fail("__metadata__ is not a map of strings") from None
    # Each pair of name and value has a colon. More of them: a name occurs twice, or has a colon in it.
    if raw.count(b":") != len(entries) * 4 + len(metadata) + (about is not None):
        try:
            twin = _twin(raw)
        except (ValueError, RecursionError) as error:  # stricter than the decoder: numbers of thousands of digits
            raise fail(f"header is not JSON: {error}") from None
        if twin is not None:
            raise fail(f"the header lists {quoted(twin)} twice")

    found, base = {}, 8 + length
    nbits: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, entry in entries.items():
        try:
            info = _ENTRY.decode(entry)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            raise fail(f"tensor {quoted(name)} is not described by dtype, shape and data_offsets: {error}") from None
        (start, end), kind = info.data_offsets, (info.dtype, info.shape)
        if kind not in nbits:
            if (width := bits(info.dtype)) is None:
                said = f"tensor {quoted(name)} has dtype {quoted(info.dtype)}"
                raise GlmppError(f"{label}: {said}, which is none of safetensors 0.8.0")
            if len(info.shape) > MAX_DIMENSIONS:
                raise fail(f"tensor {quoted(name)}: has {len(info.shape):,} dimensions, expected at most {MAX_DIMENSIONS}")
            if math.prod(filter(None, info.shape)) >= 2**63:  # strides are 64-bit, of an empty tensor too
                raise fail(f"tensor {quoted(name)}: the shape {short(info.shape)} is too large")
            nbits[kind] = math.prod(info.shape) * width
        if (end - start) * 8 != nbits[kind]:
            raise fail(f"tensor {quoted(name)}: {info.dtype} of shape {info.shape} does not have {end - start} bytes")
        found[name] = (info.dtype, info.shape, base + start, base + end)
    at = base
    for start, end, name in sorted((start, end, name) for name, (_, _, start, end) in found.items()):
        if start != at:
            raise fail(f"tensor {quoted(name)} begins at byte {start}, the one before it ends at {at}")
        at = end
    if at != size:
        raise fail(f"{size} bytes, the tensors end at {at}")
    return found


def _twin(raw: bytes) -> str | None:
    """A name that an object of this JSON holds twice, or None."""
    twins = []

    def count(pairs: list[tuple[str, object]]) -> None:
        if len(pairs) > len(dict(pairs)):
            twins.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)

    json.loads(raw, object_pairs_hook=count)
    return twins[0] if twins else None
