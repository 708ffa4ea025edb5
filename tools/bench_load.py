"""Loading one rank of the all-names checkpoint against its peers. `make bench`.

    python tools/bench_load.py stage      # a stage of PP=8, warm: whole loads, and the readers alone
    python tools/bench_load.py experts    # a rank of EP=8, warm and cold: whole loads
    python tools/bench_load.py sizes      # a stage of PP=1, 8 and 16, warm: whole loads

Each writes a file in data/measurements with the machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import machine
import torch

from glmpp.dryrun.deployment import Deployment
from glmpp.formats.shard import read_shard
from glmpp.lab.load_time import FLOOR, GLMPP, STOCK, load_times, measure
from glmpp.lab.notebook import all_names_checkpoint
from glmpp.partition import OTHER_STAGE, make_stages
from glmpp.progress import progress_bar

PP_SIZE, RANK, RUNS = 8, 3, 5
SIZES = (1, 8, 16)
# The small checkpoint has four heads: eight ranks share its experts as replicas of the rest.
SPREAD, REPLICA, SPREAD_RUNS = Deployment(dp=8, ep=True), 3, 3


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


def experts() -> None:
    """Seconds of whole loads, warm; bytes that are read, by what is in the page cache after a cold one."""
    checkpoint, rows = all_names_checkpoint(), []
    for cache, runs in (("warm", SPREAD_RUNS), ("cold", 1)):
        ran = [SPREAD.run(0, 0, REPLICA)]
        for form, filtered in ((STOCK, False), (STOCK, True), (GLMPP, False)):
            times = measure(checkpoint, SPREAD, ran, form, runs, cache, filtered=filtered)
            ((_, row),) = times.median(cache).iterrows()
            form += ", filter of experts on" * filtered  # `--enable-ep-weight-filter`
            said = {"seconds_median": float(row.total), "tensors": int(row.tensors), "bytes": int(row.bytes_handed)}
            read = {} if cache == "warm" else {"bytes_read": int(row.bytes_read)}
            rows.append({"peer": f"load, {form}", "cache": cache, **said, **read})
    what = f"rank {REPLICA} of 8 that share the experts ({SPREAD.layout})"
    write("load_experts_cpu", checkpoint, what, {"runs": SPREAD_RUNS}, rows)


def sizes() -> None:
    """Names, bytes and shards that a middle stage is handed, and seconds, with vLLM's loader and behind the filter."""
    checkpoint, rows = all_names_checkpoint(), []
    load = os.getloadavg()[0]
    for size in SIZES:
        rank = 3 * size // 8
        for (_, form), row in (
            load_times(checkpoint, size, [rank], {STOCK: SPREAD_RUNS, GLMPP: SPREAD_RUNS}).median().iterrows()
        ):
            said = {"seconds_median": float(row.total), "tensors": int(row.tensors), "bytes": int(row.bytes_handed)}
            peer = f"PP={size}, stage {rank}, {form}"
            files = int(row.files_opened) or None  # not counted at PP=1, where vLLM's own reader is at work
            rows.append({"peer": peer, "pp_size": size, "format": form, **said, "files": files})
    how = {"cache": "warm", "runs": SPREAD_RUNS, "load_average_before": round(load, 1)}
    write("load_stages_cpu", checkpoint, "a stage in the middle", how, rows)


def write(name: str, checkpoint, what: str, how: dict, rows: list[dict], *packages: str) -> None:
    told = f"{len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:.2f} GB, {what}"
    machine.write(name, rows, ("torch", "vllm", "safetensors", *packages), checkpoint=told, **how)
    for row in rows:
        print(f"{row['peer']:<45}{row['seconds_median']:>9.3f} s")


def stage() -> None:
    checkpoint = all_names_checkpoint()
    stage = make_stages(checkpoint.config, PP_SIZE)[RANK]
    specs = [spec for spec in checkpoint.values() if stage.owner(spec.name) != OTHER_STAGE]
    wanted, files = {s.name for s in specs}, [checkpoint.directory / file for file in dict.fromkeys(s.file for s in specs)]
    size = sum(spec.nbytes for spec in specs)
    rows = []

    for reader in (None, "runai_streamer", "fastsafetensors"):
        for form in (GLMPP,) if reader else (STOCK, GLMPP, FLOOR):
            deployment = Deployment(PP_SIZE)
            times = measure(checkpoint, deployment, [deployment.run(RANK)], form, RUNS, "warm", reader=reader)
            ((_, row),) = times.median().iterrows()
            peer = f"load, {form}" + (f" with {reader}" if reader else "")
            said = {"seconds_median": float(row.total), "tensors": int(row.tensors), "bytes": int(row.bytes_handed)}
            rows.append({"peer": peer, **said})

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
    how = {"cache": "warm", "runs": RUNS}
    readers = ("runai-model-streamer", "fastsafetensors")
    write("load_cpu", checkpoint, f"stage {RANK} of {PP_SIZE}", how, rows, *readers)


def main() -> int:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    parts = {"stage": stage, "experts": experts, "sizes": sizes}
    for name in sys.argv[1:] or parts:
        parts[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
