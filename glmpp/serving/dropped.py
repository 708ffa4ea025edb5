"""Tensors that were handed over and left no trace in the model, and which of them the model should have."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from math import prod

import torch
from torch.nn.parameter import is_lazy
from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from glmpp.formats.config import TEXT_CONFIGS
from glmpp.formats.index import natural_key
from glmpp.ledger import DROPPED, EXPECTED, LOST, UnloadedParam
from glmpp.partition import PrefixSet
from glmpp.serving.experts import expert_maps, held_experts, is_elsewhere
from glmpp.serving.stage_filter import mapped, missing_prefixes, speculative_prefixes
from glmpp.serving.write_tracking import WriteRecorder, loadable

LAYER = re.compile(r"[^.]+\.\d+(?=\.)")  # "layers.3"
SCALE = re.compile(r"_scale(_inv)?$")
TIED = "vLLM ties the head to {}, although tie_word_embeddings of the language model is false"
WITHOUT_USE = re.compile(r"(^|[._])(inv_freq|masked_bias|num_batches_tracked|(k|v|q|kv|prob)_(scale|zero_point))$")
MASK = 4  # dimensions of a causal mask that old checkpoints hold as a bias of the attention
# What lies beside a weight that is quantised, with what stands between; and what the weight may be called there.
BESIDE = re.compile(r"([._])((weight|input|output)_)?(global_)?(scales?(_inv|_2)?|zero_point|q?zeros|g_idx|perm|shape)$")
QUANTISED = ("", ".weight", ".qweight", ".weight_packed", "_packed", "_blocks")
NO_PARAMETER = "the model has no parameter for it"


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


def without_place(
    gone: Iterable[str],
    recorder: WriteRecorder,
    model: torch.nn.Module,
    model_config: ModelConfig,
    found: Mapping[str, UnloadedParam],
) -> dict[str, UnloadedParam]:
    """Dropped tensors of a layer or a module that the model of the stage has; biases of zeros apart.

    What was read counts as stored, and so does what may be a part of a tensor that was computed and stored beside it: some
    loaders keep several tensors until the last one has come. Scales and orders of columns are judged by
    `glmpp.dryrun.cuts.readings`.

    Args:
        gone: tensors that left no trace, see `dropped`.
        found: what was left. A tensor of a layer with such a parameter may be that parameter's.
    """
    paths, rename = dict(model.named_modules(remove_duplicate=False)), mapped(model) or (lambda name: name)
    elsewhere = PrefixSet([*missing_prefixes(model), *speculative_prefixes(model, model_config)])
    experts, shapes = held_experts(expert_maps(model)), dict(zip(recorder.order, recorder.shapes))
    told = {layer_of(name) for name, one in found.items() if one.kind != EXPECTED}
    computed = {_beside(recorder.order[turn - 1], shapes) for turn in recorder.reads.unknown if turn}
    unused, own, layers = {}, loadable(model), model_config.get_total_num_hidden_layers()
    for name in set(gone) - read(recorder) - recorder.zeros:
        place = rename(name)
        if place is None or place in own or elsewhere.cover(place) or is_elsewhere(name, experts):
            continue
        path, _, leaf = place.rpartition(".")
        if getattr(paths.get(path), leaf, None) is not None:
            continue  # another's, as a tied head's
        layer = LAYER.search(place)
        is_more = is_beyond(place, paths, layers)
        is_here = (path and path in paths) or (layer and place[: layer.end()] in paths) or is_more
        is_anothers = layer_of(place) in told or _beside(name, shapes) in computed or is_beside_a_weight(name, shapes)
        is_mask = leaf == "bias" and len(shapes[name]) == MASK
        if is_here and not (is_anothers or is_mask or WITHOUT_USE.search(name)):
            unused[name] = UnloadedParam(DROPPED, f"the config says {layers} layers" if is_more else NO_PARAMETER, name)
    return dict(sorted(unused.items(), key=lambda item: natural_key(item[0])))


def is_beside_a_weight(name: str, names: Container[str]) -> bool:
    """Whether a tensor is the scale, zero point or order of columns of one that the checkpoint has, too."""
    return bool(found := BESIDE.search(name)) and any(name[: found.start()] + weight in names for weight in QUANTISED)


def is_beyond(place: str, lists: Mapping[str, torch.nn.Module], layers: int) -> bool:
    """Whether a tensor is of a layer after the last that the config speaks of, in the model's list of all layers."""
    if (layer := LAYER.search(place)) is None:
        return False
    path, _, number = place[: layer.end()].rpartition(".")
    return isinstance(lists.get(path), torch.nn.ModuleList) and len(lists[path]) == layers <= int(number)


def read(recorder: WriteRecorder) -> set[str]:
    """Names of tensors of which something was read: some loaders keep them all, and store them when the last has come."""
    return {name for turn, name in enumerate(recorder.order, 1) if recorder.reads.has_read(turn)}


def _beside(name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[str, int]:
    """The path and the number of dimensions that a tensor shares with those that it may be put together with."""
    return name.rpartition(".")[0].rpartition(".")[0], len(shapes[name])


def dropped_heads(
    gone: Iterable[str], recorder: WriteRecorder, model: torch.nn.Module, model_config: ModelConfig
) -> dict[str, UnloadedParam]:
    """Heads that are the embedding although the language model's own config says that they are not, and of which the
    checkpoint has a tensor that was dropped -> what became of it."""
    weights, rename, found = vocabularies(model), mapped(model) or (lambda name: name), {}
    if len({id(weight) for weight in weights.values()}) == len(weights):
        return {}
    try:  # as it is in the file: vLLM may have changed its own
        config, _ = PretrainedConfig.get_config_dict(model_config.model, revision=model_config.revision)
    except OSError:  # a model may come without one
        return {}
    of_text, *_ = [*(config[name] for name in TEXT_CONFIGS if isinstance(config.get(name), dict)), config]
    if of_text.get("tie_word_embeddings") is not False:
        return {}
    places = {rename(name) or name: name for name in set(gone) - read(recorder)}
    for path, weight in weights.items():
        shared = [other for other, one in weights.items() if other != path and one is weight]
        if f"{path}.weight" in places and shared:
            found[f"{path}.weight"] = UnloadedParam(LOST, TIED.format(shared[0]), places[f"{path}.weight"])
    return found


def vocabularies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of embeddings and heads, by the path of their module; one that is tied has several."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(module, VocabParallelEmbedding) and isinstance(weight, torch.Tensor) and not is_lazy(weight):
            found[path] = weight
    return found


def layer_of(name: str) -> str | None:
    found = LAYER.search(name)
    return found and found[0]
