"""What a load left at init, sorted: expected, lost under another name, not tied, or absent from the checkpoint.

The load format and the dry run ask the same two questions of the writes that were seen: `dropped` and `left`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import accumulate

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.ep_weight_filter import parse_expert_id

from glmpp.checkpoint import Checkpoint
from glmpp.formats.index import shard_path
from glmpp.formats.shard import read_shard
from glmpp.ledger import ABSENT, CUT, DROPPED, EXPECTED, LOST, UNTIED, UnloadedParam, digest
from glmpp.partition import PrefixSet
from glmpp.serving.dropped import dropped_heads, layer_of, vocabularies, without_place
from glmpp.serving.experts import expert_maps, expert_numbers, held_experts, is_elsewhere
from glmpp.serving.left_at_init import accounted
from glmpp.serving.padding import padding
from glmpp.serving.stage_filter import mapped, missing_prefixes, speculative_prefixes
from glmpp.serving.write_tracking import WriteRecorder, loadable

STACKED = re.compile(r"^w\d+_")  # "w13_weight" has what the checkpoint calls "gate_proj.weight" and "up_proj.weight"
SHOWN_EXPERTS = 16
COMPUTED = "computed while the model is built"
WAS_DROPPED = "{!r}, of the same layer and shape, was handed over and dropped"
NOT_TIED = "tie_word_embeddings is true, and the model does not tie it to the embedding"
SHARED_BLOCK = "its parts have {} rows, and a block of {} that two of them share has one scale"
WRONG_PLACE = "one part of it was written more than once, and another never"
NOTHING_LIKE_IT = "no tensor that it could be was handed over and dropped"


def left(
    recorder: WriteRecorder, model: torch.nn.Module, model_config: ModelConfig, gone: Mapping[str, Sequence[int]]
) -> dict[str, UnloadedParam]:
    """What a load left at init, and what became of it, from the writes that were seen.

    Args:
        gone: tensors that left no trace, see `glmpp.serving.dropped.dropped`.
    """
    found = recorder.left_at_init(padding(model))
    sorted_out = losses(found, model, model_config, gone, recorder.overwritten) if found else {}
    partly = {name: _partly(name, one, recorder, model) for name, one in sorted_out.items()}
    found = partly | dropped_heads(gone, recorder, model, model_config) | shared_blocks(recorder, model)
    return found | without_place(gone, recorder, model, model_config, found)


def _partly(name: str, one: UnloadedParam, recorder: WriteRecorder, model: torch.nn.Module) -> UnloadedParam:
    """The same, of a parameter that was written in part with how much is lacking, and of stacked experts with which."""
    tally, (path, _, leaf) = recorder.tallies()[name], name.rpartition(".")
    filled = int(tally.filled.sum())
    if one.kind == EXPECTED or not 0 < filled < tally.size:
        return one
    said = f"{tally.size - filled:,} of {tally.size:,} elements were never written"
    if "experts" in path:
        rows, count = recorder.unwritten_rows(name), loadable(model)[name].shape[0]
        numbers = [expert_numbers(model.get_submodule(path), count)[at] for at in rows]
        which = ", ".join(map(str, numbers[:SHOWN_EXPERTS]))
        more = f" and {len(rows) - SHOWN_EXPERTS:,} more" if len(rows) > SHOWN_EXPERTS else ""
        if 0 < len(rows) < count:
            of_these = f"{len(rows):,} of {count:,} experts: {which}{more}"
            if one.tensor is None and (found := lacking(numbers, leaf, layer_of(name), recorder.order)):
                return replace(one, kind=ABSENT, why=f"the checkpoint lacks {' and '.join(found)} of {of_these}")
            said += f", those of {of_these}"
    elif one.tensor is None and (found := lacking_parts(name, recorder.order, model)):
        return replace(one, kind=ABSENT, why=f"the checkpoint lacks {' and '.join(found)}; {said}")
    return replace(one, why=f"{said}; {one.why}")


def lacking(numbers: Iterable[int], leaf: str, layer: str | None, names: Iterable[str]) -> list[str]:
    """What a checkpoint lacks of each of these experts and has of others of the layer, e.g. "up_proj.weight".

    Args:
        leaf: of a parameter that stacks experts: "w13_weight" holds the gate and the up projection, "w2_weight" the other.
        names: of all tensors that were handed over.
    """
    held: dict[int, set[str]] = defaultdict(set)
    stored, is_down = STACKED.sub("", leaf), leaf.startswith("w2_")
    for name in names:
        if name.endswith(f".{stored}") and layer_of(name) == layer and (number := parse_expert_id(name)) is not None:
            part = name.rpartition(f".{number}.")[2]
            if is_down == part.startswith(("down", "w2.")) or not STACKED.match(leaf):
                held[number].add(part)
    every = set().union(*held.values())
    return sorted(every.difference(*(held[number] for number in numbers)))


def lacking_parts(name: str, names: Collection[str], model: torch.nn.Module) -> list[str]:
    """Of a parameter that several tensors make up, by the model's `packed_modules_mapping`, those that did not come."""
    path, _, leaf = name.rpartition(".")
    outer, _, module = path.rpartition(".")
    parts = (getattr(model, "packed_modules_mapping", None) or {}).get(module, ())
    rename = mapped(model) or (lambda name: name)
    held = {*names, *map(rename, names)}  # some releases map a part to the parameter itself
    absent = [f"{part}.{leaf}" for part in parts if f"{outer}.{part}.{leaf}" not in held]
    return absent if len(absent) < len(parts) else []


def losses(
    left: Iterable[str],
    model: torch.nn.Module,
    model_config: ModelConfig,
    dropped: Mapping[str, Sequence[int]],
    overwritten: Set[str],
) -> dict[str, UnloadedParam]:
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
    elsewhere = PrefixSet([*missing_prefixes(model), *speculative_prefixes(model, model_config)])
    experts, by_layer = held_experts(expert_maps(model)), defaultdict(list)
    for name, place in sorted(places.items()):
        if not elsewhere.cover(place) and not is_elsewhere(name, experts):
            by_layer[layer_of(place)].append(name)
    found = {}
    for name in left:
        path, _, leaf = name.rpartition(".")
        if name not in parameters:  # a buffer may have its value from the model's own code
            tensor = next((t for t in by_layer[layer_of(name)] if places[t] == name), None)
            if tensor is not None:
                lost = UnloadedParam(LOST, WAS_DROPPED.format(tensor), tensor)
                found[name] = UnloadedParam(EXPECTED, COMPUTED) if leaf == "inv_freq" else lost
            continue
        if name in expected:
            found[name] = UnloadedParam(EXPECTED, expected[name])
            continue
        shape = _stored_shape(modules[path], tensors[name])
        shapes = (shape, shape[1:]) if "experts" in name else (shape,)
        like = [t for t in by_layer[layer_of(name)] if any(_fits(dropped[t], one) for one in shapes)]
        if like:
            nearest = max(like, key=lambda tensor: SequenceMatcher(None, places[tensor], name, autojunk=False).ratio())
            found[name] = UnloadedParam(LOST, WAS_DROPPED.format(nearest), nearest)
        elif isinstance(modules[path], ParallelLMHead) and tied:
            found[name] = UnloadedParam(UNTIED, NOT_TIED)
        elif name in overwritten:
            found[name] = UnloadedParam(LOST, WRONG_PLACE)
        else:
            found[name] = UnloadedParam(ABSENT, NOTHING_LIKE_IT)
    return found


def shared_blocks(recorder: WriteRecorder, model: torch.nn.Module) -> dict[str, UnloadedParam]:
    """Block scales of parameters that are fused while they are loaded, a part of which begins within a block -> what is
    wrong with them.

    There the block has one scale and rows of two parts; vLLM stores the scales of the next part one block later. Of a
    parameter that is fused in the checkpoint the blocks are those of the whole.
    """
    rename, found = mapped(model) or (lambda name: name), {}
    parts = Counter(rename(name) or name for name in recorder.order if "weight_scale" in name)
    for path, module in model.named_modules():
        block, widths = getattr(module, "weight_block_size", None), getattr(module, "logical_widths", None)
        if not block or not widths or all(start % block[0] == 0 for start in accumulate(widths[:-1])):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_scale") and parts[f"{path}.{name}"] != 1:
                said = SHARED_BLOCK.format(", ".join(map(str, widths)), block[0])
                found[f"{path}.{name}"] = UnloadedParam(CUT, said)
    return found


def confirmed(
    found: Mapping[str, UnloadedParam], model: torch.nn.Module, folder: str, shapes: Mapping[str, Sequence[int]]
) -> dict[str, UnloadedParam]:
    """The same with values, after a load of real bytes; what the bytes do not confirm is expected.

    Args:
        folder: of the checkpoint that was loaded.
        shapes: its tensors -> shape.
    """
    modules, proven = dict(model.named_modules(remove_duplicate=False)), {}
    tensors = loadable(model) | {f"{path}.weight": weight for path, weight in vocabularies(model).items()}
    for name, one in found.items():
        if one.kind == DROPPED:  # no value of the model could be its
            proven[name] = one
            continue
        source = one.tensor
        if one.kind == UNTIED:
            shape = _stored_shape(modules[name.rpartition(".")[0]], tensors[name])
            source = next((tensor for tensor, stored in shapes.items() if "emb" in tensor and tuple(stored) == shape), None)
        stored = None if source is None else dict(_stored(folder, {source}))[source]
        if one.kind != EXPECTED and stored is not None and _holds(tensors[name], stored):
            one = UnloadedParam(EXPECTED, f"it has the bytes of {source!r} even so")
        if one.kind != EXPECTED and stored is not None:
            at = _first_difference(tensors[name], stored)
            one = replace(one, tensor=source, in_file=_value(stored, at), in_model=_value(tensors[name], at))
        proven[name] = one
    return proven


def with_values(folder: str, names: Iterable[str]) -> set[str]:
    """Which of a folder's tensors have an element that is not zero."""
    return {name for name, tensor in _stored(folder, names) if tensor.any()}


def _stored(folder: str, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a folder, file by file."""
    if names := set(names):
        checkpoint = Checkpoint.from_directory(folder)
        for file in sorted({checkpoint[name].file for name in names}):
            yield from read_shard(shard_path(folder, file), names.__contains__)


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


def _first_difference(tensor: torch.Tensor, stored: torch.Tensor) -> int:
    """Where two tensors differ first, counted in elements; 0 if that cannot be said."""
    if tensor.shape[1:] != stored.shape[1:]:
        return 0
    rows = min(len(tensor), len(stored)) if tensor.dim() else None
    differ = tensor[:rows].to(torch.float64) != stored[:rows].to(torch.float64) if rows else tensor != stored
    return int(differ.reshape(-1).to(torch.uint8).argmax())


def _value(tensor: torch.Tensor, at: int) -> str:
    return f"{tensor.detach().reshape(-1)[at].to(torch.float64).item():.6g}" if tensor.numel() > at else "nothing"
