"""Synthetic checkpoints of the GLM-5 family: real bytes, the same for the same seed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import quantize
from glmpp.errors import GlmppError, positive, whole
from glmpp.formats.files import exists
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.shard import MAX_SHARD_BYTES, read_shard
from glmpp.formats.tensor import TensorSpec
from glmpp.progress import progress_bar
from glmpp.words import quoted

OLD = ".replaced"  # what a folder holds for a moment, of the one whose place it takes


def synthetic_original(spec: TensorSpec, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    """The unquantised values behind a tensor of a synthetic checkpoint, float32, a function of name and seed alone.

    Norm weights are 1 + N(0, std); everything else is N(0, std), the model's `initializer_range`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
    values = torch.randn(spec.shape, generator=generator) * std
    return values + 1 if "norm" in spec.name and spec.name.endswith(".weight") else values


def write_checkpoint(
    config: dict | str | Path,
    directory: str | Path,
    seed: int = 0,
    max_shard_bytes: int = 5_000_000,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Checkpoint:
    """Write a valid, sharded, synthetic checkpoint of the GLM-5 family with properly quantised FP8 weights.

    Args:
        config: a `glm_moe_dsa` config (`reduced_config` makes a small one).
        directory: created; must not exist unless `overwrite`, and then hold nothing but a checkpoint, which is replaced.
        seed: the same seed and config give the same bytes.
        max_shard_bytes: a new shard begins when the next tensor would pass this size.

    Returns:
        The written checkpoint, read back from its headers.

    Raises:
        GlmppError: bad config, `directory` exists or holds something else, or it cannot be written (disk full). Nothing that
            looks finished is left behind: the folder appears under its name in one rename, after the last byte.
    """
    directory, plan = Path(directory), Checkpoint.from_config(config)
    seed = whole("seed", seed, -(2**63), 2**63 - 1)
    positive("max_shard_bytes", max_shard_bytes, MAX_SHARD_BYTES)
    if exists(directory) and not overwrite:
        raise GlmppError(f"{directory}: exists already; choose another folder, or --overwrite (in Python overwrite=True)")
    block = tuple((plan.config.get("quantization_config") or {}).get("weight_block_size") or (128, 128))

    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in plan.values():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes

    try:
        if overwrite:
            _check_replaceable(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(directory.parent).free) < plan.nbytes:
            raise OSError(f"it takes {plan.nbytes / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB are free")
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name[:50]}.partial-", dir=directory.parent))
    except OSError as error:
        raise GlmppError(f"{directory}: cannot be written: {error}") from None
    try:
        weight_map = {}
        for number, specs in enumerate(progress_bar(shards, "writing shards", show=progress), start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {spec.name: _synthetic_tensor(spec, plan, seed, block) for spec in specs}
            save_file(tensors, partial / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=1))
        (partial / "config.json").write_text(json.dumps(plan.config, indent=1))
        partial.chmod(0o755)
        if overwrite:
            _check_replaceable(directory)  # still
            if directory.exists():
                os.rename(directory, partial / OLD)  # fails where it is a mount point, and then it stays as it is
        try:
            os.rename(partial, directory)  # fails if somebody else's checkpoint has appeared there
        except OSError:
            if (partial / OLD).exists() and not directory.exists():
                os.rename(partial / OLD, directory)
            raise
        shutil.rmtree(directory / OLD, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise GlmppError(f"{directory}: not written, nothing is left of it: {error}") from None
        raise
    return Checkpoint.from_directory(directory)


def _check_replaceable(directory: Path) -> None:
    """Raise a GlmppError unless nothing is lost that is no checkpoint's when the folder is removed."""
    if directory.is_symlink() or (exists(directory) and not directory.is_dir()):
        raise GlmppError(f"{directory}: is no folder of its own, and is not overwritten")
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_dir() or not (path.suffix == ".safetensors" or path.name in ("config.json", INDEX_FILE)):
            found = quoted(path.name)
            raise GlmppError(f"{directory}: holds {found}, which is no part of a checkpoint; it is not overwritten")


def _synthetic_tensor(spec: TensorSpec, plan: Checkpoint, seed: int, block: tuple[int, int]) -> torch.Tensor:
    """The bytes stored under `spec.name`; weight and scale of a pair come from the same original."""
    if spec.is_scale:
        return _pair(plan[spec.name.removesuffix("_scale_inv")], seed, block)[1]
    if spec.dtype == "F8_E4M3":
        return _pair(spec, seed, block)[0]
    return synthetic_original(spec, seed).to(spec.torch_dtype)


@functools.lru_cache(maxsize=1)  # its scale is asked for next
def _pair(weight: TensorSpec, seed: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(synthetic_original(weight, seed), block)


@contextlib.contextmanager
def checkpoint_without(checkpoint: Checkpoint, *lost: str) -> Iterator[Checkpoint]:
    """A copy of a small checkpoint that lacks some tensors, in a folder of its own with an index that agrees."""
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        weight_map = {}
        for file in sorted({spec.file for spec in checkpoint.values()}):
            held = {name: tensor for name, tensor in read_shard(checkpoint.directory / file) if name not in lost}
            save_file(held, Path(folder, file), {"format": "pt"})
            weight_map.update(dict.fromkeys(held, file))
        Path(folder, INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        Path(folder, "config.json").write_text(json.dumps(checkpoint.config))
        yield Checkpoint.from_directory(folder)
