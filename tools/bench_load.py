"""Loading one stage of the all-names checkpoint against its peers, warm: whole loads, and the readers alone.

Writes data/measurements/load_cpu.json with the machine. `make bench`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version

import torch
from machine import processor

from glmpp.formats.shard import read_shard
from glmpp.lab.notebook import DATA, all_names_checkpoint
from glmpp.partition import OTHER_STAGE, make_stages
from glmpp.progress import progress_bar
from glmpp.verdict.load_time import FLOOR, GLMPP, STOCK, load_times

PP_SIZE, RANK, RUNS = 8, 3, 5


def by_glmpp(files, wanted):
    for file in files:
        yield from read_shard(file, wanted.__contains__)


def by_safetensors(files, wanted):
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name in wanted:
                    yield name, shard.get_tensor(name)


def by_runai(files, wanted):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        yield from ((name, tensor) for name, tensor in streamer.get_tensors() if name in wanted)


def by_fastsafetensors(files, wanted):
    from fastsafetensors import fastsafe_open

    for file in files:
        with fastsafe_open(filenames=[str(file)], nogds=True, device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name in wanted:
                    yield name, shard.get_tensor(name)


READERS = {
    "glmpp read_shard": by_glmpp,
    "safetensors, wanted names": by_safetensors,
    "runai-model-streamer": by_runai,
    "fastsafetensors, no GDS": by_fastsafetensors,
}


def copy_all(pairs, into: torch.Tensor) -> int:
    """Copy every tensor's bytes one after another into a buffer, as a model's parameters would receive them."""
    at = 0
    for _, tensor in pairs:
        flat = tensor.reshape(-1).view(torch.uint8)
        into[at : at + len(flat)].copy_(flat)
        at += len(flat)
    return at


def main() -> int:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    checkpoint = all_names_checkpoint()
    stage = make_stages(checkpoint.config, PP_SIZE)[RANK]
    specs = [spec for spec in checkpoint.values() if stage.column(spec.name) != OTHER_STAGE]
    wanted, files = {s.name for s in specs}, [checkpoint.directory / file for file in dict.fromkeys(s.file for s in specs)]
    size = sum(spec.nbytes for spec in specs)
    rows = []

    for reader in (None, "runai_streamer", "fastsafetensors"):
        times = load_times(checkpoint, PP_SIZE, [RANK], (GLMPP,) if reader else (STOCK, GLMPP, FLOOR), "warm", RUNS, reader)
        for (_, form), row in times.median().iterrows():
            peer = f"load, {form}" + (f" with {reader}" if reader else "")
            rows.append(
                {
                    "peer": peer,
                    "seconds_median": float(row.total),
                    "tensors": int(row.tensors),
                    "bytes": int(row.bytes_handed),
                }
            )

    into = torch.zeros(size, dtype=torch.uint8)
    source = torch.ones(size, dtype=torch.uint8)
    calls = {name: lambda read=read: copy_all(read(files, wanted), into) for name, read in READERS.items()}
    calls["copy of as many bytes, memory to memory"] = lambda: len(into.copy_(source))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for _ in progress_bar(range(RUNS + 1), "readers"):
        for name, call in calls.items():
            started = time.perf_counter()
            moved = call()
            measured[name].append(time.perf_counter() - started)
            assert moved == size, (name, moved, size)
    for name, seconds in measured.items():
        rows.append(
            {
                "peer": name,
                "seconds_median": statistics.median(seconds[1:]),
                "tensors": len(wanted),
                "bytes": size,
                "GB_per_second": size / statistics.median(seconds[1:]) / 1e9,
            }
        )
    machine = {
        "device": "CPU only",
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "vllm", "safetensors", "runai-model-streamer", "fastsafetensors")},
        "checkpoint": f"{len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:.2f} GB, stage {RANK} of {PP_SIZE}",
        "date": time.strftime("%Y-%m-%d"),
        "cache": "warm",
        "runs": RUNS,
    }
    target = DATA / "measurements" / "load_cpu.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    target.write_text(f'{{"machine": {json.dumps(machine)},\n"rows": [\n{lines}\n]}}\n')
    for row in rows:
        print(f"{row['peer']:<45}{row['seconds_median']:>9.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
