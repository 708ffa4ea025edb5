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
from glmpp.cli.report_text import as_text
from glmpp.dryrun import server
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.pretend.targets import properties
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, LOADS
from glmpp.errors import GlmppError
from glmpp.gpus import ARCHITECTURES, CPU, GPUS, default_target, gpu_of

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
    assert {one.verdict for one in report.all} == {LOADS} and report.peak_rss_bytes < 1.7e9
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


# --- other GPUs ---------------------------------------------------------------------------------------------------


def test_what_is_pretended_is_what_the_gpu_says():
    """As `torch.cuda.get_device_properties` says it of a T4, an A100 and an L4: read off them by others."""
    names = ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "max_threads_per_multi_processor")
    said = {name: [getattr(properties(gpu_of(name)), each) for each in names] for name in ("sm75:16", "a100:40", "l4")}
    assert said == {"sm75:16": [65536, 65536, 1024], "a100:40": [166912, 167936, 2048], "l4": [101376, 102400, 1536]}
    for gpu in (*GPUS.values(), *(gpu_of(f"{name}:24") for name in ARCHITECTURES if name != "gfx942")):
        seen = properties(gpu)
        assert (seen.name, (seen.major, seen.minor), seen.total_memory) == (gpu.title, gpu.capability, gpu.memory)
        assert 0 < seen.shared_memory_per_block_optin <= seen.shared_memory_per_multiprocessor
        assert seen.is_integrated == (gpu.architecture in ("sm87", "sm110", "sm121"))


@needs_vllm
@pytest.mark.parametrize(
    ("target", "sparse"),
    [("sm75:15360MiB:Tesla T4", False), ("b300", True), ("gb10", False)],
)
def test_a_gpu_of_another_architecture_has_a_verdict_or_vllms_refusal(target, sparse, tiny, own_server):
    """Of DeepSeek's sparse attention, and of a dense model in block FP8."""
    report = run(tiny, target, guard="loader")
    assert report.loads or ({one.verdict for one in report.all} == {CANNOT_BUILD} and report.control.refused)
    assert release != Version("0.22.1") or report.loads == sparse, report.control.message
    dense = run(quantised("fp8, blocks", "dense"), target)
    assert dense.loads and dense.fit().gpu == gpu_of(target)
    gpu = gpu_of(target)
    assert dense.stand_ins["platform"].endswith(f"told that the GPU is {gpu.title}, {gpu.architecture}")


@needs_vllm
def test_a_gpu_that_is_older_than_vllms_torch_is_an_error_that_says_so(tiny, own_server):
    oldest = min(int(one[3:]) for one in torch._C._cuda_getArchFlags().split())
    if oldest <= 70:
        pytest.skip("this torch has code for a V100")
    with pytest.raises(GlmppError, match=rf"Tesla V100, sm70: torch \S+ of this vLLM is built for sm{oldest} and newer"):
        run(tiny, "sm70:32768MiB:Tesla V100")


@needs_vllm
def test_a_report_of_a_gpu_that_only_one_machine_has_says_the_same_on_another(tiny, tmp_path, own_server):
    target = "sm89:20475MiB:NVIDIA RTX 4000 Ada Generation"
    report = run(quantised("fp8, blocks", "dense"), target)
    report.save(tmp_path / "report.json")
    again = DryRunReport.load(tmp_path / "report.json", quantised("fp8, blocks", "dense"))
    assert again.deployment.gpu == target and again.fit().gpu == report.fit().gpu == gpu_of(target)


# --- changed copies of the package --------------------------------------------------------------------------------

PROGRAM = """
import sys
import glmpp
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
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
    return {**os.environ, "PYTHONPATH": path}


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
    environment = changed(tmp_path, "dryrun/pretend/libcuda_stub.py", "file.write(image)", "file.write(b'')")
    broken, works = said(environment, tiny, "h200", CPU)
    assert "the stand-in for libcuda.so.1 cannot be loaded" in broken and "use the target cpu" in broken
    assert works == f"cpu {LOADS}"


# --- the process --------------------------------------------------------------------------------------------------


@needs_vllm
def test_the_library_is_in_the_process_of_its_target_alone(tiny):
    """And in memory: its name leads to no file."""
    for gpu in ("h200", CPU):
        run(tiny, gpu, 2, ranks=[0], control=False)
    pids = {gpu: server.Server.running(gpu).process.pid for gpu in ("h200", CPU)}
    maps = {gpu: Path(f"/proc/{pid}/maps").read_text() for gpu, pid in pids.items()}
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
from glmpp.dryrun.child.selected_kernels import choices

seen = torch.cuda.get_device_properties(0)
llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, load_format="glmpp")
print(json.dumps([seen.name, [seen.major, seen.minor], seen.multi_processor_count, llm.apply_model(choices)[0]]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_is_pretended_is_what_the_gpu_here_says_and_what_vllm_chooses_on_it(tiny):
    """Not run yet: no GPU was at hand."""
    gpu = gpu_of(default_target())
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    command = [sys.executable, "-c", REAL, str(tiny.directory)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    title, capability, multiprocessors, chosen = json.loads(done.stdout.splitlines()[-1])
    assert (title, tuple(capability), multiprocessors) == (gpu.title, gpu.capability, gpu.multiprocessors)
    assert dry_run(tiny, Deployment(guard="loader"), progress=False).stages[0].backends == chosen
