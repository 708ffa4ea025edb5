"""The stand-in for NVIDIA's driver library: a sound ELF file with the wanted names, in one process and nowhere else."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.pretend import libcuda_stub
from glmpp.errors import GlmppError

NAMES = ["cuInit", "cuGetErrorString", "cuMemCreate", "cuTensorMapEncodeTiled"]
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="reads the installed vLLM's libraries")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils is not installed")
here = pytest.mark.skipif(platform.machine() not in MACHINES, reason="no stand-in for this processor")


@pytest.fixture(params=MACHINES)
def library(request, tmp_path) -> tuple[str, Path]:
    path = tmp_path / "libcuda.so.1"
    path.write_bytes(libcuda_stub.shared_object(NAMES, request.param))
    return request.param, path


def readelf(*arguments) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(["readelf", "--wide", *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr  # it warns of whatever does not fit
    return done.stdout


@needs_readelf
def test_readelf_finds_nothing_to_warn_of(library):
    machine, path = library
    said = readelf("--all", path)
    assert re.search(r"Type: +DYN", said) and MACHINES[machine] in said
    assert "Library soname: [libcuda.so.1]" in said
    assert "NEEDED" not in said and "There are no relocations in this file." in said
    assert re.search(r"GNU_STACK .* RW +0x10$", said, re.M), "an executable stack"


@needs_readelf
def test_it_exports_exactly_the_names_asked_for(library):
    _, path = library
    said = readelf("--use-dynamic", "--symbols", path)
    rows = re.findall(r"^ +\d+: (\w+) +(\d+) FUNC +GLOBAL +DEFAULT +\d+ (\w+)$", said, re.M)
    assert sorted(name for *_, name in rows) == sorted(NAMES) and f"contains {len(NAMES) + 1} entries" in said
    code = [(int(address, 16), int(size)) for address, size, _ in rows]
    starts, ends = min(code)[0], max(address + size for address, size in code)
    segments = re.findall(r"LOAD +0x\w+ (0x\w+) 0x\w+ 0x\w+ (0x\w+) R E", readelf("--segments", path))
    assert len(segments) == 1 and int(segments[0][0], 16) <= starts and ends <= int(segments[0][1], 16)


def test_segments_lie_where_pages_of_4_16_and_64_kib_can_map_them(library):
    _, path = library
    image = path.read_bytes()
    count = struct.unpack_from("<H", image, 56)[0]
    loads = [segment for at in range(count) if (segment := struct.unpack_from("<IIQQQQQQ", image, 64 + 56 * at))[0] == 1]
    for page in (0x1000, 0x4000, 0x10000):
        assert all(offset % page == address % page for _, _, offset, address, *_ in loads)
        taken = [range(address // page, (address + size - 1) // page + 1) for *_, address, _, _, size, _ in loads]
        assert set(taken[0]).isdisjoint(taken[1]), "code on a page that can be written to"


@pytest.mark.parametrize(
    ("machine", "refuse", "first"),
    [("x86_64", "b864000000c3", "488d05"), ("aarch64", "800c8052c0035fd6", "82000010")],  # as assemblers give them
)
def test_the_machine_code_is_the_one_that_assemblers_make(machine, refuse, first):
    assert libcuda_stub.PROCESSORS[machine].refuse.hex() == refuse
    assert libcuda_stub.PROCESSORS[machine].tell.hex().startswith(first)


def test_the_text_lies_where_the_aarch64_code_looks_for_it():
    """adr x2, #imm: the address of the instruction plus a signed number, the low bits of which come last."""
    tell = libcuda_stub.PROCESSORS["aarch64"].tell
    word = struct.unpack("<I", tell[:4])[0]
    assert ((word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3) == len(tell)
    image = libcuda_stub.shared_object(["cuGetErrorString"], "aarch64")
    at = image.index(tell)
    assert image[at + len(tell) :].startswith(libcuda_stub.WORDS.encode() + b"\0")


# --- loaded -------------------------------------------------------------------------------------------------------


def in_a_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@here
def test_every_function_answers_that_there_is_no_device(tmp_path):
    path = tmp_path / "other.so"
    path.write_bytes(libcuda_stub.shared_object(NAMES, platform.machine()))
    program = f"""
import ctypes
library = ctypes.CDLL({str(path)!r})
print([getattr(library, name)(0) for name in {NAMES!r} if name != "cuGetErrorString"])
text = ctypes.c_char_p()
print(library.cuGetErrorString(100, ctypes.byref(text)), text.value.decode())
print(hasattr(library, "cuMemFree"))
"""
    assert in_a_process(program) == "[100, 100, 100]\n0 no CUDA-capable device is detected\nFalse\n"


PROVIDE = """
import ctypes, os, subprocess, sys
from pathlib import Path
from glmpp.dryrun.pretend import libcuda_stub
before = set(os.listdir("/proc/self/fd"))
environment = dict(os.environ)
libcuda_stub.provide(sys.argv[1])
"""
absent = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], capture_output=True).returncode
    == 0,
    reason="a real driver is here",
)


@here
@absent
def test_it_is_loaded_by_name_and_leaves_no_file_no_descriptor_and_no_variable(tmp_path):
    program = (
        PROVIDE
        + """
ctypes.CDLL("libcuda.so.1")
print(libcuda_stub.is_stand_in, set(os.listdir("/proc/self/fd")) == before, dict(os.environ) == environment)
print([line.split()[-1] for line in open("/proc/self/maps") if "libcuda.so" in line][:1])
child = "import ctypes; ctypes.CDLL('libcuda.so.1')"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stderr.splitlines()[-1])
pid = os.fork()
if pid == 0:
    os._exit(ctypes.CDLL("libcuda.so.1") is None)
print(os.waitpid(pid, 0)[1])
"""
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "True True True", done.stderr
    assert lines[1] == "['(deleted)']", "it has a name in a file system"
    assert "cannot open shared object file" in lines[2], "a process that this one started sees it"
    assert lines[3] == "0"
    with pytest.raises(OSError, match=r"libcuda\.so\.1"):
        ctypes.CDLL("libcuda.so.1")  # nor does this one


@here
def test_a_driver_that_can_be_loaded_is_taken_and_no_stand_in_is_made(tmp_path):
    """A library of the driver's name on the loader's path, as a machine with a GPU has it."""
    (tmp_path / "libcuda.so.1").write_bytes(libcuda_stub.shared_object(["cuReal"], platform.machine()))
    program = PROVIDE + 'print(libcuda_stub.is_stand_in, hasattr(ctypes.CDLL("libcuda.so.1"), "cuReal"))'
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, env=environment)
    assert done.stdout == "False True\n", done.stderr


@absent
def test_another_processor_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(GlmppError, match=r"no stand-in for libcuda\.so\.1 on riscv64 .* use the target cpu"):
        libcuda_stub.provide(tmp_path)


@here
@absent
def test_a_system_that_does_not_load_it_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(libcuda_stub, "shared_object", lambda *args: b"no library")
    with pytest.raises(GlmppError, match=r"cannot be loaded: .* use the target cpu"):
        libcuda_stub.provide(tmp_path)
    assert not libcuda_stub.is_stand_in


# --- what libraries want ------------------------------------------------------------------------------------------


@needs_vllm
@needs_readelf
def test_the_wanted_names_are_those_that_readelf_finds_undefined():
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    expected = set()
    for path in folder.rglob("*.so"):
        if "[libcuda.so.1]" in readelf("--dynamic", path):
            expected |= set(re.findall(r" UND (cu[A-Z]\w*)$", readelf("--dyn-syms", path), re.M))
    assert libcuda_stub.needed_functions(folder) == sorted(expected)
    assert len(expected) > 10


def test_of_other_libraries_nothing_is_wanted(tmp_path):
    """The stand-in itself needs no driver and uses no function."""
    (tmp_path / "some.so").write_bytes(Path(importlib.util.find_spec("_ctypes").origin).read_bytes())
    assert libcuda_stub.needed_functions(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x01\x01" + bytes(200), b"#!/bin/sh\n" * 20])
def test_what_is_no_library_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "odd.so").write_bytes(content)
    with pytest.raises(GlmppError, match=r"odd\.so cannot be read as a shared library"):
        libcuda_stub.wants(tmp_path / "odd.so")
