"""The GPUs that a dry run can pretend to be: what vLLM asks a device for before it decides what to build."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass

from glmpp.errors import GlmppError

KIB, MIB = 1 << 10, 1 << 20
CPU = "cpu"
REPORTED = "h200"  # the machine of the report that the kit is about


@dataclass(frozen=True)
class GPU:
    """A GPU as its driver describes it.

    Attributes:
        title: the name that the driver gives it.
        capability: compute capability, major and minor.
        memory: bytes in all, as the driver's tool says it.
        multiprocessors: how many there are.
        shared_memory: bytes that one block may use when it asks for it.
        l2_cache: bytes.
        gfx: AMD's name of the architecture; None for NVIDIA.
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    shared_memory: int
    l2_cache: int
    gfx: str | None = None

    @property
    def architecture(self) -> str:
        """Its name, e.g. "sm90" or "gfx942"."""
        return self.gfx or f"sm{self.capability[0]}{self.capability[1]}"


# Capability and shared memory: CUDA C++ Programming Guide, "Compute Capabilities"; the rest: data sheets, nvidia-smi (143771
# MiB for an H200: vLLM recipes issue 381). A process is told less of the memory: 79.11 GiB of an H100's 79.65 (vLLM issue
# 27508).
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 81920 * MIB, 108, 163 * KIB, 40 * MIB),
        GPU("l40s", "NVIDIA L40S", (8, 9), 46068 * MIB, 142, 99 * KIB, 96 * MIB),
        GPU("h100", "NVIDIA H100 80GB HBM3", (9, 0), 81559 * MIB, 132, 227 * KIB, 50 * MIB),
        GPU("h200", "NVIDIA H200", (9, 0), 143771 * MIB, 132, 227 * KIB, 50 * MIB),
        GPU("b200", "NVIDIA B200", (10, 0), 183359 * MIB, 148, 227 * KIB, 126 * MIB),
        GPU("mi300x", "AMD_Instinct_MI300X", (9, 4), 192 << 30, 304, 64 * KIB, 4 * MIB, gfx="gfx942"),
    )
}


def target_name(name: str | None) -> str:
    """The target's own name from one that a user may give: "h100", "sm90", "cpu"; None is the default.

    Raises:
        GlmppError: no such GPU is known.
    """
    if name is None:
        return default_target()
    wanted = name.lower()
    if wanted == CPU or wanted in GPUS:
        return wanted
    for gpu in GPUS.values():
        if wanted == gpu.architecture:
            return gpu.name
    known = ", ".join([*GPUS, *dict.fromkeys(gpu.architecture for gpu in GPUS.values()), CPU])
    raise GlmppError(f"GPU {name!r} is not known: choose one of {known}")


@functools.cache
def default_target() -> str:
    """The GPU that is here, or the one of the table that comes nearest to it; without one the machine of the report."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:  # not torch: it would set up a context, memory and all, in whatever process asks
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        title, capability = said.splitlines()[0].lower().rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return REPORTED
    same = [gpu for gpu in GPUS.values() if gpu.architecture == "sm" + capability.strip().replace(".", "")]
    return next((gpu.name for gpu in same if gpu.name in title), same[0].name if same else REPORTED)
