"""What a load left at init, sorted: expected, lost under another name, not tied, or absent from the checkpoint.

The load format and the dry run ask the same two questions of the writes that were seen: `dropped` and `left`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from difflib import SequenceMatcher
from math import prod

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from glmpp.checkpoint import Checkpoint
from glmpp.engine.experts import expert_maps, expert_numbers, held_experts, is_elsewhere
from glmpp.engine.left_at_init import accounted
from glmpp.engine.padding import padding
from glmpp.engine.selection import mapped, missing_prefixes, speculative_prefixes
from glmpp.engine.writes import WriteRecorder, loadable
from glmpp.formats.index import shard_path
from glmpp.formats.shard import read_shard
from glmpp.ledger import ABSENT, EXPECTED, LOST, UNTIED, Left, digest
from glmpp.partition import Prefixes

LAYER = re.compile(r"[^.]+\.\d+(?=\.)")  # "layers.3"
SCALE = re.compile(r"_scale(_inv)?$")
SHOWN_EXPERTS = 16
COMPUTED = "computed while the model is built"
DROPPED = "{!r}, of the same layer and shape, was handed over and dropped"
NOT_TIED = "tie_word_embeddings is true, and the model does not tie it to the embedding"
WRONG_PLACE = "one part of it was written more than once, and another never"
NOTHING_LIKE_IT = "no tensor that it could be was handed over and dropped"


def left(recorder: WriteRecorder, model: torch.nn.Module, model_config: ModelConfig) -> dict[str, Left]:
    """What a load left at init, and what became of it, from the writes that were seen."""
    found = recorder.left_at_init(padding(model))
    if not found:
        return {}
    sorted_out = losses(found, model, model_config, dropped(recorder, model), recorder.overwritten)
    return {name: _partly(name, one, recorder, model) for name, one in sorted_out.items()}


def _partly(name: str, one: Left, recorder: WriteRecorder, model: torch.nn.Module) -> Left:
    """The same, of a parameter that was written in part with how much is lacking, and of stacked experts with which."""
    tally, path = recorder.tallies()[name], name.rpartition(".")[0]
    filled = int(tally.filled.sum())
    if one.kind == EXPECTED or not 0 < filled < tally.size:
        return one
    said = f"{tally.size - filled:,} of {tally.size:,} elements were never written"
    if "experts" in path:
        rows, count = recorder.unwritten_rows(name), loadable(model)[name].shape[0]
        numbers = expert_numbers(model.get_submodule(path), count)
        which = ", ".join(str(numbers[at]) for at in rows[:SHOWN_EXPERTS])
        more = f" and {len(rows) - SHOWN_EXPERTS:,} more" if len(rows) > SHOWN_EXPERTS else ""
        said += f", those of {len(rows):,} of {count:,} experts: {which}{more}" if 0 < len(rows) < count else ""
    return replace(one, why=f"{said}; {one.why}")


def dropped(recorder: WriteRecorder, model: torch.nn.Module) -> dict[str, torch.Size]:
    """Tensors that were handed over and left no trace in the model -> shape.

    A weight and its scale may be kept until both have come, and stored as one: what the second half writes is the first
    half's trace, too, if it is where the first would have to be. Where weight and scale are parameters of their own, it
    is not: what a scale writes is no weight then, and the other way round.
    """
    turns, stored, rename = {name: turn for turn, name in enumerate(recorder.order)}, recorder.stored, mapped(model)
    shapes, parameters = dict(zip(recorder.order, recorder.shapes)), loadable(model)
    scaled = {name.rpartition(".")[0] for name in parameters if "scale" in name.rpartition(".")[2]}
    halves = sorted((turns[name], name) for name in stored if re.search(r"\.weight(_scale)?", name))
    second = {SCALE.sub("", name): name for _, name in halves}
    lasts = {name: second.get(SCALE.sub("", name)) for name in shapes.keys() - stored}
    traces = recorder.traces({last for last in lasts.values() if last is not None})

    def is_in(first: str, last: str) -> bool:
        place = (rename(first) if rename else first) or first
        if place in parameters:
            return place in traces[last]
        more = prod(shapes[last]) if SCALE.search(last) else 0  # what a scale writes for itself is no weight
        into = [(*name.rpartition(".")[::2], count) for name, count in traces[last].items()]
        return any(count > more and "scale" not in leaf and path not in scaled for path, leaf, count in into)

    found = {}
    for name, last in lasts.items():
        if last is None or turns[name] > turns[last] or not is_in(name, last):
            found[name] = shapes[name]
    return found


def losses(
    left: Iterable[str],
    model: torch.nn.Module,
    model_config: ModelConfig,
    dropped: Mapping[str, Sequence[int]],
    overwritten: Set[str],
) -> dict[str, Left]:
    """Parameter or buffer that was left at init -> what became of it. Of buffers only those that the checkpoint has.

    A dropped tensor is taken for a parameter's if it is of the same layer and shape, the one with the nearest name.

    Args:
        dropped: tensors that were handed over and left no trace in this stage's model -> shape, as stored. Those of
            other stages, of other ranks' experts and of MTP layers are no loss.
        overwritten: parameters of which a region was written more than once.
    """
    left, modules, tensors, rename = list(left), dict(model.named_modules()), loadable(model), mapped(model)
    parameters = {name for name, _ in model.named_parameters()}
    tied = getattr(model_config.hf_text_config, "tie_word_embeddings", False)
    expected = accounted([name for name in left if name in parameters], model, model_config)
    places = {name: (rename(name) if rename else name) or name for name in dropped}
    elsewhere = Prefixes([*missing_prefixes(model), *speculative_prefixes(model, model_config.hf_text_config)])
    experts, by_layer = held_experts(expert_maps(model)), defaultdict(list)
    for name, place in sorted(places.items()):
        if not elsewhere.cover(place) and not is_elsewhere(name, experts):
            by_layer[_layer(place)].append(name)
    found = {}
    for name in left:
        path, _, leaf = name.rpartition(".")
        if name not in parameters:  # a buffer may have its value from the model's own code
            tensor = next((t for t in by_layer[_layer(name)] if places[t] == name), None)
            if tensor is not None:
                computed = leaf == "inv_freq"
                found[name] = Left(EXPECTED, COMPUTED) if computed else Left(LOST, DROPPED.format(tensor), tensor)
            continue
        if name in expected:
            found[name] = Left(EXPECTED, expected[name])
            continue
        shape = _stored_shape(modules[path], tensors[name])
        shapes = (shape, shape[1:]) if "experts" in name else (shape,)
        like = [t for t in by_layer[_layer(name)] if any(_fits(dropped[t], one) for one in shapes)]
        if like:
            nearest = max(like, key=lambda tensor: SequenceMatcher(None, places[tensor], name, autojunk=False).ratio())
            found[name] = Left(LOST, DROPPED.format(nearest), nearest)
        elif isinstance(modules[path], ParallelLMHead) and tied:
            found[name] = Left(UNTIED, NOT_TIED)
        elif name in overwritten:
            found[name] = Left(LOST, WRONG_PLACE)
        else:
            found[name] = Left(ABSENT, NOTHING_LIKE_IT)
    return found


def confirmed(
    found: Mapping[str, Left], model: torch.nn.Module, folder: str, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Left]:
    """The same with values, after a load of real bytes; what the bytes do not confirm is expected.

    Args:
        folder: of the checkpoint that was loaded.
        shapes: its tensors -> shape.
    """
    modules, tensors, proven = dict(model.named_modules()), loadable(model), {}
    for name, one in found.items():
        source = one.tensor
        if one.kind == UNTIED:
            shape = _stored_shape(modules[name.rpartition(".")[0]], tensors[name])
            source = next((tensor for tensor, stored in shapes.items() if "emb" in tensor and tuple(stored) == shape), None)
        stored = None if source is None else _read(folder, source)
        if one.kind != EXPECTED and stored is not None and _holds(tensors[name], stored):
            one = Left(EXPECTED, f"it has the bytes of {source!r} even so")
        if one.kind != EXPECTED:
            at = _first_difference(tensors[name], stored)
            in_file = None if stored is None else _value(stored, at)
            one = replace(one, tensor=source, in_file=in_file, in_model=_value(tensors[name], at))
        proven[name] = one
    return proven


def _read(folder: str, name: str) -> torch.Tensor:
    spec = Checkpoint.from_directory(folder)[name]
    ((_, tensor),) = read_shard(shard_path(folder, spec.file), {name}.__contains__)
    return tensor


def _layer(name: str) -> str | None:
    found = LAYER.search(name)
    return found and found[0]


def _stored_shape(module: torch.nn.Module, param: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape in a checkpoint, apart from tensor parallelism: without the rows that pad a vocabulary."""
    rows = (module.org_vocab_size,) if isinstance(module, VocabParallelEmbedding) and param.dim() else param.shape[:1]
    return (*rows, *param.shape[1:])


def _fits(stored: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a stored tensor can be a parameter, or a part or a multiple of it in one dimension."""
    if len(stored) != len(shape):
        return False
    other = [(max(a, b), min(a, b)) for a, b in zip(stored, shape) if a != b]
    return not other or (len(other) == 1 and len(shape) > 1 and other[0][0] % max(other[0][1], 1) == 0)


def _holds(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a parameter has a tensor's bytes: as a whole, as a block of its rows, or in one of its experts."""
    if tensor.dim() == stored.dim() + 1:
        return any(_holds(expert, stored) for expert in tensor)
    if not tensor.dim():
        return _same(tensor, stored)
    rows = stored.shape[0] if stored.dim() else 0
    if not rows or tensor.dim() != stored.dim() or tensor.shape[1:] != stored.shape[1:]:
        return False
    return any(_same(tensor[start : start + rows], stored) for start in range(0, tensor.shape[0] - rows + 1, rows))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return digest(one) == digest(other)
    return torch.equal(one.to(torch.float64), other.to(torch.float64))  # stored wider or narrower than it is kept


def _first_difference(tensor: torch.Tensor, stored: torch.Tensor | None) -> int:
    """Where two tensors differ first, counted in elements; 0 if that cannot be said."""
    if stored is None or tensor.shape[1:] != stored.shape[1:]:
        return 0
    rows = min(len(tensor), len(stored)) if tensor.dim() else None
    differ = tensor[:rows].to(torch.float64) != stored[:rows].to(torch.float64) if rows else tensor != stored
    return int(differ.reshape(-1).to(torch.uint8).argmax())


def _value(tensor: torch.Tensor, at: int) -> str:
    return f"{tensor.detach().reshape(-1)[at].to(torch.float64).item():.6g}" if tensor.numel() > at else "nothing"
