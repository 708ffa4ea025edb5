"""vLLM's process groups in the child: real ones over gloo, or one process that pretends a rank."""

from __future__ import annotations

import os

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from glmpp.partition import PARTITION_VARIABLE


def init_groups(rank: int, size: int, init_file: str) -> None:
    """vLLM's process groups over gloo: the real thing when `size` processes call this, or a group of one."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, f"file://{init_file}", rank, backend="gloo")
        parallel_state.initialize_model_parallel(1, size)


def pretend_rank(rank: int, size: int) -> None:
    """Rewrite the fields of the pipeline group, a real one of size 1, for one of its ranks."""
    group = parallel_state.get_pp_group()
    group.ranks, group.rank, group.rank_in_group, group.world_size = list(range(size)), rank, rank, size


def set_layer_counts(layer_counts: str | None) -> None:
    """What vLLM will find in VLLM_PP_LAYER_PARTITION. The server's own environment is that of whoever started it."""
    os.environ.pop(PARTITION_VARIABLE, None)
    if layer_counts is not None:
        os.environ[PARTITION_VARIABLE] = layer_counts
