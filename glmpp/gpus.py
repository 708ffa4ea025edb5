"""The GPUs that a dry run can pretend to be: what vLLM asks a device for before it decides what to build.

A target is a string that says the whole GPU, so that every process and machine makes the same of it:

    h100                      a GPU of the table
    a100:40                   with another memory, in GB as on the card, or in MiB: a100:40536MiB
    sm90                      the first of the table with this architecture
    sm75:15360MiB:Tesla T4    any other: architecture, memory, and what the driver calls it
    cpu                       none
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from typing import NamedTuple

from glmpp.errors import GlmppError, short

KIB, MIB = 1 << 10, 1 << 20
CPU = "cpu"
REPORTED = "h200"  # the machine of the report that the kit is about
PATIENCE = 60  # seconds for nvidia-smi, which loads the driver where nothing else has
NO_DRIVER = 9  # what nvidia-smi ends with where the driver is not loaded: no process has a GPU then
LARGEST = 1024  # GB of a GPU; what is larger is a slip of the pen
SIZE = re.compile(r"([0-9]{1,7})(gb|mib)?", re.IGNORECASE)
ROW = re.compile(r"(.+?) *, *([0-9]+)\.([0-9]) *, *(?:([0-9]+) MiB|\[(N/A|Not Supported)\])(?: *, *(.+))?")


class Architecture(NamedTuple):
    """What GPUs of one architecture have in common, and the last two of one of them, for a GPU that the table lacks."""

    shared_memory: int  # KiB that a block may use when it asks for it
    shared_memory_in_all: int  # KiB of a multiprocessor
    threads: int  # of a multiprocessor
    multiprocessors: int
    l2_cache: int  # MiB
    integrated: bool = False  # its memory is the system's


# The first three: CUDA C++ Programming Guide, "Compute Capabilities". Multiprocessors, cache: data sheet of the GPU named.
ARCHITECTURES = {
    "sm70": Architecture(96, 96, 2048, 80, 6),  # V100
    "sm75": Architecture(64, 64, 1024, 40, 4),  # T4
    "sm80": Architecture(163, 164, 2048, 108, 40),  # A100
    "sm86": Architecture(99, 100, 1536, 72, 6),  # A10
    "sm87": Architecture(163, 164, 1536, 16, 4, integrated=True),  # Jetson AGX Orin
    "sm89": Architecture(99, 100, 1536, 142, 96),  # L40S
    "sm90": Architecture(227, 228, 2048, 132, 50),  # H100
    "sm100": Architecture(227, 228, 2048, 148, 126),  # B200
    "sm103": Architecture(227, 228, 2048, 148, 126),  # B300
    "sm110": Architecture(227, 228, 1536, 20, 32, integrated=True),  # Jetson Thor
    "sm120": Architecture(99, 100, 1536, 188, 128),  # RTX PRO 6000
    "sm121": Architecture(99, 100, 1536, 48, 24, integrated=True),  # GB10
    "gfx942": Architecture(64, 64, 2048, 304, 4),  # MI300X
}


@dataclass(frozen=True)
class GPU:
    """A GPU as its driver describes it.

    Attributes:
        name: the target that it is asked for by.
        title: the name that the driver gives it.
        capability: compute capability, major and minor.
        sold_as: GB that its vendor says it has.
        memory: bytes in all, as the driver's tool says it.
        multiprocessors: how many there are.
        l2_cache: bytes.
        gfx: AMD's name of the architecture; None for NVIDIA.
    """

    name: str
    title: str
    capability: tuple[int, int]
    sold_as: int
    memory: int
    multiprocessors: int
    l2_cache: int
    gfx: str | None = None

    @property
    def architecture(self) -> str:
        """Its name, e.g. "sm90" or "gfx942"."""
        return self.gfx or f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def limits(self) -> Architecture:
        return ARCHITECTURES[self.architecture]


# Multiprocessors and caches: data sheets. Memory: what nvidia-smi prints (143771 MiB for an H200: vLLM recipes issue 381;
# A100, A10, L4, L40S, H100: modal-client pull 2797; others: outputs in public issues). A process is told less: 79.11 GiB of
# an H100's 79.65 (vLLM issue 27508); of the GH200 with 144 GB only that was found. GB10: the system's (gpud pull 1170).
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 80, 81920 * MIB, 108, 40 * MIB),
        GPU("a100:40", "NVIDIA A100-SXM4-40GB", (8, 0), 40, 40960 * MIB, 108, 40 * MIB),
        GPU("a10", "NVIDIA A10", (8, 6), 24, 23028 * MIB, 72, 6 * MIB),
        GPU("l40s", "NVIDIA L40S", (8, 9), 48, 46068 * MIB, 142, 96 * MIB),
        GPU("l40", "NVIDIA L40", (8, 9), 48, 46068 * MIB, 142, 96 * MIB),
        GPU("l4", "NVIDIA L4", (8, 9), 24, 23034 * MIB, 58, 48 * MIB),
        GPU("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 24, 24564 * MIB, 128, 72 * MIB),
        GPU("h100", "NVIDIA H100 80GB HBM3", (9, 0), 80, 81559 * MIB, 132, 50 * MIB),
        GPU("h200", "NVIDIA H200", (9, 0), 141, 143771 * MIB, 132, 50 * MIB),
        GPU("gh200", "NVIDIA GH200 480GB", (9, 0), 96, 97871 * MIB, 132, 50 * MIB),
        GPU("gh200:144", "NVIDIA GH200 144G HBM3e", (9, 0), 144, 145920 * MIB, 132, 50 * MIB),
        GPU("b200", "NVIDIA B200", (10, 0), 180, 183359 * MIB, 148, 126 * MIB),
        GPU("b300", "NVIDIA B300 SXM6 AC", (10, 3), 288, 275040 * MIB, 148, 126 * MIB),
        GPU("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 32, 32607 * MIB, 170, 96 * MIB),
        GPU("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 96, 97887 * MIB, 188, 128 * MIB),
        GPU("gb10", "NVIDIA GB10", (12, 1), 128, 122548 * MIB, 48, 24 * MIB),
        GPU("mi300x", "AMD_Instinct_MI300X", (9, 4), 192, 192 << 30, 304, 4 * MIB, gfx="gfx942"),
    )
}


def target_name(name: str | None) -> str:
    """The target's own name from one that a user may give; None is the default.

    Raises:
        GlmppError: see `gpu_of` and `default_target`.
    """
    if name is None:
        return default_target()
    if not isinstance(name, str):
        raise GlmppError(f"gpu={short(name)}: expected a name, e.g. 'h100'")
    return CPU if name.lower() == CPU else gpu_of(name).name


@functools.cache
def gpu_of(target: str) -> GPU:
    """The GPU that a target says; see the top of this file.

    A memory that the vendor sells is what nvidia-smi says of that card, any other is taken for GiB; the rest stays the
    table's. An architecture with a memory is a GPU of which no more is known, see `Architecture`.

    Raises:
        GlmppError: no such GPU is known, or its memory is none.
    """
    head, *more = target.split(":", 2)
    head = head.lower()
    for gpu in GPUS.values() if not more else ():
        if head in (gpu.name, gpu.architecture):
            return gpu
    cards = [gpu for gpu in GPUS.values() if gpu.name.partition(":")[0] == head]
    made = not cards and head.startswith("sm") and head in ARCHITECTURES
    if not more or not (cards or made) or (len(more) > 1 and not made):
        known = ", ".join([*GPUS, *dict.fromkeys(gpu.architecture for gpu in GPUS.values()), CPU])
        raise GlmppError(f"GPU {target!r} is not known: choose one of {known}, or say its memory: a100:60, sm75:16 (in GB)")
    size = SIZE.fullmatch(more[0])
    number, mib = (int(size[1]), (size[2] or "").lower() == "mib") if size else (0, False)
    memory = number * (MIB if mib else 1 << 30)
    if not 1 << 30 <= memory <= LARGEST << 30:
        raise GlmppError(f"GPU {target!r}: {more[0]!r} is no memory; say GB or MiB, e.g. {head}:24 or {head}:23028MiB")
    for gpu in cards:
        if memory == gpu.memory if mib else number == gpu.sold_as:
            return gpu
    name = f"{head}:{memory // MIB}MiB"
    if cards:
        return replace(cards[0], name=name, memory=memory)
    title = more[1].strip() if len(more) > 1 else f"NVIDIA {head}"
    if not title.isprintable() or not 0 < len(title) <= 100:
        raise GlmppError(f"GPU {target!r}: {title!r} is no name of a GPU")
    capability, one = (int(head[2:-1]), int(head[-1])), ARCHITECTURES[head]
    name += f":{title}" if len(more) > 1 else ""
    return GPU(name, title, capability, 0, memory, one.multiprocessors, one.l2_cache * MIB)


@functools.cache
def default_target() -> str:
    """The GPU that is here: one of the table if its title, capability and memory are that one's, otherwise one that is made
    from these three. Where there is none, the machine of the report.

    All GPUs of the machine have to be the same. CUDA_VISIBLE_DEVICES is not looked at: it counts them in an order of its own
    (CUDA_DEVICE_ORDER), which nvidia-smi does not know, and a GPU that it hides is here all the same.

    Raises:
        GlmppError: the GPUs differ, are cut into slices (MIG), or do not say what they are, or nvidia-smi does not work.
    """
    said = _nvidia_smi()
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("WARNING:")]
    if not lines or "no devices were found" in said.lower():
        return REPORTED
    rows = [ROW.fullmatch(line) for line in lines]
    if not all(rows):
        raise _ask(f"nvidia-smi says {lines[rows.index(None)][:200]!r}, which is no GPU with its capability and memory")
    if any(row[6] == "Enabled" for row in rows):
        raise _ask(f"{rows[0][1]} is cut into slices (MIG), and which one is meant is not known; e.g. a100:10")
    found = {(row[1], (int(row[2]), int(row[3])), row[4] and int(row[4]) * MIB) for row in rows}
    if len(found) > 1:
        raise _ask(f"the GPUs here differ: {'; '.join(dict.fromkeys(lines))}")
    ((title, capability, memory),) = found
    for gpu in GPUS.values():
        if (gpu.title, gpu.capability) == (title, capability) and memory in (gpu.memory, *[None] * gpu.limits.integrated):
            return gpu.name
    architecture = f"sm{capability[0]}{capability[1]}"
    if memory is None:
        raise _ask(f"{title} does not say how much memory it has; e.g. {architecture}:64")
    try:
        return gpu_of(f"{architecture}:{memory // MIB}MiB:{title}").name
    except GlmppError:
        raise _ask(f"the kit knows no GPU like this one: {lines[0]}") from None


def _ask(why: str) -> GlmppError:
    return GlmppError(f"{why}: say which GPU is meant with --gpu (Deployment(gpu=…)), or cpu for none")


def _nvidia_smi() -> str:
    """Title, compute capability, memory and MIG mode of each GPU, a line each; "" without nvidia-smi or without a driver.

    Not torch: it would set up a context, memory and all, in whatever process asks.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=name,compute_cap,memory.total,mig.mode.current", "--format=csv,noheader"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:  # a pipe would wait for its children
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            code = process.wait(PATIENCE)
        except OSError as error:
            raise _ask(f"nvidia-smi cannot be run ({error.strerror})") from None
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps it
                process.wait(1)
            raise _ask(f"nvidia-smi does not answer within {PATIENCE} s") from None
        file.seek(0)
        said = file.read(1 << 20)
    if code == NO_DRIVER:
        return ""
    if code and "no devices were found" not in said.lower():
        raise _ask(f"nvidia-smi ends with {code}: {' '.join(said.split())[:200]!r}")
    return said
