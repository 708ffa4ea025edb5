"""What torch cannot answer of tensors without data, told from what it refuses of any tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from glmpp.errors import on_behalf

LIMIT = 1_000_000_000  # bytes that are made up for one call


class UnansweredOnMeta(TorchFunctionMode):
    """While active, notes whether torch failed to answer because a tensor has no data.

    The same call is made with zeros on the CPU: what fails there, too, is wrong for any data (two shapes that do not fit).
    What is done there has no answer on "meta": `equal`, `nonzero`, a mask, `.numpy()`, whatever torch's words for it. An
    address is asked for in vain, too: without data all tensors have the same one.

    Attributes:
        found: names of the functions that were called so.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        try:
            answer = on_behalf(function, *args, **(kwargs or {}))
        except Exception:
            if tensors and _works_with_data(function, tensors, args, kwargs or {}):
                self.found.append(function.__name__)
            raise
        if tensors and function is torch.Tensor.data_ptr:
            self.found.append(function.__name__)
        return answer


def _works_with_data(function: Callable, tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> bool:
    if sum(tensor.nbytes for tensor in tensors) > LIMIT:
        return True  # nobody tried: no verdict
    try:
        args, kwargs = tree_map(_made_up, (args, kwargs))
        function(*args, **kwargs)
    except Exception:
        return False
    return True


def _made_up(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
        return leaf
    made = torch.zeros(leaf.nbytes, dtype=torch.uint8, device="cpu").view(leaf.dtype).reshape(leaf.shape)
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(leaf, torch.nn.Parameter) else made
