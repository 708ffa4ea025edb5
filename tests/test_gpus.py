"""Which GPU a target says, and which one is here: by what nvidia-smi says, and never another in its place."""

from __future__ import annotations

import os
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmpp import gpus
from glmpp.dryrun import server
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit, Memory
from glmpp.dryrun.stage_report import LOADS
from glmpp.errors import GlmppError
from glmpp.gpus import ARCHITECTURES, CPU, GPUS, default_target, gpu_of, target_name
from glmpp.layouts.layout import Layout, Layouts

MIB, GIB = 2**20, 2**30

# --- what a target says -------------------------------------------------------------------------------------------


def test_a_target_goes_by_its_name_or_by_its_architecture():
    asked = ("h100", "H200", "cpu", "CPU", "sm80", "sm90", "gfx942", "SM100", "sm89", "sm86", "sm103", "sm120", "sm121")
    taken = ("h100", "h200", "cpu", "cpu", "a100", "h100", "mi300x", "b200", "l40s", "a10", "b300", "rtx5090", "gb10")
    assert tuple(target_name(name) for name in asked) == taken


@pytest.mark.parametrize(
    ("asked", "taken", "mib"),
    [
        ("a100:40", "a100:40", 40960),
        ("A100:40GB", "a100:40", 40960),
        ("a100:40960MiB", "a100:40", 40960),
        ("a100:80", "a100", 81920),
        ("a100:60", "a100:61440MiB", 61440),
        ("a100:40536MiB", "a100:40536MiB", 40536),
        ("l40s:48", "l40s", 46068),
        ("l40s:49152MiB", "l40s:49152MiB", 49152),
        ("gh200:96", "gh200", 97871),
        ("gh200:144", "gh200:144", 145920),
        ("h100:94", "h100:96256MiB", 96256),
        ("mi300x:128", "mi300x:131072MiB", 131072),
        ("sm75:16", "sm75:16384MiB", 16384),
        ("sm90:80", "sm90:81920MiB", 81920),
        ("SM75:15360mib:Tesla T4", "sm75:15360MiB:Tesla T4", 15360),
        ("sm121:119GB:a: b", "sm121:121856MiB:a: b", 121856),
    ],
)
def test_a_memory_in_gb_is_the_cards_and_in_mib_it_is_itself(asked, taken, mib):
    assert target_name(asked) == taken and gpu_of(asked).memory == mib * MIB
    assert Deployment(2, gpu=asked).gpu == taken


def test_another_memory_leaves_the_rest_as_it_is():
    whole, half = gpu_of("a100"), gpu_of("a100:60")
    assert (half.title, half.architecture, half.multiprocessors) == (whole.title, "sm80", whole.multiprocessors)
    assert gpu_of("a100:40").title == "NVIDIA A100-SXM4-40GB"
    made = gpu_of("sm75:15360MiB:Tesla T4")
    assert (made.title, made.capability, made.architecture) == ("Tesla T4", (7, 5), "sm75")
    assert gpu_of("sm121:100").capability == (12, 1)


@given(
    st.one_of(
        st.sampled_from([*GPUS, *{gpu.architecture for gpu in GPUS.values()}]),
        st.builds(
            "{}:{}{}".format,
            st.sampled_from([name for name in (*GPUS, *ARCHITECTURES) if ":" not in name and name != "gfx942"]),
            st.integers(1, 1024),
            st.sampled_from(["", "GB"]),
        ),
        st.builds(
            "{}:{}MiB{}".format,
            st.sampled_from([name for name in ARCHITECTURES if name != "gfx942"]),
            st.integers(1024, 2**20),
            st.sampled_from(["", ":Tesla T4", ":NVIDIA A100-SXM4-80GB MIG 1g.10gb", ":(c) 100% -_/: é"]),
        ),
    )
)
def test_a_targets_own_name_says_all_of_it(asked):
    """What a report keeps, and what a child process is told, makes the same GPU again."""
    gpu = gpu_of(asked)
    assert gpu_of(gpu.name) == gpu and target_name(gpu.name) == gpu.name
    assert gpu.architecture in ARCHITECTURES and gpu.memory >= GIB


@pytest.mark.parametrize(
    "name", ["", "h300", "90", "sm75", "cuda", "sm61", "sm61:11", "cpu:3", "gfx90a:3", ":40", "a100:40:x"]
)
def test_an_unknown_target_is_an_error_that_lists_the_known(name):
    with pytest.raises(GlmppError, match=rf"{re.escape(repr(name))} is not known: choose one of a100, .*b200.*sm90.*cpu"):
        Deployment(2, gpu=name)


@pytest.mark.parametrize(
    "size",
    ["", "x", "-1", "nan", "inf", "0", "1e3", "40.5", " 40", "1025", "99999999", "0MiB", "1023MiB", "1048577MiB", "٤٠"],
)
@pytest.mark.parametrize("head", ["a100", "sm75"])
def test_a_memory_that_is_none_is_an_error_that_says_how_to_say_one(head, size):
    with pytest.raises(GlmppError, match=rf"{re.escape(repr(size))} is no memory; say GB or MiB, e\.g\. {head}:24"):
        Deployment(2, gpu=f"{head}:{size}")


@pytest.mark.parametrize("title", ["", "  ", "T4\n", "T\x1b4", "T" * 101])
def test_a_title_that_no_driver_says_is_an_error(title):
    with pytest.raises(GlmppError, match="is no name of a GPU"):
        gpu_of(f"sm75:16:{title}x" if title.endswith("\n") else f"sm75:16:{title}")


def test_every_gpu_of_the_table_has_its_architectures_limits():
    """Shared memory of a block and of a multiprocessor: all but 1 KiB from compute capability 8.0 on, all of it before."""
    assert all(gpu.limits and gpu.name == name and name.islower() for name, gpu in GPUS.items())
    for name, one in ARCHITECTURES.items():
        kept = 1 if name.startswith("sm") and int(name[2:]) >= 80 else 0
        assert one.shared_memory_in_all - one.shared_memory == kept and one.threads in (1024, 1536, 2048)
    assert len({(gpu.title, gpu.capability, gpu.memory) for gpu in GPUS.values()}) == len(GPUS)


# --- which one is here --------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts a script in the place of nvidia-smi."""

    def install(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    default_target.cache_clear()
    yield install
    default_target.cache_clear()


def says(*lines: str) -> str:
    return "\n".join(["cat <<'END'", *lines, "END"])


@pytest.mark.parametrize(
    ("said", "target"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, Disabled", "h100"),
        ("NVIDIA H200, 9.0, 143771 MiB, Disabled", "h200"),
        ("NVIDIA A100-SXM4-80GB, 8.0, 81920 MiB, Disabled", "a100"),
        ("NVIDIA A100-SXM4-40GB, 8.0, 40960 MiB, Disabled", "a100:40"),
        ("NVIDIA A100-PCIE-40GB, 8.0, 40960 MiB, Disabled", "sm80:40960MiB:NVIDIA A100-PCIE-40GB"),
        ("NVIDIA A100-SXM4-40GB, 8.0, 40536 MiB", "sm80:40536MiB:NVIDIA A100-SXM4-40GB"),
        ("NVIDIA GH200 480GB, 9.0, 97871 MiB, Disabled", "gh200"),
        ("NVIDIA H100 PCIe, 9.0, 81559 MiB, Disabled", "sm90:81559MiB:NVIDIA H100 PCIe"),
        ("NVIDIA A10, 8.6, 23028 MiB, [N/A]", "a10"),
        ("NVIDIA GeForce RTX 3090, 8.6, 24576 MiB, [N/A]", "sm86:24576MiB:NVIDIA GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, [N/A]", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU, 8.9, 16376 MiB, [N/A]", "sm89:16376MiB:NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("Tesla V100-SXM2-32GB, 7.0, 32768 MiB, [N/A]", "sm70:32768MiB:Tesla V100-SXM2-32GB"),
        ("Tesla T4, 7.5, 15360 MiB, [N/A]", "sm75:15360MiB:Tesla T4"),
        ("NVIDIA B300 SXM6 AC, 10.3, 275040 MiB, Disabled", "b300"),
        ("NVIDIA GeForce RTX 5090, 12.0, 32607 MiB, [N/A]", "rtx5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition, 12.0, 97887 MiB, Disabled", "rtx-pro-6000"),
        (
            "NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 12.0, 97887 MiB, Disabled",
            "sm120:97887MiB:NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        ),
        ("NVIDIA GB10, 12.1, [N/A], [N/A]", "gb10"),
        ("NVIDIA GB10, 12.1, [Not Supported]", "gb10"),
        ("GRID A100-10C, 8.0, 10240 MiB, [N/A]", "sm80:10240MiB:GRID A100-10C"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb, 8.0, 9856 MiB", "sm80:9856MiB:NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        ("Maker, Model 2, 9.0, 81559 MiB, Disabled", "sm90:81559MiB:Maker, Model 2"),
    ],
)
def test_the_gpu_that_is_here_is_the_default_with_its_own_title_architecture_and_memory(said, target, driver):
    for lines in ([said], [said] * 8, ["", said, "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"]):
        default_target.cache_clear()
        driver(says(*lines))
        assert Deployment(1).gpu == target
    title, capability, memory = re.fullmatch(r"(.+), (\d+\.\d), (\d+ MiB|\[.+?\]).*", said).groups()
    gpu = gpu_of(target)
    assert gpu.title == title and gpu.capability == tuple(map(int, capability.split(".")))
    assert gpu.memory == (122548 if memory[0] == "[" else int(memory.split()[0])) * MIB


def test_every_gpu_of_the_table_is_known_when_it_is_here(driver):
    for gpu in GPUS.values():
        if gpu.gfx is None:
            default_target.cache_clear()
            major, minor = gpu.capability
            driver(says(f"{gpu.title}, {major}.{minor}, {gpu.memory // MIB} MiB, [N/A]"))
            assert default_target() == gpu.name


BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    "script",
    [says("No devices were found"), says("No devices were found") + "\nexit 6", "exit 0", says(BROKEN) + "\nexit 9"],
)
def test_where_there_is_no_gpu_the_default_is_the_reports(script, driver):
    driver(script)
    assert Deployment(1).gpu == "h200"


def test_where_there_is_no_nvidia_smi_the_default_is_the_reports(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("not a program")
    monkeypatch.setenv("PATH", str(tmp_path))
    default_target.cache_clear()
    assert Deployment(1).gpu == "h200"
    default_target.cache_clear()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            says("NVIDIA H200, 9.0, 143771 MiB, Disabled", "NVIDIA A100-SXM4-40GB, 8.0, 40960 MiB, Disabled"),
            "differ: .*H200.*A100",
        ),
        (says("NVIDIA L40S, 8.9, 46068 MiB, [N/A]", "NVIDIA L40S, 8.9, 49140 MiB, [N/A]"), "differ"),
        (says("NVIDIA A100-SXM4-80GB, 8.0, 81920 MiB, Enabled"), r"cut into slices \(MIG\)"),
        (says("NVIDIA A100-SXM4-80GB, 8.0, [Insufficient Permissions], Enabled"), "is no GPU with"),
        (says("NVIDIA H200, 9.0, [N/A], Disabled"), "does not say how much memory"),
        (says("NVIDIA Thor, 11.0, [N/A], [N/A]"), "does not say how much memory it has; e.g. sm110:64"),
        (says("NVIDIA H200, 9.0"), "is no GPU with"),
        (
            says("NVIDIA GeForce GTX 1080 Ti, 6.1, 11264 MiB, [N/A]"),
            "knows no GPU like this one: NVIDIA GeForce GTX 1080 Ti",
        ),
        (says("NVIDIA Z900, 17.0, 999999 MiB, Disabled"), "knows no GPU like this one"),
        (says("NVIDIA H200, 9.0, 0 MiB, Disabled"), "knows no GPU like this one"),
        (says("NVIDIA H200, 9.0, 99999999 MiB, Disabled"), "knows no GPU like this one"),
        (says("NVIDIA H\x1b200, 9.0, 143771 MiB, Disabled"), "knows no GPU like this one"),
        (
            says("NVIDIA H200, 9.0, 143771 MiB, Disabled", "[GPU is lost], [GPU is lost], [GPU is lost]"),
            "says '.GPU is lost",
        ),
        (says("hello"), "says 'hello'"),
        ("head -c 3000 /dev/urandom; echo; exit 3", "ends with 3"),
        ("printf '\\377\\376\\000'", "is no GPU with"),
        (says(BROKEN) + "\nexit 18", "ends with 18: .*communicate with the NVIDIA driver"),
        ("echo Failed >&2; exit 255", "ends with 255: 'Failed'"),
        ("kill -9 $$", "ends with -9"),
    ],
)
def test_a_driver_that_does_not_say_which_gpu_is_here_is_an_error_that_asks_for_it(script, why, driver, capsys):
    driver(script)
    with pytest.raises(GlmppError, match=rf"(?s){why}.*: say which GPU is meant with --gpu") as told:
        Deployment(1)
    assert len(str(told.value)) < 600
    assert Deployment(1, gpu="a100:40").gpu == "a100:40" and Deployment(1, gpu=CPU).gpu == CPU  # then nobody is asked


def test_a_driver_that_hangs_is_given_up(driver, monkeypatch, tmp_path):
    """Whatever holds its output open: a child of it is still there when the error comes."""
    monkeypatch.setattr(gpus, "PATIENCE", 2)
    driver(f"sleep 600 & echo $! >{tmp_path}/child; exec sleep 600")
    with pytest.raises(GlmppError, match=r"does not answer within 2 s: say which GPU is meant"):
        Deployment(1)
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)  # raises if it has ended
    os.kill(child, signal.SIGKILL)


def test_an_nvidia_smi_that_is_no_program_is_an_error(driver, tmp_path):
    driver("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF")
    with pytest.raises(GlmppError, match=r"cannot be run \(.+\): say which GPU is meant"):
        Deployment(1)


def test_what_the_user_hides_is_here_all_the_same(driver, monkeypatch):
    driver(says("NVIDIA H200, 9.0, 143771 MiB, Disabled", "NVIDIA L4, 8.9, 23034 MiB, [N/A]"))
    for shown in ("0", "1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(GlmppError, match="differ"):
            Deployment(1)
    default_target.cache_clear()
    driver(says("NVIDIA L4, 8.9, 23034 MiB, [N/A]"))
    assert Deployment(1).gpu == "l4"


# --- where targets go ---------------------------------------------------------------------------------------------


def test_layouts_on_a_gpu_that_only_this_machine_has_are_read_back_on_another(tmp_path):
    gpu = gpu_of("sm75:15360MiB:Tesla T4")
    layout = Layout(Deployment(tp=2, gpu=gpu.name), LOADS, "", Fit([Memory(10**9, 0, (), None, 0.9)], gpu), None, 1)
    Layouts([layout], (2, 1024), gpu, None, {}, {"vllm": "0"}, 1.0).save(tmp_path / "saved.json")
    again = Layouts.load(tmp_path / "saved.json")
    assert again.gpu == gpu and again.layouts[0].deployment.gpu == gpu.name and again.layouts[0].fit.gpu == gpu


def test_a_question_that_no_target_has_a_part_in_needs_no_gpu(driver, monkeypatch):
    """Such as how vLLM splits layers, on a machine whose GPUs differ."""
    driver(says("NVIDIA H200, 9.0, 143771 MiB", "NVIDIA L4, 8.9, 23034 MiB"))
    monkeypatch.setattr(server.Server, "current", {})
    monkeypatch.setattr(server.Server, "__init__", lambda self, target: setattr(self, "target", target))
    assert server.Server.running().target == CPU
