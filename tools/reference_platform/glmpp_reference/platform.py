"""The platform: vLLM's own for CPUs, with a sparse-attention backend. Active only where GLMPP_REFERENCE=1 asks for it.

vLLM finds `activate` under the entry point group `vllm.platform_plugins` and `register` under `vllm.general_plugins`, and
calls both in every process.
"""

from __future__ import annotations

import os

ASKED_FOR_BY = "GLMPP_REFERENCE"


def asked_for() -> bool:
    return os.environ.get(ASKED_FOR_BY) == "1"


def activate() -> str | None:
    """The platform's class, or None if nobody asked for it: then vLLM chooses as if this package were not there."""
    return "glmpp_reference.cpu.ReferencePlatform" if asked_for() else None


def register() -> None:
    """Put the kernels where vLLM looks for them: the quantisation "fp8" and the operator `SparseAttnIndexer`."""
    if not asked_for():
        return
    from glmpp_reference import attention, indexer, linear  # not above: they ask vLLM for its platform

    for kernels in (attention, indexer, linear):
        kernels.register()
