"""Which tensors of a checkpoint the model of a rank can hold, and so is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from vllm.config import ModelConfig, get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models import utils as model_utils

from glmpp.dequant import FP8
from glmpp.formats.header import Header
from glmpp.partition import PrefixSet
from glmpp.serving.experts import expert_maps, is_not_needed
from glmpp.words import quoted, shown

MTP = ("mtp", "model.mtp", "model.mtp_layers", "model.mtp_block")  # Qwen3.5; LongCat; MiMo; ERNIE


def missing_prefixes(model: torch.nn.Module) -> list[str]:
    """PrefixSet of the model's placeholders, each ending in a dot, computed afresh.

    vLLM's own `get_pp_missing_layer_names` caches by id(model), and ids are reused.
    """
    kinds = tuple(
        getattr(model_utils, kind) for kind in ("PPMissingLayer", "StageMissingLayer") if hasattr(model_utils, kind)
    )
    return [f"{path}." for path, module in model.named_modules() if isinstance(module, kinds)]


def prefixes_before_drafter(model: torch.nn.Module, num_hidden_layers: int) -> list[str]:
    """The main model's layers, for a drafter whose own layers are numbered after them, as DeepSeek's MTP layers are."""
    found = []
    for path, module in model.named_modules():
        keys = list(module) if isinstance(module, torch.nn.ModuleDict) else []
        if keys and all(key.isdigit() for key in keys) and min(map(int, keys)) == num_hidden_layers:
            found += [f"{path}.{index}." for index in range(num_hidden_layers)]
    return found


def speculative_prefixes(model: torch.nn.Module, model_config: ModelConfig) -> list[str]:
    """The MTP layers, of which the main model has no module and skips the tensors: numbered after its own layers, or under
    a name of their own."""
    config, modules = model_config.hf_text_config, dict(model.named_modules())
    layers, more = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", 0) or 0
    lists = [p for p, m in modules.items() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    named = [] if is_drafter(model_config) else [f"{path}." for path in MTP if path not in modules]
    return [*(f"{path}.{layers + index}." for path in lists for index in range(more)), *named]


def mapped(model: torch.nn.Module) -> Callable[[str], str | None] | None:
    """How the model renames a checkpoint tensor: by its `hf_to_vllm_mapper`, then by those of parts that load themselves.

    Returns:
        name -> name in the model, or None for one that a mapper says to ignore; None if the model has no mapper.
    """
    mappers = [
        (f"{path}." if path else "", module.hf_to_vllm_mapper)
        for path, module in model.named_modules()  # outer before inner
        if getattr(module, "hf_to_vllm_mapper", None) is not None and callable(getattr(module, "load_weights", None))
    ]

    def rename(name: str) -> str | None:
        for path, mapper in mappers:
            if name.startswith(path):
                rest = mapper.apply_list([name[len(path) :]])
                if not rest:
                    return None
                name = path + rest[0]
        return name

    return rename if mappers else None


class Selection:
    """Which tensors of a checkpoint a model is handed, and the count of what it was handed.

    Attributes:
        prefixes: what is dropped, under the model's names.
        experts: path of a layer's experts -> numbers of those that this rank holds; of the others weights are dropped.
        offered: tensors that the sources' indexes list; None when a source has no index.
        nbytes, files: bytes and shards handed over.
        names, twice, quantised: of the tensors handed over, those that came more than once, the FP8 weights.
    """

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig):
        prefixes = missing_prefixes(model)
        group, text = get_pp_group(), model_config.hf_text_config
        if getattr(text, "tie_word_embeddings", False) and (group.is_first_rank or group.is_last_rank):
            # One tensor for embedding and head: a model may load the one that it has from the name of the other.
            prefixes = [prefix for prefix in prefixes if any(part.isdigit() for part in prefix.split("."))]
        self.unused: Callable[[str], bool] | None = None
        if is_drafter(model_config):
            prefixes += prefixes_before_drafter(model, getattr(text, "num_hidden_layers", 0))
            self.unused = getattr(model, "is_unused_checkpoint_weight", None)  # vLLM >= 0.32: the model says so itself
        self.prefixes = prefixes
        config = get_current_vllm_config_or_none()
        balanced = config is not None and config.parallel_config.enable_eplb  # a rank then has copies of others' experts
        self.experts = {} if balanced else expert_maps(model)
        self._speculative = PrefixSet(speculative_prefixes(model, model_config))
        self._missing, self._mapped = PrefixSet(prefixes), mapped(model)
        self.offered: int | None = 0
        self.nbytes = self.files = self.files_offered = 0
        self.names: set[str] = set()
        self.twice: list[str] = []
        self.quantised: list[str] = []

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped, as without pipeline and expert parallelism."""
        return not self.prefixes and self.unused is None and not self.experts

    def wants(self, name: str) -> bool:
        """False only for a tensor whose mapped name lies under one of the prefixes, for the weight of another rank's expert,
        and for what a drafter says it ignores."""
        place = self._mapped(name) if self._mapped else name
        if place is not None and (self._missing.cover(place) or is_not_needed(name, place, self.experts)):
            return False
        return self.unused is None or not self.unused(name)

    def skip_readahead(self, names: list[str]) -> set[str]:
        """Of names that are handed over those that the model is not expected to use: MTP layers are handed to the main
        model too, in case it knows better, but not read ahead."""
        if self._mapped is None:
            return set(self._speculative.split(names)[1])
        return {name for name in names if (place := self._mapped(name)) is None or self._speculative.cover(place)}

    def filter_names(self, names: Iterable[str]) -> list[str]:
        """Those of many names that are wanted."""
        if self._mapped is None and self.unused is None:
            here = self._missing.split(names)[0]
            return [name for name in here if not is_not_needed(name, name, self.experts)] if self.experts else here
        return list(filter(self.wants, names))

    def saw(self, weight_map: dict[str, str], files: list[str], chosen: list[str]) -> None:
        """Count a source: the tensors that its index lists (unknown without one) and its files."""
        self.offered = self.offered + len(weight_map) if weight_map and self.offered is not None else None
        self.files += len(chosen)
        self.files_offered += len(files)

    def count(self, names: list[str], header: Header, prefix: str = "") -> None:
        """Count the tensors of a shard that are handed over, all at once: one by one it would cost 10 ms a stage."""
        self.nbytes += sum(end - start for _, _, start, end in map(header.__getitem__, names))
        handed = [prefix + name for name in names] if prefix else names
        self.quantised += [name for name, read in zip(handed, names) if header[read][0] == "F8_E4M3"]
        self.twice += sorted(self.names.intersection(handed))
        self.names.update(handed)

    def counted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.nbytes += tensor.nbytes
            if name in self.names:
                self.twice.append(name)
            self.names.add(name)
            if tensor.dtype is FP8:
                self.quantised.append(name)
            yield name, tensor

    @property
    def handed(self) -> int:
        """Tensors handed over so far."""
        return len(self.names) + len(self.twice)

    def unpaired(self) -> list[str]:
        """FP8 weights that came without a scale and scales that came without a weight, each with what is missing."""
        names = self.names
        found = [
            f"{quoted(name)} came, {shown(name)}_scale_inv did not"
            for name in self.quantised
            if f"{name}_scale_inv" not in names and f"{name}_scale" not in names
        ]
        scales = (name for name in names if name.endswith((".weight_scale_inv", ".weight_scale")))
        alone = ((name, weight) for name in scales if (weight := name.rpartition("_scale")[0]) not in names)
        return found + sorted(f"{quoted(name)} came, {shown(weight)} did not" for name, weight in alone)

    def __str__(self) -> str:
        of = f" of {self.offered:,}" if self.offered else ""
        files = f" from {self.files} of {self.files_offered} files" if self.files_offered else ""
        twice = f", {len(self.twice)} of them twice, e.g. {quoted(self.twice[0])}" if self.twice else ""
        return f"{self.handed:,}{of} tensors{twice}, {self.nbytes / 1e9:.3f} GB{files}"


def is_drafter(model_config: ModelConfig) -> bool:
    return model_config.runner_type == "draft"
