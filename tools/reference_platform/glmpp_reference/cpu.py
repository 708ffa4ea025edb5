"""The platform's class. A module of its own: vLLM imports it while it decides which platform it is on."""

from __future__ import annotations

import os

import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from glmpp.errors import GlmppError
from glmpp_reference.platform import ASKED_FOR_BY

logger = init_logger(f"vllm.{__name__}")


class ReferencePlatform(CpuPlatform):
    """vLLM's CPU platform, which also has sparse MLA attention."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        if attn_selector_config.use_mla and attn_selector_config.use_sparse:
            return "glmpp_reference.attention.ReferenceBackend"
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        from vllm.config import CompilationMode  # not above: it asks for the platform

        if torch.accelerator.is_available():
            raise GlmppError(
                f"{ASKED_FOR_BY}=1 asks for the reference platform, which is for machines without a GPU, and this one has "
                f"{torch.accelerator.current_accelerator().type!r}; unset {ASKED_FOR_BY} to serve with vLLM's kernels"
            )
        super().check_and_update_config(vllm_config)
        # Nothing is compiled, and of vLLM's operators the plain torch variants run: the C++ one for rotary embedding
        # expects queries that lie contiguously, and those of MLA do not. Worker processes inherit the variable. The mode
        # is not NONE because a CPU worker of 0.32 then skips the warm-up, in which a later stage makes room for its input.
        vllm_config.compilation_config.mode = CompilationMode.STOCK_TORCH_COMPILE
        vllm_config.compilation_config.custom_ops = ["none"]
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        logger.warning(
            "%s=1: glmpp's reference platform computes sparse attention, indexer and block FP8 in plain torch, exactly and "
            "slowly. It is for tests and teaching.",
            ASKED_FOR_BY,
        )
