"""Expert parallelism: which experts this rank holds, by vLLM's own map, and which tensors are then another rank's."""

from __future__ import annotations

import torch
from vllm.model_executor.model_loader.ep_weight_filter import parse_expert_id, should_skip_weight

EXPERTS = ".experts."


def expert_maps(model: torch.nn.Module) -> dict[str, set[int]]:
    """Path of a layer's experts, as in "model.layers.3.mlp.experts" -> numbers of those that this rank holds.

    {} without expert parallelism. A layer whose experts are called otherwise is left out.
    """
    found = {}
    for path, module in model.named_modules():
        held = _held(module)
        if held is not None and EXPERTS in f".{path}.":
            stem = f"{path}.".rpartition(EXPERTS)[0]
            found[stem + EXPERTS[:-1]] = set(held)
    return found


def expert_numbers(module: torch.nn.Module, count: int) -> list[int]:
    """The numbers of so many experts that a module has stacked, in the order of the stack."""
    held = _held(module) or []
    return held if len(held) == count else list(range(count))


def _held(module: torch.nn.Module) -> list[int] | None:
    """Numbers of the experts that a module holds, by vLLM's map; None if it has none."""
    numbers = getattr(vars(module).get("expert_map_manager"), "expert_map", None)
    return None if numbers is None else [number for number, local in enumerate(numbers.tolist()) if local >= 0]


def held_experts(maps: dict[str, set[int]]) -> set[int] | None:
    """Numbers of the experts that a rank holds in any layer; None without expert parallelism."""
    return set().union(*maps.values()) if maps else None


def is_elsewhere(name: str, held: set[int] | None) -> bool:
    """Whether a tensor is of an expert that another rank holds."""
    number = None if held is None else parse_expert_id(name)
    return number is not None and number not in held


def is_not_needed(name: str, place: str, maps: dict[str, set[int]]) -> bool:
    """Whether a rank can do without a tensor, by vLLM's own filter, which lets scales pass: some backends want all.

    Args:
        name: in the checkpoint.
        place: the same in the model.
    """
    stem, found, _ = place.rpartition(EXPERTS)
    return bool(found) and should_skip_weight(name, maps.get(stem + EXPERTS[:-1]))
