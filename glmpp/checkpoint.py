"""What is in a checkpoint: names, dtypes, shapes, files. No tensor data is read to answer that.

Three sources, one type: a folder of safetensors (`Checkpoint.from_directory`), a Hub repository (`Checkpoint.from_hub`), a
config.json alone (`Checkpoint.from_config`, the GLM-5 family).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp.errors import GlmppError
from glmpp.formats.config import check_config, counts, load_config
from glmpp.formats.files import exists, list_folder, names_below, opened
from glmpp.formats.glm5 import glm_moe_dsa
from glmpp.formats.glm5_config import glm_config
from glmpp.formats.header import read_header
from glmpp.formats.hub import read_repository
from glmpp.formats.hub_requests import SECONDS
from glmpp.formats.index import load_index, longest_list, natural_key, shard_path
from glmpp.formats.shard import read_shard
from glmpp.formats.tensor import TensorSpec
from glmpp.formats.weights import MISTRALS, by_file, check_readable, missing_line, notes, weight_files
from glmpp.words import MESSAGE, shown

if TYPE_CHECKING:
    import torch

TO_FIRST_NUMBER = re.compile(r"(.+?)\.(\d{1,9})\.")
MAX_LAYERS = 2_000  # the published model with the most has 126


class Checkpoint(Mapping[str, TensorSpec]):
    """An ordered mapping name -> TensorSpec, in the order in which vLLM's default loader would meet the tensors.

    Attributes:
        config: the checkpoint's config.json as a dict.
        directory: the folder that holds the shards, or None when there are none (`from_config`, `from_hub`).
        source: where it was read from: folder, or repository with its commit; None when it was not read.
        twins: tensors of another shape or dtype under a name that a later file holds, too: vLLM hands over both.
        notes: what is to be told of the choice of files, a line each.

    Raises:
        GlmppError: a field of the config that the kit reads is not of its type, or the config speaks of far more layers or
            experts than the names do: vLLM would build them all.
    """

    def __init__(self, specs: list[TensorSpec], config: dict, directory: Path | None = None, source: str | None = None):
        self._specs: dict[str, TensorSpec] = {}
        self.twins: list[TensorSpec] = []
        self.notes: list[str] = []
        for spec in specs:
            if (earlier := self._specs.pop(spec.name, None)) and (earlier.dtype, earlier.shape) != (spec.dtype, spec.shape):
                self.twins.append(earlier)
            self._specs[spec.name] = spec
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
    def files(self) -> list[str]:
        """The files that hold the tensors, in the order in which they are read."""
        return sorted({spec.file for spec in self.values() if spec.file}, key=natural_key)

    @cached_property
    def beginnings(self) -> dict[str, tuple[int, int]]:
        """Names up to their first number ("model.layers.3."), or whole -> tensors that begin so, and their bytes.

        It takes one walk over 119,000 names; what asks for layers then needs 80.
        """
        found: dict[str, tuple[int, int]] = {}
        for name, spec in self._specs.items():
            beginning = match[0] if (match := TO_FIRST_NUMBER.match(name)) else name
            tensors, nbytes = found.get(beginning, (0, 0))
            found[beginning] = tensors + 1, nbytes + spec.nbytes
        return found

    @property
    def headline(self) -> list[str]:
        """Lines: which checkpoint, how large it is, and what is to be told of the choice of its files."""
        size = f"{len(self):,} tensors, {self.nbytes / 1e9:,.3f} GB"
        return [f"{shown(str(self.source), MESSAGE)}: {size}", *(f"    {note}" for note in self.notes)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(nbytes for _, nbytes in self.beginnings.values())

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
    def from_directory(cls, path: str | Path, judged: bool = False) -> Checkpoint:
        """Read config.json, the index and the safetensors headers of a checkpoint folder: of the files that vLLM opens.

        Args:
            judged: shards that are missing or no safetensors files are left out, and vLLM is to say what it makes of that.

        Raises:
            GlmppError: no config.json, nothing that vLLM opens, files that are no safetensors, or, unless `judged`, a shard
                that is missing or truncated; the message names the file, and a tensor that should be in it.
        """
        directory = Path(path)
        names = list_folder(directory)
        config = load_config(directory)
        found = weight_files(names | names_below(directory))
        if not judged or found.pattern != MISTRALS:
            check_readable(found, str(directory), names)
        listed = by_file(load_index(directory / found.index) if found.index else None)
        unread: dict[str, str] = {}
        for file in found.missing(listed):
            place = shard_path(directory, file)
            unread[file] = missing_line(place, listed[file], exists(place))
        specs: list[TensorSpec] = []
        held: dict[str, list[str]] = {}
        for file in found.opened(listed):
            place = shard_path(directory, file)
            if not exists(place):
                unread[file] = missing_line(place, listed[file]) if listed else f"{place}: is a link that leads nowhere"
                continue
            try:
                with opened(place) as shard:
                    header = read_header(shard, os.fstat(shard.fileno()).st_size, str(place))
            except GlmppError as error:
                if not os.access(place, os.R_OK):
                    raise
                unread[file] = error.args[0]
                continue
            held[file] = sorted(header)
            specs += [TensorSpec(name, *header[name][:2], file) for name in held[file]]
        if unread and not judged:
            first = next(iter(unread.values()))
            raise GlmppError(first if "download it again" in first else f"{first}. Download it again")
        checkpoint = cls(specs, config, directory)
        checkpoint.notes = [*unread.values(), *notes(found, listed, held)]
        return checkpoint

    @classmethod
    def from_hub(
        cls, repo_id: str, revision: str | None = None, progress: bool | None = None, seconds: float = SECONDS
    ) -> Checkpoint:
        """Read config, index and safetensors headers of a Hub repository; no weight is downloaded.

        Arguments and errors are those of `glmpp.formats.hub.read_repository`.
        """
        specs, config, source, said = read_repository(repo_id, revision, progress, seconds)
        checkpoint = cls(specs, config, source=source)
        checkpoint.notes = said
        return checkpoint

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
