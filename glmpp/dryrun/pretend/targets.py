"""In the process that imports vLLM: pretend that a GPU is there, so that vLLM decides as it would on that GPU.

Real: vLLM's platform class, its operator libraries (behind `libcuda_stub`), its choosers of attention backends and kernels.
Pretended: what a driver answers about a device. Tensors have no data ("meta") or are on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from glmpp.dryrun.pretend import libcuda_stub
from glmpp.errors import GlmppError, on_behalf
from glmpp.gpus import GPU, KIB
from glmpp.serving import contract

DEVICES = 4096  # more than any layout asks for: whether a machine has that many is not asked here


def stand_ins(gpu: GPU) -> dict[str, str]:
    """Part -> what stands in for it in every run on this GPU."""
    sort = "AMD" if gpu.gfx else "NVIDIA"
    parts = {"platform": f"vLLM's own for {sort}, told that the GPU is {gpu.title}, {gpu.architecture}"}
    if libcuda_stub.is_stand_in:
        parts["driver"] = 'a library in memory whose functions all answer "no device": there is no libcuda.so.1 here'
    if gpu.gfx:
        parts["AMD's libraries"] = "none: vLLM's _rocm_C and aiter are not in this wheel, what it chooses is without them"
    return parts


class Pretended:
    """A stream, an event or a graph: can be made and passed on, and has nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def record(self, *args) -> None:
        pass

    wait = wait_event = wait_stream = record_event = synchronize = record


class Stream(Pretended):
    pass


class Event(Pretended):
    pass


class Properties(SimpleNamespace):
    """What `torch.cuda.get_device_properties` says, by its names."""


def properties(gpu: GPU) -> Properties:
    return Properties(
        name=gpu.title,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.multiprocessors,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.limits.shared_memory * KIB,
        shared_memory_per_multiprocessor=gpu.limits.shared_memory_in_all * KIB,
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=gpu.limits.threads,
        max_threads_per_block=1024,
        warp_size=64 if gpu.gfx else 32,
        L2_cache_size=gpu.l2_cache,
        is_integrated=gpu.limits.integrated,
        is_multi_gpu_board=False,
        gcnArchName=gpu.gfx or "",
    )


def install(gpu: GPU) -> None:
    """Pretend the GPU. Must run before any other vLLM module is imported: many ask for the platform at import time.

    Raises:
        GlmppError: torch, as it is installed, has no code for a GPU this old; or see `libcuda_stub.provide`.
    """
    built = getattr(torch._C, "_cuda_getArchFlags", str)() or ""  # "sm_75 sm_80 …"; nothing in a torch for the CPU
    oldest = min(map(int, re.findall(r"\bsm_(\d+)", built)), default=0)
    if not gpu.gfx and int(gpu.architecture[2:]) < oldest:
        raise GlmppError(
            f"{gpu.title}, {gpu.architecture}: torch {torch.__version__} of this vLLM is built for sm{oldest} and newer"
        )
    libcuda_stub.provide(Path(importlib.util.find_spec("vllm").origin).parent)
    _pretend_in_torch(gpu)
    _pretend_in_triton(gpu)

    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability

    if gpu.gfx:
        Platform = importlib.import_module("vllm.platforms.rocm").RocmPlatform  # optional in the contract: it asks for a GPU
    else:
        from vllm.platforms.cuda import CudaPlatformBase as Platform

    class PretendedGPU(Platform):
        device_type = "meta"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*gpu.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return gpu.title

        @classmethod
        def get_device_uuid(cls, device_id: int = 0) -> str:
            return f"GPU-{device_id}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return gpu.memory

        @classmethod
        def device_count(cls) -> int:
            return DEVICES

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def set_device(cls, device: torch.device) -> None:
            pass

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False  # there is no driver to pin it

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"  # NCCL wants GPUs

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)  # as vLLM's own, for a device_type of "cuda"

    vllm.platforms.current_platform = vllm.platforms._current_platform = PretendedGPU()
    contract.require(contract.PRETENDED)


def _pretend_in_torch(gpu: GPU) -> None:
    stream, memory = Stream(), (gpu.memory, gpu.memory)
    cuda = {
        "is_available": True,
        "device_count": DEVICES,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_name": gpu.title,
        "get_device_capability": gpu.capability,
        "get_device_properties": properties(gpu),
        "mem_get_info": memory,
        "current_stream": stream,
        "default_stream": stream,
        "set_stream": None,
        "stream": stream,
        "is_current_stream_capturing": False,
    }
    accelerator = {
        "is_available": True,
        "device_count": DEVICES,
        "current_accelerator": torch.device("cuda"),
        "current_device_index": 0,
        "set_device_index": None,
        "synchronize": None,
        "get_memory_info": memory,
        "empty_cache": None,
        "current_stream": stream,
    }
    for module, answers in ((torch.cuda, cuda), (torch.accelerator, accelerator)):
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, _answering(answer))
    torch.cuda.Stream, torch.cuda.Event = Stream, Event  # classes: annotations use them


def _answering(answer: Any) -> Callable[..., Any]:
    """A new function each time: torch's compiler keeps a table of torch's functions, in which none may be twice."""
    return lambda *args, **kwargs: answer


def _pretend_in_triton(gpu: GPU) -> None:
    """Triton's own driver compiles C against the real one's when it is first used; kernels are not run here."""
    from triton.backends.amd.driver import HIPDriver
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as triton_driver

    class PretendedDriver(HIPDriver if gpu.gfx else CudaDriver):
        def __init__(self):
            warp = {"warpSize": properties(gpu).warp_size, "arch": gpu.architecture}
            asked = {"max_shared_mem": gpu.limits.shared_memory * KIB, "multiprocessor_count": gpu.multiprocessors, **warp}
            self.utils = SimpleNamespace(get_device_properties=lambda device: asked)
            self.get_device_capability = torch.cuda.get_device_capability
            self.get_current_device = torch.cuda.current_device
            self.set_current_device = torch.cuda.set_device
            self.get_current_stream = lambda device: 0

    for kind in (HIPDriver, CudaDriver):
        kind.is_active = staticmethod(_answering(issubclass(PretendedDriver, kind)))
    triton_driver.set_active(PretendedDriver())


class OnDevice(TorchFunctionMode):
    """Tensors that code puts on a GPU by name are made on another device."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {
            name: value for name, value in (kwargs or {}).items() if name != "pin_memory"
        }  # there is no driver to pin it
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.cuda:
            return on_behalf(args[0].to, self.device)
        if is_gpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": self.device}
        if any(isinstance(arg, (torch.device, str)) and is_gpu(arg) for arg in args):
            args = tuple(self.device if isinstance(arg, (torch.device, str)) and is_gpu(arg) else arg for arg in args)
        return on_behalf(function, *args, **kwargs)


def is_gpu(device: Any) -> bool:
    """Whether a `device` argument names a GPU: "cuda:0", torch.device("cuda"), 0."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return device.split(":")[0] == "cuda" if isinstance(device, str) else isinstance(device, int)


@contextlib.contextmanager
def tensors_on(device: str) -> Iterator[None]:
    """What the pretended GPU's tensors are made on: "meta" or "cpu"."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        yield
        return
    from vllm.v1.worker import workspace

    type(current_platform).device_type = device
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device(device))  # as vLLM's worker does before it builds the model
    with OnDevice(device):
        yield
