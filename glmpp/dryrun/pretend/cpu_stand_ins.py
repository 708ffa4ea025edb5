"""In the child process: what a machine without a GPU lacks, and what stands in for it while a model is built.

Some are there in every run on a target (`always`). The others are for parts shaped like kernels; `StandIns` adds one only
when construction fails without it, so that a report lists what this model needed. On a GPU's target hardly any is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from glmpp.dryrun.pretend import targets
from glmpp.dryrun.pretend.failures import NotHere, is_kits, is_refusal
from glmpp.errors import on_behalf
from glmpp.gpus import CPU, gpu_of

T = TypeVar("T")
CPU_PLATFORM = "vLLM's CpuPlatform: without a GPU vLLM knows no platform, and with one verdicts must not depend on it"
INSPECTION = "in this process instead of a subprocess: the subprocess would miss the platform"


def always(target: str) -> dict[str, str]:
    """Part -> what stands in for it, in every run on a target."""
    platform = {"platform": CPU_PLATFORM} if target == CPU else targets.stand_ins(gpu_of(target))
    return {**platform, "class inspection": INSPECTION}


@dataclass(frozen=True)
class StandIn:
    """A part that may be missing.

    Attributes:
        why: why it is missing on a CPU, and what that leaves out.
        install: puts the stand-in there and returns what takes it away again; None where this release has no such part.
    """

    name: str
    why: str
    install: Callable[[], Callable[[], None] | None]


def install_platform(target: str) -> None:
    """Must run before any other vLLM module is imported: many ask for the platform at import time."""
    if target != CPU:
        return targets.install(gpu_of(target))
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    class DryRunPlatform(CpuPlatform):
        names_sparse_mla = False

        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs) -> str:
            asked = attn_selector_config.use_mla or getattr(attn_selector_config, "use_sparse", False)
            if asked and cls.names_sparse_mla:
                from vllm.v1.attention.backends.registry import AttentionBackendEnum

                return AttentionBackendEnum.FLASHMLA_SPARSE.get_path()
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, *args, **kwargs)

    vllm.platforms.current_platform = vllm.platforms._current_platform = DryRunPlatform()


def inspect_in_process() -> None:
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda function: function()


def expert_map_on_cpu() -> None:
    """vLLM's own map of global to local experts, with its numbers: vLLM reads them while it builds and loads a layer."""
    try:
        import vllm.model_executor.layers.fused_moe.expert_map_manager as manager
    except ImportError:  # 0.20, 0.21
        import vllm.model_executor.layers.fused_moe.layer as manager

    determine = manager.determine_expert_map

    def determine_on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    manager.determine_expert_map = determine_on_cpu


class Nothing(torch.nn.Module):
    """A module that takes any arguments and holds no parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__()


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None] | None:
    if not hasattr(owner, name):
        return None
    original = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, original)


def _sparse_mla_backend() -> Callable[[], None] | None:
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    restore = _replace(type(current_platform), "names_sparse_mla", True)
    if restore is None:
        return None  # a GPU's own chooser names one

    def remove() -> None:
        restore()
        selector._cached_get_attn_backend.cache_clear()  # it would name the backend to the next model, too

    return remove


def _mla_attention() -> Callable[[], None] | None:
    import vllm.model_executor.layers.mla as mla

    return _replace(mla, "MLAAttention", Nothing)


def _custom_operators() -> Callable[[], None] | None:
    kind = type(torch.ops._C)
    original = kind.__getattr__

    def absent(*args, **kwargs):
        raise NotHere("an operator of vLLM's GPU library")

    def look_up(namespace, name):
        try:
            return on_behalf(original, namespace, name)
        except AttributeError:
            if namespace.name not in ("_C", "_moe_C") or name.startswith("__"):
                raise
            return absent

    return _replace(kind, "__getattr__", look_up)


def _fp8_linear_kernel() -> Callable[[], None] | None:
    import vllm.model_executor.layers.quantization.fp8 as fp8

    return _replace(fp8, "init_fp8_linear_kernel", lambda *args, **kwargs: SimpleNamespace())


CANDIDATES = [
    StandIn(
        "MLA attention backend",
        "FLASHMLA_SPARSE when asked for one: the CPU platform refuses to name any; it holds no parameter",
        _sparse_mla_backend,
    ),
    StandIn(
        "MLAAttention",
        "an empty module: its kernels exist for GPUs only; it holds no tensor of a checkpoint",
        _mla_attention,
    ),
    StandIn(
        "custom operators",
        "functions that must not be called: modules look up operators of the GPU library when they are built",
        _custom_operators,
    ),
    StandIn(
        "FP8 linear kernel",
        "an empty object: the chooser refuses CPUs without AMX; parameters are created as always",
        _fp8_linear_kernel,
    ),
]


class StandIns:
    """Builds a model, adding stand-ins where it fails without; those that helped stay until `reset`."""

    def __init__(self, target: str, strict: bool = False):
        self.target, self.always = target, always(target)
        self.active: dict[str, Callable[[], None]] = {}
        self.candidates = [] if strict else CANDIDATES

    def reset(self) -> None:
        """Take them all away again."""
        for remove in reversed(self.active.values()):
            remove()
        self.active = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Name -> why, of those that are there now."""
        return self.always | {one.name: one.why for one in CANDIDATES if one.name in self.active}

    def build(self, construct: Callable[[], T]) -> T:
        """The model, or the error that it fails with when no stand-in helps; its cause is the one that is left with them."""
        try:
            return construct()
        except Exception as error:
            if is_kits(error) or (self.target != CPU and is_refusal(error)):
                raise  # the GPU itself would be refused, too
            first = latest = error
        added: dict[str, Callable[[], None]] = {}
        untried = [one for one in self.candidates if one.name not in self.active]
        while untried:
            progress = False
            for one in list(untried):
                remove = one.install()
                if remove is None:
                    untried.remove(one)
                    continue
                try:
                    model = construct()
                except Exception as error:
                    if is_kits(error):
                        raise
                    if _same(error, latest):
                        remove()
                        continue
                    latest, progress = error, True
                else:
                    self.active |= {**added, one.name: remove}
                    return model
                added[one.name] = remove
                untried.remove(one)
            if not progress:
                break
        for remove in added.values():
            remove()
        raise first from (None if latest is first else latest)


def _same(one: BaseException, other: BaseException) -> bool:
    return (type(one), str(one), _line(one)) == (type(other), str(other), _line(other))


def _line(error: BaseException) -> tuple[str, int] | None:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return None if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)
