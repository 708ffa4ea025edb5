"""What is in a checkpoint: names, dtypes, shapes, files. No tensor data is read to answer that.

Four sources, one type: a folder of safetensors (`Checkpoint.from_directory`), a Hub repository (`Checkpoint.from_hub`), a
config.json alone (`Checkpoint.from_config`, the GLM-5 family), or a synthetic checkpoint written here (`write_checkpoint`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path, PurePath
from typing import Annotated, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from glmpp.dequant import quantize
from glmpp.errors import GlmppError
from glmpp.progress import progress_bar

INDEX_FILE = "model.safetensors.index.json"

# safetensors' dtype name -> bits of an element, torch's name for it. https://github.com/huggingface/safetensors, `Dtype`
# in tensor.rs.
_DTYPES = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),  # an element of torch's holds two
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}
TORCH_DTYPES = {name: getattr(torch, kind) for name, (_, kind) in _DTYPES.items() if hasattr(torch, kind)}


@cache
def bits(dtype: str) -> int | None:
    """Bits of an element of a safetensors dtype; None if neither the kit nor the installed library knows it.

    One that the kit does not know the library is asked about: it accepts eight elements in the right number of bytes only.
    """
    if dtype in _DTYPES:
        return _DTYPES[dtype][0]

    def fits(elements: int, size: int) -> bool:
        header = json.dumps({"a": {"dtype": dtype, "shape": [elements], "data_offsets": [0, size]}}).encode()
        try:
            deserialize(len(header).to_bytes(8, "little") + header + bytes(size))
        except SafetensorError:
            return False
        return True

    return next((size for size in range(1, 129) if fits(8, size)), None) if fits(0, 0) else None


def in_torch(dtype: str, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """torch's dtype and shape for a stored tensor; None if torch has none, and only the library can say more.

    The shapes differ for F4 alone: it is stored with a shape in elements, and torch counts pairs along the last dimension.
    """
    kind = TORCH_DTYPES.get(dtype)
    if kind is None:
        return None
    if dtype != "F4":
        return kind, shape
    return (kind, (*shape[:-1], shape[-1] // 2)) if shape and shape[-1] % 2 == 0 else None


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its name, safetensors dtype, stored shape, and the shard that holds it (None: no file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str | None = None

    @property
    def in_torch(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """torch's dtype and shape for it. Raises GlmppError if torch has no type for it."""
        if (found := in_torch(self.dtype, self.shape)) is None:
            raise GlmppError(
                f"{f'{self.file}: ' if self.file else ''}tensor {self.name!r}: torch {torch.__version__} has no type "
                f"for {self.dtype} of shape {list(self.shape)}"
            )
        return found

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.in_torch[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return self.numel * bits(self.dtype) // 8

    @property
    def is_scale(self) -> bool:
        return self.name.endswith((".weight_scale_inv", ".weight_scale"))

    def meta(self) -> torch.Tensor:
        """The tensor without its data, on the meta device."""
        dtype, shape = self.in_torch
        return torch.empty(shape, dtype=dtype, device="meta")


class Checkpoint(Mapping[str, TensorSpec]):
    """An ordered mapping name -> TensorSpec, in the order in which vLLM's default loader would meet the tensors.

    Attributes:
        config: the checkpoint's config.json as a dict.
        directory: the folder that holds the shards, or None when there are none (`from_config`, `from_hub`).
        source: where it was read from: folder, or repository with its commit; None when it was not read.
    """

    def __init__(self, specs: list[TensorSpec], config: dict, directory: Path | None = None, source: str | None = None):
        self._specs = {spec.name: spec for spec in specs}
        self.config = config
        self.directory = directory
        self.source = source or (directory and str(directory))

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({len(self):,} tensors, {self.num_parameters / 1e9:,.1f} B parameters, {self.nbytes / 1e9:,.1f} GB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(spec.nbytes for spec in self.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, the quantisation scales left out."""
        return sum(spec.numel for spec in self.values() if not spec.is_scale)

    def read(self, names: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in checkpoint order; meta tensors when the checkpoint has no files.

        Args:
            names: only these (default: all). A shard that holds none of them is not opened.

        Raises:
            GlmppError: a shard cannot be read; the message names file and tensor.
        """
        wanted = self._specs.keys() if names is None else set(names)
        specs = [spec for spec in self.values() if spec.name in wanted]
        if self.directory is None:
            yield from ((spec.name, spec.meta()) for spec in specs)
            return
        for file, held in groupby(specs, key=lambda spec: spec.file):
            yield from read_shard(self.directory / file, {spec.name for spec in held}.__contains__)

    @classmethod
    def from_directory(cls, path: str | Path) -> Checkpoint:
        """Read config.json, the index and the safetensors headers of a checkpoint folder.

        Raises:
            GlmppError: no config.json, no safetensors, a shard that the index names is missing or truncated, or index
                and headers disagree; the message names the file and a tensor.
        """
        directory = Path(path)
        config = load_config(directory)
        index_path = directory / INDEX_FILE
        if index_path.exists():
            weight_map = load_index(index_path)
        elif (directory / "model.safetensors").exists():
            weight_map = None
        else:
            raise GlmppError(f"{directory}: holds neither {INDEX_FILE} nor model.safetensors; is the download complete?")

        files = sorted(set(weight_map.values()), key=natural_key) if weight_map else ["model.safetensors"]
        specs: list[TensorSpec] = []
        listed: dict[str, set[str]] = {}
        for name, file in (weight_map or {}).items():
            listed.setdefault(file, set()).add(name)
        if stray := [path.name for path in directory.glob("*.safetensors") if _is_numbered(path.name, listed)]:
            raise GlmppError(f"{directory / min(stray)}: the index names no tensor in it; download the index again")
        for file in files:
            path = shard_path(directory, file)
            if not path.exists():
                raise GlmppError(
                    f"{path}: the shard is missing; the index places {len(listed[file])} tensors in it, "
                    f"e.g. {min(listed[file])!r}. Download it again"
                )
            with _opened(path) as shard:
                held = read_header(shard, os.fstat(shard.fileno()).st_size, str(path))
            specs += [TensorSpec(name, *held[name][:2], file) for name in sorted(held)]
            if listed:
                check_index(path, listed[file], held.keys())
        return cls(specs, config, directory)

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None, progress: bool | None = None) -> Checkpoint:
        """Read config, index and safetensors headers of a Hub repository; no weight is downloaded. See `glmpp.hub`."""
        from glmpp.hub import from_hub

        return from_hub(repo_id, revision, progress)

    @classmethod
    def from_config(cls, config: dict | str | Path) -> Checkpoint:
        """The full tensor list of a GLM-5 family checkpoint (`glm_moe_dsa`) from its config alone.

        Args:
            config: a dict, a config.json, or a folder that holds one.

        Returns:
            Specs without files, layer by layer; with `quantization_config` the linear layers are FP8 with a
            `weight_scale_inv` each, apart from `modules_to_not_convert`; the `num_nextn_predict_layers` MTP layers follow
            the main layers.

        Raises:
            GlmppError: another model type, or a field that is missing.
        """
        config = load_config(config)
        if config.get("model_type") != "glm_moe_dsa":
            raise GlmppError(
                f"from_config knows the model type 'glm_moe_dsa' only, this config says {config.get('model_type')!r}; "
                "for other models give the folder that holds the shards"
            )
        try:
            return cls(list(_glm_moe_dsa(config)), config)
        except KeyError as error:
            raise GlmppError(f"config.json has no field {error}, which the GLM-5 tensor list is built from") from None


def load_config(source: dict | str | Path) -> dict:
    """A config as a dict: from a dict, a config.json, or a folder that holds one. Raises GlmppError if it cannot."""
    if isinstance(source, dict):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise GlmppError(f"{path}: no such file")
    return parse_json(_read(path), str(path))


# Where a config says how many layers it has, as a number or by naming the kind of each (Nemotron-H: a letter each).
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types", "block_configs")
# Model types of which one field decides, whatever the others say. Source: transformers' and vLLM's configuration classes.
DECISIVE = {
    "nemotron_h": ("layers_block_type", "layer_types", "hybrid_override_pattern"),
    "longcat_flash": ("num_layers",),  # num_hidden_layers counts attention sublayers, two in each
}


def text_config(config: dict) -> dict:
    """The part of a config that describes the language model: the whole, or a nested one of a multimodal wrapper.

    Raises:
        GlmppError: no part says how many layers it has.
    """
    if _layers(config) is not None:
        return config
    for key in ("text_config", "llm_config", "language_config", "thinker_config", "decoder"):
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    raise GlmppError(
        f"config.json says none of {', '.join(LAYER_COUNTS + LAYER_LISTS)}: the layers cannot be dealt out to stages"
    )


def layer_count(config: dict) -> int:
    """Main layers of the language model. Raises GlmppError if the config does not say."""
    return _layers(text_config(config))


def _layers(config: dict) -> int | None:
    """Main layers that this part of a config itself speaks of."""
    kind = config.get("model_type")
    for key in (*(DECISIVE.get(kind, ()) if isinstance(kind, str) else ()), *LAYER_COUNTS, *LAYER_LISTS):
        value = config.get(key)
        if key in LAYER_COUNTS and isinstance(value, int):
            return value
        if key in LAYER_LISTS and isinstance(value, (list, str)) and value:
            return len(value)
    return None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def load_index(path: str | Path) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor -> file name. Raises GlmppError if it has none."""
    return parse_index(_read(Path(path)), str(path))


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


def printable(text: str) -> str:
    """Text from a checkpoint for a terminal or a page: its control characters escaped."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def parse_json(raw: bytes, label: str) -> dict:
    """A JSON object from bytes. Raises GlmppError, in which they are called `label`."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise GlmppError(f"{label}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise GlmppError(f"{label}: expected a JSON object, found {type(value).__name__}")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GlmppError(f"{path}: cannot be read: {error.strerror}") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise GlmppError(f"{path}: cannot be opened: {error.strerror}") from None


MAX_HEADER_BYTES = 100_000_000  # the library's own limit

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
            raise fail(f"the header lists {twin!r} twice")

    found, base = {}, 8 + length
    nbits: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, entry in entries.items():
        try:
            info = _ENTRY.decode(entry)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            raise fail(f"tensor {name!r} is not described by dtype, shape and data_offsets: {error}") from None
        (start, end), kind = info.data_offsets, (info.dtype, info.shape)
        if kind not in nbits:
            if (width := bits(info.dtype)) is None:
                raise GlmppError(f"{label}: tensor {name!r} has dtype {info.dtype!r}, which the safetensors library rejects")
            if math.prod(filter(None, info.shape)) >= 2**63:  # strides are 64-bit, of an empty tensor too
                raise fail(f"tensor {name!r}: the shape {info.shape} is too large")
            nbits[kind] = math.prod(info.shape) * width
        if (end - start) * 8 != nbits[kind]:
            raise fail(f"tensor {name!r}: {info.dtype} of shape {info.shape} does not have {end - start} bytes")
        found[name] = (info.dtype, info.shape, base + start, base + end)
    at = base
    for start, end, name in sorted((start, end, name) for name, (_, _, start, end) in found.items()):
        if start != at:
            raise fail(f"tensor {name!r} begins at byte {start}, the one before it ends at {at}")
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


_BATCH = 256  # views made in one go: interleaved with what a model does with them each takes half as long again


def read_shard(
    path: str | Path,
    wants: Callable[[str], bool] | None = None,
    idle: Set[str] = frozenset(),
    announce: Callable[[list[str], Header], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of one safetensors file, in the order of its names; only the wanted ones.

    The tensors are views of one private mapping of the file, made at 2 microseconds each where the library's `get_tensor`
    takes 8 to 20: with 17,000 tensors for a stage that is a third of its load time. Bytes are read when a tensor is used,
    and the kernel can drop them again.

    Args:
        wants: which names to yield; default all.
        idle: tensors that nobody is expected to use. In a shard that holds such, or unwanted ones, the kernel's own reading
            ahead is off, and each of the others is read before it is yielded.
        announce: told the names that are going to be yielded, and the header, before the first of them is.

    Raises:
        GlmppError: not a complete safetensors file, one that changed before its last tensor was taken, or a tensor of a
            dtype that torch has no type for; the message names file and tensor.
    """
    path = Path(path)
    with _opened(path) as file:
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
    sparse = (len(names) < len(specs) or not idle.isdisjoint(names)) and hasattr(mapping, "madvise")
    if sparse:
        mapping.madvise(mmap.MADV_RANDOM)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    kinds: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, int, tuple[int, ...], tuple[int, ...]]] = {}
    for kind in {specs[name][:2] for name in names}:
        if found := in_torch(*kind):
            dtype, shape = found
            typed = whole[: size // dtype.itemsize * dtype.itemsize].view(dtype)
            kinds[kind] = typed, dtype.itemsize, shape, torch.empty(shape, device="meta").stride()
    step = 1 if sparse else _BATCH
    for first in range(0, len(names), step):
        views = []
        for name in names[first : first + step]:
            stored, shape, start, end = specs[name]
            kind = kinds.get((stored, shape))
            if kind is None:
                yield from views
                views = []
                yield name, _by_library(path, name, stored)
                continue
            typed, itemsize, shape, strides = kind
            if sparse and end > start and name not in idle:
                page = start // mmap.PAGESIZE * mmap.PAGESIZE
                mapping.madvise(mmap.MADV_WILLNEED, page, end - page)
            if start % itemsize == 0:
                views.append((name, typed.as_strided(shape, strides, start // itemsize)))
                continue
            yield from views  # what follows is not aligned to its type: a copy, and no other waits beside it
            views = []
            yield name, whole[start:end].clone().view(typed.dtype).view(shape)
        yield from views
    after = os.stat(path) if path.exists() else None
    if after is None or any(getattr(before, key) != getattr(after, key) for key in ("st_ino", "st_size", "st_mtime_ns")):
        raise GlmppError(f"{path}: was replaced or changed while it was read; wait for the download to end and load again")


def _by_library(path: Path, name: str, dtype: str) -> torch.Tensor:
    """A tensor of a dtype that the kit knows no torch type for: the library may."""
    try:
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(name)
    except Exception as error:  # any: of a type that torch lacks the library makes AttributeError too
        raise GlmppError(
            f"{path}: tensor {name!r} of dtype {dtype!r} cannot be read by safetensors either: {error}"
        ) from None


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


def _is_numbered(file: str, listed: Collection[str]) -> bool:
    """Whether a file that an index does not name is called like the shards that it does name."""
    numbers = r"-\d+-of-\d+\.safetensors$"
    return file not in listed and any(re.sub(numbers, "", one) == re.sub(numbers, "", file) != file for one in listed)


def natural_key(file: str) -> list[str | int]:
    """Sort key that puts shard 2 before shard 10, the order in which vLLM's default loader opens shards."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file)]


# --- the GLM-5 family ---------------------------------------------------------------------------------------------


def _glm_moe_dsa(c: dict) -> Iterator[TensorSpec]:
    """Every tensor of a `glm_moe_dsa` checkpoint, in model order. Source: file metadata of zai-org/GLM-5.1-FP8."""
    quantization = c.get("quantization_config") or {}
    block = quantization.get("weight_block_size")
    kept = set(quantization.get("modules_to_not_convert") or ())
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[c.get("dtype", c.get("torch_dtype", "bfloat16"))]
    hidden, vocab = c["hidden_size"], c["vocab_size"]

    def linear(module: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
        if block is None or module in kept:
            yield TensorSpec(f"{module}.weight", dtype, (out_features, in_features))
        else:
            yield TensorSpec(f"{module}.weight", "F8_E4M3", (out_features, in_features))
            grid = (-(-out_features // block[0]), -(-in_features // block[1]))
            yield TensorSpec(f"{module}.weight_scale_inv", "F32", grid)

    def plain(name: str, *shape: int, dtype: str = dtype) -> Iterator[TensorSpec]:
        yield TensorSpec(name, dtype, shape)

    def mlp(module: str, width: int) -> Iterator[TensorSpec]:
        yield from linear(f"{module}.gate_proj", width, hidden)
        yield from linear(f"{module}.up_proj", width, hidden)
        yield from linear(f"{module}.down_proj", hidden, width)

    def layer(index: int) -> Iterator[TensorSpec]:
        at, heads = f"model.layers.{index}", c["num_attention_heads"]
        yield from plain(f"{at}.input_layernorm.weight", hidden)
        yield from plain(f"{at}.post_attention_layernorm.weight", hidden)
        attn = f"{at}.self_attn"
        yield from linear(f"{attn}.q_a_proj", c["q_lora_rank"], hidden)
        yield from plain(f"{attn}.q_a_layernorm.weight", c["q_lora_rank"])
        yield from linear(f"{attn}.q_b_proj", heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), c["q_lora_rank"])
        yield from linear(f"{attn}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        yield from plain(f"{attn}.kv_a_layernorm.weight", c["kv_lora_rank"])
        yield from linear(f"{attn}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        yield from linear(f"{attn}.o_proj", hidden, heads * c["v_head_dim"])
        indexer = f"{attn}.indexer"
        yield from linear(f"{indexer}.wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
        yield from linear(f"{indexer}.wk", c["index_head_dim"], hidden)
        yield from plain(f"{indexer}.weights_proj.weight", c["index_n_heads"], hidden)
        yield from plain(f"{indexer}.k_norm.weight", c["index_head_dim"])
        yield from plain(f"{indexer}.k_norm.bias", c["index_head_dim"])
        if index < c["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", c["intermediate_size"])
            return
        yield from plain(f"{at}.mlp.gate.weight", c["n_routed_experts"], hidden)
        yield from plain(f"{at}.mlp.gate.e_score_correction_bias", c["n_routed_experts"], dtype="F32")
        for expert in range(c["n_routed_experts"]):
            yield from mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
        yield from mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])

    yield from plain("model.embed_tokens.weight", vocab, hidden)
    for index in range(c["num_hidden_layers"]):
        yield from layer(index)
    for index in range(c["num_hidden_layers"], c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        yield from layer(index)
        yield from plain(f"model.layers.{index}.eh_proj.weight", hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield from plain(f"model.layers.{index}.{norm}.weight", hidden)
    yield from plain("model.norm.weight", hidden)
    if not c.get("tie_word_embeddings"):
        yield from plain("lm_head.weight", vocab, hidden)


# The smallest sizes at which the GLM-5 classes of vLLM 0.22.1 build and every block layout still occurs:
# kv_lora_rank + qk_rope_head_dim = 192 rows end in half a block, as GLM-5.1's 576 rows do.
TINY = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": [1],
}


# All of GLM-5.1's layers and experts, so all its tensor names, at dimensions of one block: 1 GB.
ALL_NAMES = {
    "num_hidden_layers": 78,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
}


def reduced_config(config: dict | str | Path, **sizes: int) -> dict:
    """A GLM-5 config with smaller dimensions and the same structure; `sizes` override the defaults in `TINY`.

    `modules_to_not_convert` is cut to the layers that remain; the MTP layer's entries follow it to its new index.
    """
    config = load_config(config)
    reduced = {**config, **TINY, **sizes}
    if "quantization_config" in config:
        old, new = config["num_hidden_layers"], reduced["num_hidden_layers"]
        template: dict[str, None] = {}
        for module in config["quantization_config"]["modules_to_not_convert"]:
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
            if match is None:
                template[module] = None
            elif int(match[1]) >= old:
                template[f"model.layers.{int(match[1]) - old + new}.{match[2]}"] = None
            elif int(match[1]) < new:
                template[module] = None
        reduced["quantization_config"] = {**config["quantization_config"], "modules_to_not_convert": list(template)}
    return reduced


# --- synthetic checkpoints ----------------------------------------------------------------------------------------


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
        directory: created; must not exist unless `overwrite`.
        seed: the same seed and config give the same bytes.
        max_shard_bytes: a new shard begins when the next tensor would pass this size.

    Returns:
        The written checkpoint, read back from its headers.

    Raises:
        GlmppError: bad config, `directory` exists, or it cannot be written (disk full). Nothing that looks finished is
            left behind: the folder appears under its name in one rename, after the last byte.
    """
    directory, plan = Path(directory), Checkpoint.from_config(config)
    if directory.exists() and not overwrite:
        raise GlmppError(f"{directory}: exists already; choose another folder or pass overwrite=True")
    block = tuple((plan.config.get("quantization_config") or {}).get("weight_block_size") or (128, 128))

    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in plan.values():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
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
            shutil.rmtree(directory, ignore_errors=True)
        os.rename(partial, directory)  # fails if somebody else's checkpoint has appeared there
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise GlmppError(f"{directory}: not written, nothing is left of it: {error}") from None
        raise
    return Checkpoint.from_directory(directory)


def _synthetic_tensor(spec: TensorSpec, plan: Checkpoint, seed: int, block: tuple[int, int]) -> torch.Tensor:
    """The bytes stored under `spec.name`; weight and scale of a pair come from the same original."""
    if spec.is_scale:
        weight = plan[spec.name.removesuffix("_scale_inv")]
        return quantize(synthetic_original(weight, seed), block)[1]
    original = synthetic_original(spec, seed)
    return quantize(original, block)[0] if spec.dtype == "F8_E4M3" else original.to(spec.torch_dtype)
