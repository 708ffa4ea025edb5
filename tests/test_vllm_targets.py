"""Verdicts on a pretended GPU: the class that runs there, what vLLM chose for it, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from quantised import quantised

import glmpp
from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.gpus import CPU, GPUS, default_target, target_name
from glmpp.verdict import server
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.dry_run import dry_run
from glmpp.verdict.installed import vllm_version
from glmpp.verdict.report import DryRunReport
from glmpp.verdict.stage_report import CANNOT_BUILD, DIES, LOADS
from glmpp.verdict.text import as_text

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="builds the installed vLLM's classes")
release = Version(vllm_version() or "0")
KEY = "layers.{}.self_attn.indexer.wk_weights_proj.weight"
# What a CPU cannot build and a GPU can.
OF_A_CPU = {"MLA attention backend", "MLAAttention", "custom operators", "FP8 linear kernel"}


def run(checkpoint: Checkpoint, gpu: str, pp: int = 2, guard: str = "installed", **options) -> DryRunReport:
    return dry_run(checkpoint, Deployment(pp, guard=guard, gpu=gpu), progress=False, **options)


def evidence(report: DryRunReport) -> list[tuple]:
    """What a stage dies of and where, as far as it does not depend on the target."""
    return [(one.label, one.verdict, one.exception, one.key, one.tensor, one.place, one.model_class) for one in report.all]


# --- names --------------------------------------------------------------------------------------------------------


def test_a_target_goes_by_its_name_or_by_its_architectures():
    assert [target_name(name) for name in ("h100", "H200", "cpu", "sm80", "sm90", "gfx942")] == [
        *("h100", "h200", "cpu", "a100", "h100", "mi300x")
    ]
    assert Deployment(2, gpu="sm100").gpu == "b200"


@pytest.mark.parametrize("name", ["", "h300", "90", "sm75", "cuda"])
def test_an_unknown_target_is_an_error_that_lists_the_known(name):
    with pytest.raises(GlmppError, match=r"is not known: choose one of a100, .*b200.*sm90.*cpu"):
        Deployment(2, gpu=name)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0", "h100"),
        ("NVIDIA H200, 9.0\nNVIDIA H200, 9.0", "h200"),
        ("NVIDIA A100-PCIE-40GB, 8.0", "a100"),
        ("NVIDIA GeForce RTX 4090, 8.9", "l40s"),  # the same architecture
        ("Tesla T4, 7.5", "h200"),
        ("No devices were found", "h200"),
        ("", "h200"),
    ],
)
def test_the_default_is_the_gpu_that_is_here(said, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    default_target.cache_clear()
    try:
        assert Deployment(1).gpu == expected
    finally:
        default_target.cache_clear()


# --- GLM-5.1 at full size -----------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.skipif(release != Version("0.22.1"), reason="pins what the last affected release does")
def test_full_size_the_affected_release_dies_on_a_gpu_as_on_a_cpu(full):
    on_gpu, on_cpu = run(full, "h200", 8, control=False), run(full, CPU, 8, control=False)
    assert evidence(on_gpu) == evidence(on_cpu)
    assert [one.key for one in on_gpu.stages] == [KEY.format(9)] + [KEY.format(0)] * 7
    assert {one.place for one in on_gpu.stages} == {"vllm/model_executor/models/deepseek_v2.py:774"}
    assert not OF_A_CPU & on_gpu.stand_ins.keys() and OF_A_CPU & on_cpu.stand_ins.keys()
    layers = [len(one.stage.layers) for one in on_gpu.stages]
    attention = [one.backends["attention"] for one in on_gpu.stages]
    assert attention == [{"DEEPSEEK_V32_INDEXER": number, "FLASHMLA_SPARSE": number} for number in layers]


@needs_vllm
@pytest.mark.skipif(release < Version("0.33"), reason="the class was not chosen by platform")
def test_full_size_the_class_is_the_one_for_nvidia_and_every_stage_loads(full, side_by_side):
    side_by_side(2)
    report = run(full, "h200", 8)
    assert {one.verdict for one in report.all} == {LOADS} and report.peak_rss_bytes < 1.6e9
    assert {one.model_class for one in report.all} == {"vllm.models.deepseek_v32.nvidia.model.DeepseekV32ForCausalLM"}
    assert not OF_A_CPU & report.stand_ins.keys()
    assert run(full, CPU, 1).stages[0].model_class.startswith("vllm.model_executor.models.deepseek_v2.")


@needs_vllm
def test_full_size_the_load_format_loads_every_stage_of_the_gpus_class(full):
    report = run(full, "h200", 8, guard="loader", ranks=[0, 3, 7], control=False)
    for one in report.stages:
        assert one.verdict == LOADS, one.message
        one.ledger.check(full, one.stage)


@needs_vllm
@pytest.mark.skipif(release < Version("0.33"), reason="AMD's class came later")
def test_on_amd_the_class_is_amds(tiny):
    report = run(tiny, "mi300x")
    assert {one.verdict for one in report.all} == {LOADS}, report.stages[0].message
    assert {one.model_class for one in report.all} == {"vllm.models.deepseek_v32.amd.model.DeepseekV32ForCausalLM"}
    assert "aiter" in report.stand_ins["AMD's libraries"]


# --- bytes --------------------------------------------------------------------------------------------------------


@needs_vllm
def test_real_bytes_of_the_gpus_class_are_those_of_pp_1_and_of_the_cpus_class(tiny):
    whole, on_cpu = (run(tiny, gpu, 1, "loader", weights="real").stages[0] for gpu in ("h200", CPU))
    found: dict[str, str] = {}
    for one in run(tiny, "h200", 3, "loader", weights="real", control=False).stages:
        assert one.verdict == LOADS and one.device == "cpu", one.message
        found |= one.digests
    assert found == whole.digests and len(found) > 200
    if whole.model_class == on_cpu.model_class:
        assert whole.digests == on_cpu.digests
    else:  # another class, the same parameters under other names
        assert sorted(whole.digests.values()) == sorted(on_cpu.digests.values())


# --- refusals -----------------------------------------------------------------------------------------------------


@needs_vllm
def test_what_vllm_refuses_on_one_gpu_and_not_on_another_is_told_of_each(tiny):
    """DeepSeek's sparse attention has no kernel for an A100."""
    there, here = run(tiny, "a100"), run(tiny, "h200")
    assert {one.verdict for one in there.all} == {CANNOT_BUILD}
    assert there.control.message.startswith("No valid attention backend found for cuda")
    assert "compute capability not supported" in there.control.message and there.control.refused
    assert here.control.verdict == LOADS and {one.verdict for one in here.stages} <= {LOADS, DIES}
    assert "GPU: a100" in as_text(tiny, there) and "nor does PP=1" in as_text(tiny, there)


@needs_vllm
def test_each_gpu_has_kernels_of_its_own():
    checkpoint = quantised("fp8, blocks", "dense")
    chosen = {}
    for gpu in ("a100", "h200", "b200"):
        report = run(checkpoint, gpu)
        assert report.loads
        (chosen[gpu],) = report.control.backends["linear"]
    assert len(set(chosen.values())) == 3 and "Marlin" in chosen["a100"], chosen


# --- changed copies of the package --------------------------------------------------------------------------------

PROGRAM = """
import sys
import glmpp
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.dry_run import dry_run
checkpoint = glmpp.Checkpoint.from_directory(sys.argv[1])
for gpu in sys.argv[2:]:
    try:
        report = dry_run(checkpoint, Deployment(2, gpu=gpu), progress=False)
        print(gpu, report.control.verdict)
    except glmpp.GlmppError as error:
        print(gpu, str(error).splitlines()[-1])
"""


def changed(tmp_path: Path, file: str, old: str, new: str) -> dict[str, str]:
    """An environment whose glmpp is a copy with a change in one file."""
    copy = tmp_path / "glmpp"
    shutil.copytree(Path(glmpp.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / file).read_text()
    assert source.count(old) == 1
    (copy / file).write_text(source.replace(old, new))
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    return {**os.environ, "PYTHONPATH": path, server.SHARED: ""}


def said(environment: dict[str, str], tiny: Checkpoint, *gpus: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, tiny.directory, *gpus]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_vllm
@pytest.mark.mutation
def test_another_capability_would_be_seen(tiny, tmp_path):
    environment = changed(tmp_path, "gpus.py", '"NVIDIA H200", (9, 0)', '"NVIDIA H200", (8, 0)')
    assert said(environment, tiny, "h200") == [f"h200 {CANNOT_BUILD}"]


@needs_vllm
def test_without_the_stand_in_library_the_error_says_so_and_the_cpu_still_works(tiny, tmp_path):
    environment = changed(tmp_path, "engine/driver.py", "file.write(image)", "file.write(b'')")
    broken, works = said(environment, tiny, "h200", CPU)
    assert "the stand-in for libcuda.so.1 cannot be loaded" in broken and "use the target cpu" in broken
    assert works == f"cpu {LOADS}"


# --- the process --------------------------------------------------------------------------------------------------


@needs_vllm
def test_the_library_is_in_the_process_of_its_target_alone(tiny):
    """And in memory: its name leads to no file."""
    for gpu in ("h200", CPU):
        run(tiny, gpu, 2, ranks=[0], control=False)
    maps = {
        gpu: Path(f"/proc/{pid}/maps").read_text()
        for gpu in ("h200", CPU)
        if (process := server.Server.running(gpu).process) is not None and (pid := process.pid)
    }
    if not maps:
        pytest.skip("the processes are another's")
    mapped = [line.split(maxsplit=5)[-1] for line in maps["h200"].splitlines() if "libcuda.so" in line]
    assert mapped and all(name.startswith("/memfd:") and name.endswith("(deleted)") for name in mapped)
    assert "libcuda.so" not in maps[CPU]
    with pytest.raises(OSError, match=r"libcuda\.so\.1"):
        ctypes.CDLL("libcuda.so.1")


@needs_vllm
def test_a_report_says_which_gpu_was_pretended_and_what_was_chosen(tiny, tmp_path):
    report = run(tiny, "h200", 2, guard="loader")
    assert report.stand_ins["platform"] == "vLLM's own for NVIDIA, told that the GPU is NVIDIA H200, sm90"
    report.save(tmp_path / "report.json")
    again = DryRunReport.load(tmp_path / "report.json", tiny)
    assert again.deployment.gpu == "h200" and as_text(tiny, again) == as_text(tiny, report)
    text = as_text(tiny, report)
    assert "GPU: h200" in text and "attention: DEEPSEEK_V32_INDEXER, " in text and "linear: Fp8LinearMethod: " in text


# --- on a GPU -----------------------------------------------------------------------------------------------------

REAL = """
import json, sys, torch
from vllm import LLM
from glmpp.engine.choices import choices

seen = torch.cuda.get_device_properties(0)
llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, load_format="glmpp")
print(json.dumps([seen.name, [seen.major, seen.minor], seen.multi_processor_count, llm.apply_model(choices)[0]]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_is_pretended_is_what_the_gpu_here_says_and_what_vllm_chooses_on_it(tiny):
    """Not run yet: no GPU was at hand."""
    gpu = GPUS[default_target()]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    command = [sys.executable, "-c", REAL, str(tiny.directory)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    title, capability, multiprocessors, chosen = json.loads(done.stdout.splitlines()[-1])
    assert (title, tuple(capability), multiprocessors) == (gpu.title, gpu.capability, gpu.multiprocessors)
    assert dry_run(tiny, Deployment(guard="loader"), progress=False).stages[0].backends == chosen
