"""vLLM's process groups in the child: real ones over gloo, or one process that pretends to be a rank of a layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from glmpp.dryrun.pretend.failures import RANKS_AWAY, NeedsRanks
from glmpp.partition import PARTITION_VARIABLE


@dataclass(frozen=True)
class Place:
    """What is built: a rank of a layout, or the drafter that runs on it.

    Attributes:
        rank, size: the pipeline stage, of how many.
        shard, shards: the same for tensor parallelism.
        replica, replicas: the same for data parallelism.
        ep: experts are spread over the shards of all replicas.
        layer_counts: of this run alone, as in VLLM_PP_LAYER_PARTITION; None: those of the request.
    """

    rank: int
    size: int
    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1
    ep: bool = False
    drafter: bool = False
    layer_counts: str | None = None

    @classmethod
    def of(cls, run: dict) -> Place:
        return cls(**{name: run[name] for name in cls.__dataclass_fields__ if name in run})

    def __str__(self) -> str:
        """ "stage 1 of 2, rank 7 of 8"."""
        name = "the MTP drafter" if self.drafter else f"stage {self.rank} of {self.size}"
        name += f", rank {self.shard} of {self.shards}" if self.shards > 1 else ""
        return name + (f", replica {self.replica} of {self.replicas}" if self.replicas > 1 else "")


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


def init_groups(rank: int, size: int, tp: int, init_file: str) -> None:
    """vLLM's process groups over gloo: the real thing when `size` processes call this, or groups of one."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, f"file://{init_file}", rank, backend="gloo")
        parallel_state.initialize_model_parallel(tp, size // tp)


def pretend(place: Place) -> None:
    """Rewrite the fields of vLLM's groups, real ones of size 1, for one rank of a layout.

    Ranks are numbered as in `vllm.distributed.parallel_state.initialize_model_parallel`: replicas, stages, shards.
    """
    ranks = torch.arange(place.replicas * place.size * place.shards, device="cpu")
    ranks = ranks.reshape(place.replicas, place.size, place.shards)
    mine = ranks[place.replica, place.rank, place.shard]
    for name, members in {
        "_WORLD": ranks,
        "_TP": ranks[place.replica, place.rank],
        "_PP": ranks[place.replica, :, place.shard],
        "_DP": ranks[:, place.rank, place.shard],
        "_EP": ranks[:, place.rank],
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
