"""What is asked: how a checkpoint is to be spread over GPUs, and whose code is to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmpp.dryrun.messages import Run
from glmpp.errors import GlmppError, short, whole
from glmpp.formats.config import layer_count_said
from glmpp.gpus import target_name
from glmpp.partition import MAX_GPUS, Stage, make_stages, parse_counts
from glmpp.serving import fixes

GUARDS = ("installed", "off", "helper", "loader")


@dataclass(frozen=True)
class Helper:
    """A helper of the reader's in the place of vLLM's.

    Attributes:
        place: a function with the signature of `glmpp.loader.load_fp8_indexer_wk`: "module:function" of an installed
            module, or "path/to/file.py:function".
        callers: vLLM modules, e.g. ("deepseek_v2",), that follow its signature; others go on calling it with the
            arguments of their release. None: all follow.
    """

    place: str = "glmpp.loader:load_fp8_indexer_wk"
    callers: tuple[str, ...] | None = None

    @property
    def absolute(self) -> str:
        """The place for a process that works in another folder."""
        file, _, name = self.place.rpartition(":")
        return f"{Path(file).resolve()}:{name}" if file.endswith(".py") else self.place

    def __str__(self) -> str:
        return "helper"


@dataclass(frozen=True)
class Deployment:
    """A way to serve a checkpoint. Made once and handed down.

    Attributes:
        pp: pipeline stages.
        tp: GPUs that share a stage, a shard of its tensors each.
        dp: replicas of the attention layers that take requests side by side. Their GPUs share the experts.
        ep: experts are spread over the tp * dp GPUs of a stage; without it each of these has a slice of every expert.
        layer_counts: layers of each stage, as numbers or as in VLLM_PP_LAYER_PARTITION; None: vLLM's even split. That
            variable itself is read by the command alone, for a verdict must not depend on where it is asked for.
        drafter: the MTP drafter runs, too, on the last stage.
        guard: "installed": vLLM as it is; "off": the skip taken away (a release without one is unchanged); "helper", or a
            `Helper`: another helper in place of vLLM's, by default the kit's; "loader": nothing patched, the load format
            "glmpp" decides what is handed over.
        gpu: the GPU that is pretended, a target of `glmpp.gpus`: "h100", "a100:40" (GB), "sm90"; "cpu": none. None: the one
            that is here, without one the h200 of the report.
        fixes: names of `glmpp.serving.fixes` that are applied to vLLM's classes first, under any guard; "known": all
            that fit the installed release and the model.

    What vLLM refuses of it, such as heads that do not divide, is vLLM's to say: a verdict, not an error.

    Raises:
        GlmppError: a number that is none, below 1, or of more than MAX_GPUS in all; an unknown guard, fix or GPU; layer
            counts that are not one number for each stage.
    """

    pp: int = 1
    tp: int = 1
    dp: int = 1
    ep: bool = False
    layer_counts: Sequence[int] | str | None = None
    drafter: bool = False
    guard: str | Helper = "installed"
    gpu: str | None = None
    fixes: Sequence[str] | str = ()

    def __post_init__(self):
        for name in ("tp", "pp", "dp"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, MAX_GPUS))
        if self.gpus > MAX_GPUS:
            raise GlmppError(f"{self.layout} takes {self.gpus:,} GPUs: expected at most {MAX_GPUS:,}")
        for name in ("ep", "drafter"):
            if getattr(self, name) not in (False, True):
                raise GlmppError(f"{name}={short(getattr(self, name))}: expected True or False")
        if str(self.guard) not in GUARDS:
            raise GlmppError(f"guard {self.guard!r} is unknown; choose one of {', '.join(GUARDS)}")
        object.__setattr__(self, "fixes", tuple(fixes.named(self.fixes)))
        if self.layer_counts is not None:
            object.__setattr__(self, "layer_counts", tuple(parse_counts(self.layer_counts, self.pp)))
        object.__setattr__(self, "gpu", target_name(self.gpu))
        if self.guard == "helper":
            object.__setattr__(self, "guard", Helper())

    @classmethod
    def of(cls, asked: Deployment | int) -> Deployment:
        """A deployment, or pipeline stages alone for a number."""
        return asked if isinstance(asked, Deployment) else cls(pp=asked)

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> str:
        """ "TP=8 PP=2 EP", or "PP=8" where nothing else is shared."""
        sizes = [f"{name.upper()}={getattr(self, name)}" for name in ("tp", "pp", "dp") if getattr(self, name) > 1]
        return " ".join([*(sizes or ["PP=1"]), *(["EP"] if self.ep else [])])

    def run(self, stage: int, tp_rank: int = 0, dp_rank: int = 0, drafter: bool = False) -> Run:
        """One of its ranks, or the drafter on it, to be run."""
        sizes = {"pp_size": self.pp, "tp_size": self.tp, "dp_size": self.dp}
        split = self.partition if self.pp > 1 else None
        return Run(stage=stage, tp_rank=tp_rank, dp_rank=dp_rank, **sizes, ep=self.ep, drafter=drafter, layer_counts=split)

    @property
    def control(self) -> Run:
        """The same in a single stage."""
        return Run(tp_size=self.tp, dp_size=self.dp, ep=self.ep, control=True)

    @property
    def representative_ranks(self) -> list[tuple[int, int, int]]:
        """The ranks that are run unless all are asked for, as (stage, tensor rank, data rank)."""
        return [rank for stage in range(self.pp) for rank in self.corners_of(stage)]

    def corners_of(self, stage: int) -> list[tuple[int, int, int]]:
        """The first and the last rank of a stage, of the first and of the last replica."""
        return [(stage, rank, at) for at in sorted({0, self.dp - 1}) for rank in sorted({0, self.tp - 1})]

    @property
    def all_ranks(self) -> list[tuple[int, int, int]]:
        return [(stage, rank, at) for stage in range(self.pp) for at in range(self.dp) for rank in range(self.tp)]

    @property
    def partition(self) -> str | None:
        """The value of VLLM_PP_LAYER_PARTITION; None for vLLM's even split."""
        return None if self.layer_counts is None else ",".join(map(str, self.layer_counts))

    def stages(self, config: dict, num_layers: int | None = None, layer_list: str = "model.layers") -> list[Stage] | None:
        """What each stage holds; None if the config does not say how many layers there are, and nobody knows better.

        Args:
            num_layers: main layers, as vLLM counts them.
            layer_list: what the checkpoint calls the list of its layers.

        Raises:
            GlmppError: more stages than layers, or layer counts that do not add up.
        """
        num_layers = num_layers or layer_count_said(config)
        if num_layers is None:
            return None
        counts = None if self.layer_counts is None else list(self.layer_counts)
        return make_stages(config, self.pp, counts, self.drafter, layer_list, num_layers)
