"""Elements of parameters that vLLM adds for its kernels and that no checkpoint fills, by vLLM's own attributes."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
from torch.nn.parameter import is_lazy
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

BLOCK = 32  # of MXFP4, which gpt-oss deals out whole, in BF16 too


def padding(model: torch.nn.Module) -> dict[str, int]:
    """Parameter -> elements of padding; only of those that have some.

    Five attributes tell: `weight_loader_numel` of a parameter (vLLM >= 0.32), the rows of a vocabulary beyond those of its
    shard, the sizes of stacked experts before they were rounded up, of gpt-oss the rank (the last has fewer blocks of an
    expert, `vllm/model_executor/models/gpt_oss.py`), and the `pad_size` that a module gives to a projection of its own as
    the last of its outputs.
    """
    found, config = {}, getattr(model, "config", None)
    width = getattr(config, "intermediate_size", None) if getattr(config, "model_type", None) == "gpt_oss" else None
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        for name, param in module.named_parameters(recurse=False):
            if is_lazy(param) or not param.numel():  # a rank may hold no expert
                continue
            if added := param.numel() - _filled(module, param, getattr(parent, "pad_size", 0), width):
                found[f"{path}.{name}" if path else name] = added
    return found


def _filled(module: torch.nn.Module, param: torch.nn.Parameter, pad_size: int, width: int | None) -> int:
    """Elements that a checkpoint fills at least.

    Args:
        pad_size: of the module around this one; 0 if it has none.
        width: of a whole expert, in gpt-oss.
    """
    if (said := getattr(param, "weight_loader_numel", None)) is not None:
        return said
    if isinstance(module, VocabParallelEmbedding) and param.dim() and param.shape[0] == module.num_embeddings_per_partition:
        held = module.shard_indices
        rows = held.num_org_elements + held.num_added_elements
        return param.numel() // param.shape[0] * rows
    if pad_size and (outputs := getattr(module, "output_sizes", None)) and outputs[-1] == pad_size:
        return param.numel() // sum(outputs) * sum(outputs[:-1])
    if (moe := getattr(module, "moe_config", None)) is not None and param.dim() > 1:
        # Both dimensions of a weight may be rounded up, only one of a bias; scales have a grid of their own, rounded up too.
        columns = moe.intermediate_size_per_partition_unpadded
        if width is not None:
            ranks = moe.moe_parallel_config
            each = ceil(Fraction(width // BLOCK, ranks.tp_size)) * BLOCK
            columns = min(columns, max(0, width - ranks.tp_rank * each))
        part = Fraction(moe.hidden_dim_unpadded, moe.hidden_dim) * Fraction(columns, moe.intermediate_size_per_partition)
        return param.shape[0] * int(param.numel() // param.shape[0] * part)
    return param.numel()
