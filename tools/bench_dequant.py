"""Dequantisation against its peers, in one process: time and peak extra memory at the shapes of GLM-5.1.

Writes data/measurements/dequant_<device>.json with the machine. `make bench`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ.update(VLLM_CONFIGURE_LOGGING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")

import torch
from machine import write

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize, spread
from glmpp.lab.notebook import DATA, GLM_CONFIG
from glmpp.progress import progress_bar

BLOCK = (128, 128)
PASSES, RUNS = 3, 7


def shapes() -> dict[str, tuple[int, int]]:
    """Every FP8 shape of GLM-5.1, under the first tensor that has it, and the square of the usual comparison."""
    found: dict[tuple[int, int], str] = {}
    for spec in Checkpoint.from_config(GLM_CONFIG).values():
        if spec.dtype == "F8_E4M3":
            found.setdefault(spec.shape, spec.name.split(".", 3)[3].removesuffix(".weight"))
    return {"[6144, 6144]": (6144, 6144), **{name: shape for shape, name in found.items()}}


def peers() -> dict:
    """name -> function(weight, scale, out, result) returning bfloat16; `result` is what the copy copies."""
    functions = {
        "copy of the BF16 result": lambda w, s, out, result: out.copy_(result),
        "glmpp, into out=": lambda w, s, out, result: dequantize(w, s, BLOCK, out=out),
        "glmpp, fresh output": lambda w, s, out, result: dequantize(w, s, BLOCK),
        "naive expression": lambda w, s, out, result: (w.float() * spread(s, w.shape, BLOCK)).to(torch.bfloat16),
    }
    with contextlib.suppress(ImportError):
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_dequantize

        shape = GroupShape(*BLOCK)
        functions["vLLM scaled_dequantize"] = lambda w, s, out, result: scaled_dequantize(w, s, shape, torch.bfloat16)
    with contextlib.suppress(ImportError):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        convert = Fp8Dequantize(None)._dequantize_one
        functions["transformers Fp8Dequantize"] = lambda w, s, out, result: convert(w, s, torch.bfloat16)
    with contextlib.suppress(ImportError):
        from compressed_tensors.quantization.lifecycle.forward import dequantize as compressed

        functions["compressed-tensors"] = lambda w, s, out, result: compressed(w, s, dtype=torch.bfloat16)
    return functions


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024


def peak_extra(call, device: str) -> int | None:
    """Growth of the peak memory over one call, in bytes: resident set on the CPU, allocator on the GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # peak := current, proc(5)
    before = status("VmRSS:")
    call()
    return status("VmHWM:") - before


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    functions = peers()
    rows: dict[tuple[str, str], dict] = {}
    times: dict[tuple[str, str], list[float]] = {}
    # Several passes over all shapes, the peers in turn: a slow stretch of the machine then meets every peer, and no
    # shape has all its runs in it.
    for name, (height, width) in progress_bar([*shapes().items()] * PASSES, "dequantisation"):
        weight, scale = quantize(torch.randn(height, width, generator=torch.Generator().manual_seed(0)) * 0.02, BLOCK)
        weight, scale = weight.to(device), scale.to(device)
        result = dequantize(weight, scale, BLOCK)
        out = torch.empty_like(result)
        calls = {peer: partial(function, weight, scale, out, result) for peer, function in functions.items()}
        for peer, call in list(calls.items()):
            row = rows.setdefault((name, peer), {"tensor": name, "shape": [height, width], "peer": peer})
            try:
                row["same_bits_as_glmpp"] = torch.equal(call().view(torch.int16), result.view(torch.int16))
            except (AssertionError, RuntimeError, ValueError) as error:
                row["refuses"] = type(error).__name__
                del calls[peer]
                continue
            row.update(output_bytes=result.nbytes, peak_extra_bytes=peak_extra(call, device))
        for _ in range(RUNS):
            for peer, call in calls.items():
                times.setdefault((name, peer), []).append(seconds(call, device))
    for key, measured in times.items():
        rows[key].update(seconds_median=statistics.median(measured), seconds_min=min(measured))
    packages = ("torch", "vllm", "transformers", "compressed-tensors")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU only"
    target = write(f"dequant_{device}", list(rows.values()), packages, name, cache="warm", runs=PASSES * RUNS)
    print(f"{target.relative_to(DATA.parent)}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
