"""The skip taken out of a fixed vLLM, and two fixes that look right, in the real engine: GLMPP_REFERENCE_SKIP names one.

They stand where vLLM's own helper stands, in every worker process, and only on the reference platform.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import ModuleType

import torch
from vllm.logger import init_logger

from glmpp.engine.reference.platform import SKIP
from glmpp.errors import GlmppError
from glmpp.loader import load_fp8_indexer_wk_late_skip

HELPER = "_try_load_fp8_indexer_wk"

logger = init_logger(f"vllm.{__name__}")
handed_over: list[weakref.ref[torch.Tensor]] = []  # halves of wk that belong to other stages


def off(original: Callable) -> Callable:
    """Never asks, as before the fix."""
    return lambda name, tensor, pending, params, loaded, missing: original(name, tensor, pending, params, loaded, [])


def dotless(original: Callable) -> Callable:
    """Asks with prefixes that have lost their dot: a stage without layer 1 drops its own layers 10 and 11."""

    def helper(name, tensor, pending, params, loaded, missing):
        return original(name, tensor, pending, params, loaded, [prefix.rstrip(".") for prefix in missing])

    return helper


def late(original: Callable) -> Callable:
    """Asks when the tensor is in the buffer already."""
    return load_fp8_indexer_wk_late_skip


WRONG = {function.__name__: function for function in (off, dotless, late)}


def install(module: ModuleType) -> None:
    """Replace the helper in the model's module, once, by the one that the environment names, if it names one.

    Raises:
        GlmppError: the name is not one of `WRONG`, or this release has no skip that could be taken out.
    """
    which, original = os.environ.get(SKIP), getattr(module, HELPER)
    if not which or getattr(original, "is_wrong", False):
        return
    if which not in WRONG:
        raise GlmppError(f"{SKIP}={which}: choose one of {', '.join(WRONG)}, or unset it")
    if "pp_missing_layer_names" not in original.__code__.co_varnames:
        raise GlmppError(f"{SKIP}={which}: this vLLM's helper does not ask which layers are missing (fixed in 0.23.0)")
    wrong = WRONG[which](original)

    def helper(name, tensor, pending, params, loaded, missing):
        if ".indexer.wk." in name and name.startswith(tuple(missing)):
            handed_over.append(weakref.ref(tensor))
        return wrong(name, tensor, pending, params, loaded, missing)

    helper.is_wrong = True
    setattr(module, HELPER, helper)
    logger.warning("%s=%s: the helper that loads the indexer's wk is a wrong one, on purpose", SKIP, which)


def say_what_is_held() -> None:
    """Log, once and while the stage answers, what is alive of the halves that it should have dropped."""
    if handed_over:
        alive = [tensor for held in handed_over if (tensor := held()) is not None]
        handed_over.clear()
        size = sum(tensor.nbytes for tensor in alive)
        logger.warning("while it answers, this stage holds %d tensors of layers that are not its own, %d bytes", len(alive), size)
