"""What is in a checkpoint: names, dtypes, shapes, files. No tensor data is read to answer that.

Three sources, one type: a folder of safetensors (`Checkpoint.from_directory`), a Hub repository (`Checkpoint.from_hub`), a
config.json alone (`Checkpoint.from_config`, the GLM-5 family).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp.errors import GlmppError
from glmpp.formats.config import check_config, counts, load_config
from glmpp.formats.files import exists, list_folder, opened
from glmpp.formats.glm5 import glm_config, glm_moe_dsa
from glmpp.formats.header import read_header
from glmpp.formats.hub import read_repository
from glmpp.formats.hub_requests import SECONDS
from glmpp.formats.index import INDEX_FILE, check_index, load_index, longest_list, natural_key, shard_path, unlisted
from glmpp.formats.shard import read_shard
from glmpp.formats.tensor import TensorSpec

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 2_000  # the published model with the most has 126


class Checkpoint(Mapping[str, TensorSpec]):
    """An ordered mapping name -> TensorSpec, in the order in which vLLM's default loader would meet the tensors.

    Attributes:
        config: the checkpoint's config.json as a dict.
        directory: the folder that holds the shards, or None when there are none (`from_config`, `from_hub`).
        source: where it was read from: folder, or repository with its commit; None when it was not read.

    Raises:
        GlmppError: a field of the config that the kit reads is not of its type, or the config speaks of far more layers or
            experts than the names do: vLLM would build them all.
    """

    def __init__(self, specs: list[TensorSpec], config: dict, directory: Path | None = None, source: str | None = None):
        self._specs = {spec.name: spec for spec in specs}
        self.config = config
        self.directory = directory
        self.source = source or (directory and str(directory))
        label = f"{self.source}/config.json" if self.source else "config.json"
        check_config(config, label)
        if found := [one for one in counts(config) if one[1] > one[2]]:
            self._check_counts(found, label)

    def _check_counts(self, found: list[tuple[str, int, int]], label: str) -> None:
        """Compare numbers of layers or experts with the names, and with the shapes of experts that are stored as one."""
        longest, largest = longest_list(self), max((size for spec in self.values() for size in spec.shape), default=0)
        for field, number, most in found:
            most = max(most, 4 * longest, largest) if "experts" in field else min(max(most, 4 * longest), MAX_LAYERS)
            if number > most:
                raise GlmppError(
                    f"{label}: {field} is {number:,}, and the longest list of modules in the tensors' names has "
                    f"{longest:,}: expected at most {most:,}"
                )

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
        files = list_folder(directory)
        config = load_config(directory)
        if INDEX_FILE in files:
            weight_map = load_index(directory / INDEX_FILE)
        elif "model.safetensors" in files:
            weight_map = None
        else:
            raise GlmppError(f"{directory}: holds neither {INDEX_FILE} nor model.safetensors; is the download complete?")

        shards = sorted(set(weight_map.values()), key=natural_key) if weight_map else ["model.safetensors"]
        specs: list[TensorSpec] = []
        listed: dict[str, set[str]] = {}
        for name, file in (weight_map or {}).items():
            listed.setdefault(file, set()).add(name)
        if stray := unlisted(files, listed):
            raise GlmppError(f"{directory / stray[0]}: the index names no tensor in it; download the index again")
        for file in shards:
            path = shard_path(directory, file)
            if not exists(path):
                raise GlmppError(
                    f"{path}: the shard is missing; the index places {len(listed[file])} tensors in it, "
                    f"e.g. {min(listed[file])!r}. Download it again"
                )
            with opened(path) as shard:
                held = read_header(shard, os.fstat(shard.fileno()).st_size, str(path))
            specs += [TensorSpec(name, *held[name][:2], file) for name in sorted(held)]
            if listed:
                check_index(path, listed[file], held.keys())
        return cls(specs, config, directory)

    @classmethod
    def from_hub(
        cls, repo_id: str, revision: str | None = None, progress: bool | None = None, seconds: float = SECONDS
    ) -> Checkpoint:
        """Read config, index and safetensors headers of a Hub repository; no weight is downloaded.

        Arguments and errors are those of `glmpp.formats.hub.read_repository`.
        """
        specs, config, source = read_repository(repo_id, revision, progress, seconds)
        return cls(specs, config, source=source)

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
            GlmppError: another model type, or a field that is missing, of another type or out of its range.
        """
        config = glm_config(config)
        return cls(list(glm_moe_dsa(config)), config)
