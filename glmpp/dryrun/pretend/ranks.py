"""vLLM's process groups in the child: real ones over gloo, or one process that pretends to be a rank of a layout."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from glmpp.dryrun.messages import Run
from glmpp.dryrun.pretend.failures import RANKS_AWAY, NeedsRanks
from glmpp.partition import PARTITION_VARIABLE


class Alone:
    """A process group of which one rank alone is here: it knows its size and rank, and can do nothing.

    Attributes:
        real: what is in its place in a group of one.
    """

    def __init__(self, real: Any, rank: int, size: int):
        self.real, self.size, self.rank = real, lambda: size, lambda: rank

    def __getattr__(self, name: str) -> Any:
        raise NeedsRanks(f"{name} of {self!r}")

    def __repr__(self) -> str:
        """Stands in what torch says of a group that it does not know."""
        return f"<{self.size()} ranks: {RANKS_AWAY}>"


def init_groups(rank: int, size: int, tp_size: int, init_file: str) -> None:
    """vLLM's process groups over gloo: the real thing when `size` processes call this, or groups of one."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, f"file://{init_file}", rank, backend="gloo")
        parallel_state.initialize_model_parallel(tp_size, size // tp_size)
    if size > 1:
        torch.distributed.barrier()  # or one that is done early is gone before others have reached it


def pretend(run: Run) -> None:
    """Rewrite the fields of vLLM's groups, real ones of size 1, for one rank of a layout.

    Ranks are numbered as in `vllm.distributed.parallel_state.initialize_model_parallel`: data, pipeline, tensor parallel.
    """
    ranks = torch.arange(run.dp_size * run.pp_size * run.tp_size, device="cpu")
    ranks = ranks.reshape(run.dp_size, run.pp_size, run.tp_size)
    mine = ranks[run.dp_rank, run.stage, run.tp_rank]
    for name, members in {
        "_WORLD": ranks,
        "_TP": ranks[run.dp_rank, run.stage],
        "_PP": ranks[run.dp_rank, :, run.tp_rank],
        "_DP": ranks[:, run.stage, run.tp_rank],
        "_EP": ranks[:, run.stage],
        "_DCP": mine,
        "_PCP": mine,
    }.items():
        pretend_member(getattr(parallel_state, name), int(mine), members.flatten().tolist())


def pretend_member(group: parallel_state.GroupCoordinator, rank: int, ranks: list[int]) -> None:
    group.ranks, group.rank, group.rank_in_group, group.world_size = ranks, rank, ranks.index(rank), len(ranks)
    for name in ("cpu_group", "device_group", "device_communicator"):
        real = getattr(group, name)
        real = real.real if isinstance(real, Alone) else real
        setattr(group, name, real if len(ranks) == 1 else Alone(real, group.rank_in_group, len(ranks)))


def set_layer_counts(layer_counts: str | None) -> None:
    """What vLLM will find in VLLM_PP_LAYER_PARTITION. The server's own environment is that of whoever started it."""
    os.environ.pop(PARTITION_VARIABLE, None)
    if layer_counts is not None:
        os.environ[PARTITION_VARIABLE] = layer_counts
