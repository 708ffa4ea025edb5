"""A stand-in for `libcuda.so.1`, so that vLLM's operator libraries can be loaded on a machine without a GPU.

vLLM's operator libraries name the library of NVIDIA's driver as needed, and the dynamic loader refuses them without it. The
stand-in exports the functions that they want and answers every call with an error, "no device". It is made here byte by
byte (no compiler), lives in memory only, and is known to the one process that calls `provide`: the loader takes a library
that is already loaded for every later one that asks for its name. Where a real driver can be loaded none is made.

Sources: System V ABI, chapters 4 and 5 (ELF); psABI of x86-64 and of aarch64; `cuda.h` for the numbers of errors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmpp.errors import GlmppError

SONAME = "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
WORDS = "no CUDA-capable device is detected"  # what the driver says of it
DRIVER_FUNCTION = re.compile(r"cu[A-Z]\w+")  # cudaMalloc and its kin are the runtime's

HEADER, PROGRAM_HEADER, SECTION_HEADER, SYMBOL, DYNAMIC = "<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<IIQQQQIIQQ", "<IBBHQQ", "<QQ"
SECTION_DYNAMIC, SECTION_SYMBOLS = 6, 11  # SHT_DYNAMIC, SHT_DYNSYM
NEEDED, HASH, STRINGS, SYMBOLS, STRINGS_SIZE, SYMBOL_SIZE, NAME_OF_LIBRARY = 1, 4, 5, 6, 10, 11, 14  # DT_…
LOAD, DYNAMIC_SEGMENT, STACK = 1, 2, 0x6474E551  # PT_LOAD, PT_DYNAMIC, PT_GNU_STACK
READ, WRITE, RUN = 4, 2, 1
PAGE = 0x10000  # the largest page that an aarch64 kernel may use


# --- what libraries want ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wants:
    """What a shared library asks of others.

    Attributes:
        libraries: names of the libraries that must be loaded with it.
        functions: names that it uses and does not define.
    """

    libraries: set[str]
    functions: set[str]


def wants(path: str | Path) -> Wants:
    """What a 64-bit little-endian ELF library asks of others, by its section table; the rest of the file is not read.

    Raises:
        GlmppError: the file is no such library.
    """
    with open(path, "rb") as file:

        def part(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        try:
            header = struct.unpack(HEADER, part(0, 64))
            if header[0][:6] != b"\x7fELF\x02\x01":
                raise ValueError("no 64-bit little-endian ELF file")
            table = part(header[6], header[12] * 64)
            sections = list(struct.iter_unpack(SECTION_HEADER, table))
            libraries: set[str] = set()
            functions: set[str] = set()
            for _name, kind, _flags, _address, offset, size, link, *_ in sections:
                if kind not in (SECTION_DYNAMIC, SECTION_SYMBOLS):
                    continue
                strings = part(*sections[link][4:6])

                def text(at: int, strings: bytes = strings) -> str:
                    return strings[at : strings.index(b"\0", at)].decode()

                if kind == SECTION_DYNAMIC:
                    entries = struct.iter_unpack(DYNAMIC, part(offset, size))
                    libraries |= {text(value) for tag, value in entries if tag == NEEDED}
                else:
                    symbols = struct.iter_unpack(SYMBOL, part(offset, size))
                    functions |= {text(name) for name, _, _, section, *_ in symbols if section == 0 and name}
        except (struct.error, ValueError, IndexError) as error:
            raise GlmppError(f"{path} cannot be read as a shared library: {error}") from error
    return Wants(libraries, functions)


def needed_functions(folder: str | Path) -> list[str]:
    """The driver's functions that the libraries under a folder use, of those that name the driver's library."""
    found = (wants(path) for path in sorted(Path(folder).rglob("*.so")))
    return sorted(
        {name for one in found if SONAME in one.libraries for name in one.functions if DRIVER_FUNCTION.fullmatch(name)}
    )


# --- the library --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processor:
    """Machine code of the two functions that the library consists of.

    Attributes:
        number: e_machine.
        refuse: returns NO_DEVICE.
        tell: cuGetErrorString(error, char **text): stores the address of the text, returns 0. The text follows it.
    """

    number: int
    refuse: bytes
    tell: bytes


PROCESSORS = {
    "x86_64": Processor(
        62,
        refuse=bytes.fromhex(
            "b8 64000000"  # mov eax, 100
            "c3"  #          ret
        ),
        tell=bytes.fromhex(
            "488d05 06000000"  # lea rax, [rip + 6]: what follows this function
            "488906"  #          mov [rsi], rax
            "31c0"  #            xor eax, eax
            "c3"  #              ret
        ),
    ),
    "aarch64": Processor(
        183,
        refuse=struct.pack(
            "<2I",
            0x52800C80,  # mov w0, #100
            0xD65F03C0,  # ret
        ),
        tell=struct.pack(
            "<4I",
            0x10000082,  # adr x2, #16: what follows this function
            0xF9000022,  # str x2, [x1]
            0x52800000,  # mov w0, #0
            0xD65F03C0,  # ret
        ),
    ),
}
TELL = "cuGetErrorString"  # callers copy the text, and crash without one


def shared_object(functions: Iterable[str], machine: str) -> bytes:
    """An ELF shared object named libcuda.so.1 that exports these functions.

    Args:
        machine: "x86_64" or "aarch64".

    Two segments: headers, symbols and code, which are not written to, and on a page of its own the dynamic section, which
    older loaders do write to.
    """
    processor, names = PROCESSORS[machine], sorted(functions)
    strings, places = b"\0", []
    for name in [SONAME, *names]:
        places.append(len(strings))
        strings += name.encode() + b"\0"

    # A hash table with one bucket is a list: symbol 1, which leads to 2, and so on.
    count = len(names) + 1
    hashes = struct.pack(f"<{3 + count}I", 1, count, 1 if names else 0, 0, *range(2, count), *([0] if names else []))

    headers = 64 + 4 * 56
    at_hashes = headers
    at_symbols = _rounded(at_hashes + len(hashes), 8)
    at_strings = at_symbols + count * 24
    at_code = _rounded(at_strings + len(strings), 16)
    refuse = _rounded(len(processor.refuse), 16)
    code = processor.refuse.ljust(refuse, b"\0") + processor.tell + WORDS.encode() + b"\0"
    at_dynamic = _rounded(at_code + len(code), 8)

    # Global functions of section 1, which there is not: any number but 0 says "defined".
    symbols = struct.pack(SYMBOL, 0, 0, 0, 0, 0, 0)
    for name, place in zip(names, places[1:], strict=True):
        start, size = (refuse, len(processor.tell)) if name == TELL else (0, len(processor.refuse))
        symbols += struct.pack(SYMBOL, place, 0x12, 0, 1, at_code + start, size)
    entries = [
        (NAME_OF_LIBRARY, places[0]),
        (HASH, at_hashes),
        (STRINGS, at_strings),
        (SYMBOLS, at_symbols),
        (STRINGS_SIZE, len(strings)),
        (SYMBOL_SIZE, 24),
        (0, 0),
    ]
    dynamic = b"".join(struct.pack(DYNAMIC, *entry) for entry in entries)

    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bit, little-endian, version 1
    header = struct.pack(HEADER, identity, 3, processor.number, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    at_page = at_dynamic + PAGE
    segments = [
        (LOAD, READ | RUN, 0, 0, 0, at_dynamic, at_dynamic, PAGE),
        (LOAD, READ | WRITE, at_dynamic, at_page, at_page, len(dynamic), len(dynamic), PAGE),
        (DYNAMIC_SEGMENT, READ | WRITE, at_dynamic, at_page, at_page, len(dynamic), len(dynamic), 8),
        (STACK, READ | WRITE, 0, 0, 0, 0, 0, 16),  # without it the stack would have to be executable
    ]
    image = header + b"".join(struct.pack(PROGRAM_HEADER, *segment) for segment in segments)
    for at, content in [
        (at_hashes, hashes),
        (at_symbols, symbols),
        (at_strings, strings),
        (at_code, code),
        (at_dynamic, dynamic),
    ]:
        image = image.ljust(at, b"\0") + content
    return image


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to


# --- one process --------------------------------------------------------------------------------------------------


is_stand_in = False  # whether `provide` had to make one in this process, or in the one that it was forked from


def provide(folder: str | Path) -> None:
    """Make sure that this process can load the operator libraries under a folder, if need be with a stand-in driver.

    No file is made and no variable set: other processes, those that this one starts included, do not see it. Forks do.

    Raises:
        GlmppError: there is no driver and no stand-in for this machine.
    """
    global is_stand_in
    with contextlib.suppress(OSError):
        ctypes.CDLL(SONAME, mode=os.RTLD_GLOBAL)
        return
    if platform.machine() not in PROCESSORS:
        known = " and ".join(PROCESSORS)
        raise GlmppError(f"no stand-in for {SONAME} on {platform.machine()} (only {known}): use the target cpu")
    image = shared_object(needed_functions(folder), platform.machine())
    descriptor = os.memfd_create(SONAME)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(image)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=os.RTLD_GLOBAL)
        ctypes.CDLL(SONAME)  # by its name from now on
    except OSError as error:
        raise GlmppError(f"the stand-in for {SONAME} cannot be loaded: {error}; use the target cpu") from error
    finally:
        os.close(descriptor)
    is_stand_in = True
