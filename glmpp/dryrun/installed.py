"""The vLLM that is installed here: its version, and what it answers to questions that are not about a checkpoint."""

from __future__ import annotations

from typing import Any

from glmpp.dryrun.messages import Answer, PPIndices, Request
from glmpp.dryrun.workers import TIMEOUT, ask
from glmpp.errors import GlmppError
from glmpp.serving import contract

NO_VLLM = "vLLM is not installed here: pip install '.[vllm]' in a checkout of glmpp (Linux)"


def vllm_version() -> str | None:
    """Version of the installed vLLM, or None."""
    return contract.vllm_version()


def ask_vllm(request: Request, timeout: float = TIMEOUT) -> Any:
    """The child's answer to a request that is not about a checkpoint's stages. Raises GlmppError if there is none."""
    if vllm_version() is None:
        raise GlmppError(NO_VLLM)
    return next(message.value for message in ask(request, timeout=timeout) if isinstance(message, Answer))


def vllm_pp_indices(cases: list[tuple[int, int]], layer_counts: str | None = None) -> list[list[tuple[int, int]]] | None:
    """What the installed vLLM's `get_pp_indices` says for (num_layers, pp_size) pairs; None where vLLM is not installed.

    Args:
        layer_counts: what vLLM finds in VLLM_PP_LAYER_PARTITION; None: nothing.

    Returns:
        For each pair the (start, end) of every stage.

    Raises:
        GlmppError: vLLM refuses a case; its words are in the message.
    """
    if vllm_version() is None:
        return None
    found = ask_vllm(PPIndices(cases=cases, layer_counts=layer_counts))
    return [[tuple(pair) for pair in case] for case in found]
