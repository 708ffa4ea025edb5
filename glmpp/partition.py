"""Which layers a pipeline stage holds, and who owns a tensor of the checkpoint.

The arithmetic is vLLM's (`vllm/distributed/utils.py:get_pp_indices`, `vllm/model_executor/models/utils.py`): layers are
dealt out evenly, a remainder goes to the stages before the last, `VLLM_PP_LAYER_PARTITION` overrides.
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from glmpp.checkpoint import TO_FIRST_NUMBER, Checkpoint
from glmpp.errors import GlmppError, short, whole
from glmpp.formats.config import check_config, layer_count, text_config

PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"
MAX_GPUS = 16_384  # of a layout: ten times what the largest models are served on
LAYERS = "model.layers"  # what most checkpoints call the list of layers
LLAMA_ENDS = ("model.embed_tokens.", "model.norm.", "lm_head.")  # and the parts beside it, in module order
EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "embedding", "embeddings"}
ENDS = EMBEDDINGS | {"norm", "lm_head", "ln_f", "norm_f", "final_layernorm", "final_layer_norm", "embed_out"}
OWN, OTHER_STAGE, SPECULATIVE, UNKNOWN = "own", "another stage's", "speculative layer", "unknown"
EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")  # in a tensor's name, as in `vllm/…/model_loader/ep_weight_filter.py`


def partition_layers(num_layers: int, pp_size: int, layer_counts: list[int] | str | None = None) -> list[range]:
    """The layers of each stage, first to last.

    Args:
        num_layers: main layers of the model (the MTP layer is not one of them).
        pp_size: pipeline stages. More stages than layers gives empty ranges, as in vLLM.
        layer_counts: layers per stage, as a list or as vLLM's comma-separated string; None: vLLM's even split.

    Raises:
        GlmppError: no number of layers or stages; `layer_counts` has the wrong length or sum, a negative entry, or is not
            made of numbers.
    """
    num_layers, pp_size = whole("num_layers", num_layers, 1, 2**31), whole("pp_size", pp_size, 1, MAX_GPUS)
    if layer_counts is None:
        each, left = divmod(num_layers, pp_size)
        # The remainder goes one layer each to the last stages but one, counted from the end: the last stage also
        # holds the final norm and lm_head, the first the embedding.
        counts = [each + (pp_size - 1 - left <= stage < pp_size - 1) for stage in range(pp_size)]
    else:
        counts = parse_counts(layer_counts, pp_size)
        if sum(counts) != num_layers:
            raise GlmppError(
                f"{PARTITION_VARIABLE}={short(layer_counts)} adds up to {sum(counts)} layers, the model has {num_layers}"
            )
    return [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def parse_counts(layer_counts: Sequence[int] | str, pp_size: int) -> list[int]:
    """Layers per stage as numbers, 0 included, as vLLM allows it. Raises GlmppError for each way in which they are none."""
    said = f"{PARTITION_VARIABLE}={short(layer_counts)}"
    try:
        if isinstance(layer_counts, str):
            counts = [int(entry) for entry in layer_counts.split(",")]
        elif any(isinstance(entry, bool) for entry in layer_counts):
            raise TypeError
        else:
            counts = [operator.index(entry) for entry in layer_counts]  # 6.5 and "6" are none
        if max(counts, default=0) > 2**31:
            raise ValueError
    except (TypeError, ValueError):
        raise GlmppError(f"{said}: expected {pp_size} numbers like '10,10,…'") from None
    if len(counts) != pp_size:
        raise GlmppError(f"{said} names {len(counts)} stages, there are {pp_size}")
    if (least := min(counts, default=0)) < 0:
        raise GlmppError(f"{said} gives stage {counts.index(least)} {least} layers: a stage has 0 or more")
    return counts


class PrefixSet:
    """Dot-terminated prefixes, made to be asked 100,000 times whether a name lies under one of them.

    Of nested prefixes the outer one is kept. Then at most one can cover a name, the last one that sorts before it, so
    that the time for a name does not grow with the number of prefixes.
    """

    def __init__(self, prefixes: Iterable[str]):
        self._sorted: list[str] = []
        for prefix in sorted(prefixes):
            if not (self._sorted and prefix.startswith(self._sorted[-1])):
                self._sorted.append(prefix)

    def cover(self, name: str) -> bool:
        """Whether `name` begins with one of the prefixes."""
        at = bisect_right(self._sorted, name)
        return at > 0 and name.startswith(self._sorted[at - 1])

    def split(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """The names that none of the prefixes covers, and those that one does.

        Both sorted: in a sorted list what a prefix covers is one stretch.
        """
        outside, inside, names, at = [], [], sorted(names), 0
        for prefix in self._sorted:
            start = bisect_left(names, prefix, at)
            outside += names[at:start]
            at = bisect_left(names, f"{prefix[:-1]}/", start)  # "/" is the character after "."
            inside += names[start:at]
        return outside + names[at:], inside


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: what it holds and what it misses.

    Attributes:
        rank, size: position in the pipeline group.
        layers: main layers held.
        num_layers: main layers of the whole model.
        num_nextn: MTP layers after them.
        tied: `tie_word_embeddings`: the last stage holds the embedding too and there is no lm_head in the checkpoint.
        drafter: the MTP drafter runs, on the last stage; its layers then count as that stage's own.
        layer_list: what the checkpoint calls the list of layers.
    """

    rank: int
    size: int
    layers: range
    num_layers: int
    num_nextn: int = 0
    tied: bool = False
    drafter: bool = False
    layer_list: str = LAYERS

    def whole(self) -> Stage:
        """The only stage of the same model without pipeline parallelism."""
        return replace(self, rank=0, size=1, layers=range(self.num_layers), drafter=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def owner(self, name: str) -> str:
        """Where a checkpoint tensor belongs, seen from this stage: OWN, OTHER_STAGE, SPECULATIVE or UNKNOWN."""
        return self._owner(self.part(name))

    def _owner(self, part: int | str | None) -> str:
        if part is None:
            return UNKNOWN
        if isinstance(part, int):
            if part < self.num_layers:
                return OWN if part in self.layers else OTHER_STAGE
            return OWN if self.drafter and self.is_last else SPECULATIVE
        if part.split(".")[-2] in EMBEDDINGS:
            return OWN if self.is_first or (self.tied and self.is_last) else OTHER_STAGE
        return OWN if self.is_last else OTHER_STAGE

    def part(self, name: str) -> int | str | None:
        """What a tensor belongs to, the same on every stage: a layer's number, MTP layers included, or the prefix of the
        embedding, final norm or head; None for what is none of these."""
        index = self.layer_of(name)
        if index is None:
            return self._beside(name)
        return index if index < self.num_layers + self.num_nextn else None

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to, MTP layers included; None outside the list of layers."""
        number, dot, _ = name[len(self.layer_list) + 1 :].partition(".")
        if not (dot and number.isdecimal() and len(number) < 10 and name.startswith(f"{self.layer_list}.")):
            return None
        return int(number)

    def _beside(self, name: str) -> str | None:
        """The prefix of the embedding, final norm or head that a tensor belongs to: they lie beside the list of layers, or
        beside what holds it ("lm_head." and "model.norm." for "model.layers"). None for what is none of these."""
        place = self.layer_list.split(".")[:-1]
        parts = name.split(".", len(place) + 1)
        common = next((at for at, (one, other) in enumerate(zip(place, parts)) if one != other), min(len(place), len(parts)))
        ends = (depth for depth in range(min(common, len(parts) - 1), -1, -1) if parts[depth] in ENDS)
        depth = next(ends, None)
        return None if depth is None else ".".join([*parts[: depth + 1], ""])

    def owns(self, name: str) -> bool:
        """Whether this stage loads the checkpoint tensor `name`."""
        return self.owner(name) == OWN

    def owns_part(self, part: int | str | None) -> bool:
        """The same of all tensors of a part."""
        return self._owner(part) == OWN

    def missing_prefixes(self, names: Iterable[str] | None = None) -> list[str]:
        """PrefixSet of what this stage has only placeholders for; vLLM's `pp_missing_layer_names`, in module order.

        Each ends in a dot: without it `model.layers.1` would also match `model.layers.11.…`.

        Args:
            names: of the checkpoint's tensors: they say what embedding, final norm and head are called. None: as with Llama
                if the layers are "model.layers"; otherwise nobody knows, and the layers alone are listed.
        """
        if names is None:
            names = LLAMA_ENDS if self.layer_list == LAYERS else ()
        ends = dict.fromkeys(prefix for name in names if self.layer_of(name) is None and (prefix := self._beside(name)))
        ends = [prefix for prefix in ends if not self.owns(prefix)]
        first = [prefix for prefix in ends if prefix.split(".")[-2] in EMBEDDINGS]
        layers = [f"{self.layer_list}.{index}." for index in range(self.num_layers) if index not in self.layers]
        return [*first, *layers, *(prefix for prefix in ends if prefix not in first)]

    @property
    def span(self) -> str:
        """Its layers, "3-5", or "none"."""
        return f"{self.layers[0]}-{self.layers[-1]}" if self.layers else "none"

    def __str__(self) -> str:
        return f"stage {self.rank} of {self.size} (layers {self.span})"


def make_stages(
    config: dict,
    pp_size: int,
    layer_counts: list[int] | str | None = None,
    drafter: bool = False,
    layer_list: str = LAYERS,
    num_layers: int | None = None,
) -> list[Stage]:
    """All stages of a model, from its config.json.

    Args:
        num_layers: main layers, if somebody knows it better than the config.
        layer_list: what the checkpoint calls the list of layers, see the function of that name.

    Raises:
        GlmppError: a stage would hold no layer (`pp_size` above the layer count), a bad `layer_counts`, or no layer count.
    """
    check_config(config, "config.json")
    try:
        config, num_layers = text_config(config), num_layers or layer_count(config)
    except GlmppError:
        if num_layers is None:
            raise
    pp_size = whole("pp_size", pp_size, 1, MAX_GPUS)
    if pp_size > num_layers:
        raise GlmppError(f"{pp_size} stages for {num_layers} layers: at least one stage would hold no layer")
    return [
        Stage(
            rank=rank,
            size=pp_size,
            layers=layers,
            num_layers=num_layers,
            num_nextn=config.get("num_nextn_predict_layers") or 0,
            tied=bool(config.get("tie_word_embeddings")),
            drafter=drafter,
            layer_list=layer_list,
        )
        for rank, layers in enumerate(partition_layers(num_layers, pp_size, layer_counts))
    ]


def stage_bytes(checkpoint: Checkpoint, stages: Sequence[Stage]) -> list[int]:
    """Checkpoint bytes that each stage loads. A tied embedding counts on both of its stages."""
    return [nbytes for _, nbytes in stage_sizes(checkpoint, stages)]


def stage_sizes(checkpoint: Checkpoint, stages: Sequence[Stage]) -> list[tuple[int, int]]:
    """Tensors that each stage loads, and their bytes in the checkpoint."""
    parts = part_sizes(checkpoint, stages[0])
    held = [[size for part, size in parts.items() if stage.owns_part(part)] for stage in stages]
    return [(sum(tensors for tensors, _ in sizes), sum(nbytes for _, nbytes in sizes)) for sizes in held]


def part_sizes(checkpoint: Checkpoint, stage: Stage) -> dict[int | str | None, tuple[int, int]]:
    """Each part of a model, see `Stage.part` -> its tensors, and their bytes in the checkpoint."""
    sizes = checkpoint.beginnings
    if TO_FIRST_NUMBER.match(f"{stage.layer_list}.0.")[1] != stage.layer_list:  # a list within a list
        sizes = {spec.name: (1, spec.nbytes) for spec in checkpoint.values()}
    found: dict[int | str | None, tuple[int, int]] = {}
    for name, (tensors, nbytes) in sizes.items():
        part = stage.part(name)
        so_far = found.get(part, (0, 0))
        found[part] = so_far[0] + tensors, so_far[1] + nbytes
    return found
