"""Expert parallelism: which experts this rank holds, by vLLM's own map."""

from __future__ import annotations

import torch
from vllm.model_executor.model_loader.ep_weight_filter import parse_expert_id


def held_experts(model: torch.nn.Module) -> set[int] | None:
    """Numbers of the experts that a model holds on this rank; None if each of its layers has them all, or has none."""
    managers = [vars(module)["expert_map_manager"] for module in model.modules() if "expert_map_manager" in vars(module)]
    maps = [one.expert_map.tolist() for one in managers if one.expert_map is not None]
    return {number for numbers in maps for number, local in enumerate(numbers) if local >= 0} if maps else None


def is_elsewhere(name: str, held: set[int] | None) -> bool:
    """Whether a tensor is of an expert that another rank holds."""
    number = None if held is None else parse_expert_id(name)
    return number is not None and number not in held
