"""The tensors of one safetensors file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp.errors import GlmppError
from glmpp.formats.files import opened
from glmpp.formats.header import Header, read_header
from glmpp.formats.tensor import TensorSpec

if TYPE_CHECKING:  # it takes seconds, and names and sizes need none of it
    import torch

MAX_SHARD_BYTES = 10**15  # that a shard is ever asked to hold


def read_shard(
    path: str | Path,
    wants: Callable[[str], bool] | None = None,
    skip_readahead: Set[str] = frozenset(),
    announce: Callable[[list[str], Header], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of one safetensors file, in the order of its names; only the wanted ones.

    The tensors are views of one private mapping of the file: bytes are read when a tensor is used, and the kernel can drop
    them again. The library's `safe_open` takes 0.13 s more for a stage of GLM-5.1 (16,896 tensors), and from a cold disk
    reads 5 to 8 times the wanted bytes, as its mapping takes no advice.

    Args:
        wants: which names to yield; default all.
        skip_readahead: tensors that nobody is expected to use. In a shard that holds such, or unwanted ones, the kernel
            does not read ahead, and each of the others is read before it is yielded.
        announce: told the names that are going to be yielded, and the header, before the first of them is.

    Raises:
        GlmppError: not a complete safetensors file, one that changed before its last tensor was taken, or a tensor of a
            dtype that torch has no type for; the message names file and tensor.
    """
    import torch

    path = Path(path)
    with opened(path) as file:
        before = os.fstat(file.fileno())
        size = before.st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        specs = read_header(file, size, str(path))
        names = sorted(specs if wants is None else filter(wants, specs))  # the order of the library's keys()
        if not names:
            return
        if announce is not None:
            announce(names, specs)
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # lives as long as a tensor of it
    sparse = (len(names) < len(specs) or not skip_readahead.isdisjoint(names)) and hasattr(mapping, "madvise")
    if sparse:
        mapping.madvise(mmap.MADV_RANDOM)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    kinds: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, int, tuple[int, ...], tuple[int, ...]]] = {}
    for name in names:
        stored, shape, start, end = specs[name]
        if (kind := kinds.get((stored, shape))) is None:
            dtype, in_torch = TensorSpec(name, stored, shape, str(path)).in_torch
            typed = whole[: size // dtype.itemsize * dtype.itemsize].view(dtype)
            kind = typed, dtype.itemsize, in_torch, torch.empty(in_torch, device="meta").stride()
            kinds[stored, shape] = kind
        typed, itemsize, shape, strides = kind
        if sparse and end > start and name not in skip_readahead:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, page, end - page)
        if start % itemsize == 0:
            yield name, typed.as_strided(shape, strides, start // itemsize)
        else:  # not aligned to its type: a copy
            yield name, whole[start:end].clone().view(typed.dtype).view(shape)
    after = os.stat(path) if path.exists() else None
    if after is None or any(getattr(before, key) != getattr(after, key) for key in ("st_ino", "st_size", "st_mtime_ns")):
        raise GlmppError(f"{path}: was replaced or changed while it was read; wait for the download to end and load again")


READERS = ("safetensors", "runai_streamer", "fastsafetensors")
