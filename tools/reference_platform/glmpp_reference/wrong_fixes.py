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

from glmpp.dryrun.child.helper_patch import HELPER
from glmpp.errors import GlmppError
from glmpp.loader import load_fp8_indexer_wk_late_skip

SKIP = "GLMPP_REFERENCE_SKIP"

logger = init_logger(f"vllm.{__name__}")


class Foreign:
    """Halves of wk that belong to other stages, and how many of them were alive at once, here or in vLLM's buffer."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.most = self.most_bytes = 0
        self.said = False

    def count(self, tensor: torch.Tensor) -> None:
        self.seen.append(weakref.ref(tensor))

    def alive(self) -> tuple[int, int]:
        """Tensors and bytes that are held now."""
        held = [tensor for one in self.seen if (tensor := one()) is not None]
        return len(held), sum(tensor.nbytes for tensor in held)

    def measure(self) -> None:
        self.most, self.most_bytes = max((self.most, self.most_bytes), self.alive())

    def say(self) -> None:
        """Log, once and while the stage answers, what it held of them."""
        if self.seen and not self.said:
            self.said = True
            logger.warning(
                "this stage held up to %d tensors of layers that are not its own, %d bytes, while loading; now it holds %d",
                self.most,
                self.most_bytes,
                self.alive()[0],
            )


foreign = Foreign()


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
            foreign.count(tensor)
        answer = wrong(name, tensor, pending, params, loaded, missing)
        del tensor
        foreign.measure()
        return answer

    helper.is_wrong = True
    setattr(module, HELPER, helper)
    logger.warning("%s=%s: the helper that loads the indexer's wk is a wrong one, on purpose", SKIP, which)
