"""How long does a pipeline stage take to load, and what does the time go into? Measured with vLLM's own classes.

Three ways, side by side: vLLM's stock load (with the skip, without which an affected release dies), the load format
"glmpp", and the floor: `load_weights` of the model, handed the stage's tensors from a list in memory.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import question
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.report import check_record
from glmpp.dryrun.workers import ask
from glmpp.errors import GlmppError
from glmpp.partition import make_stages, stage_bytes
from glmpp.progress import progress_bar

STOCK, GLMPP, FLOOR = "stock", "glmpp", "in-memory list"
FILTERED = "stock, filter of experts on"
PARTS = ("choosing", "reading", "dequantising", "vllm")
LAYOUT = ("checkpoint", "pp_size", "tp_size", "dp_size", "ep", "layer_counts")  # of a deployment; the rest has no part in it
READERS = ("safetensors", "runai_streamer", "fastsafetensors")


@dataclass
class LoadTimes:
    """Seconds and bytes of every load.

    Attributes:
        rows: one row per load: rank, format, cache; `total` and its parts `choosing` (from the index), `reading`
            (opening shards, making tensors), `dequantising` (the indexer's helper), `vllm` (everything else: the loop of
            `load_weights`, and the copies into parameters, which is where mapped bytes are read), in seconds; `tensors`
            and `bytes_handed` to the model; `files_opened`; cold only: `bytes_in_cache_before`, `bytes_read`.
        machine: what it was measured on.
        recorded: None for a live run; otherwise when and where it was recorded.
        question: the checkpoint's digest, the layout, the rank of each stage and the reader.
    """

    rows: pd.DataFrame
    machine: dict[str, str]
    recorded: str | None = None
    question: dict = field(default_factory=dict)

    @property
    def source(self) -> str:
        made = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return f"recorded {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def median(self, cache: str = "warm") -> pd.DataFrame:
        """Of each rank and format the load with the median total, so that its parts add up; indexed by both."""
        rows = self.rows[self.rows.cache == cache].sort_values("total")
        groups = rows.groupby(["rank", "format"])
        middle = groups.cumcount() == (groups.total.transform("size") - 1) // 2
        return rows[middle].set_index(["rank", "format"]).sort_index()

    def save(self, path: str | Path) -> None:
        lines = ",\n".join(json.dumps(row) for row in self.rows.to_dict("records"))
        made = f"on {time.strftime('%Y-%m-%d')}"
        head = f'{{"recorded": {json.dumps(made)}, "machine": {json.dumps(self.machine)}'
        head += f', "question": {json.dumps(self.question)}'
        Path(path).write_text(f'{head},\n"rows": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: str | Path) -> LoadTimes:
        content = json.loads(Path(path).read_text())
        return cls(pd.DataFrame(content["rows"]), content["machine"], content["recorded"], content.get("question", {}))

    def only(self, path: str | Path, question: dict, ranks: list[int], cache: str, repeats: dict[str, int]) -> LoadTimes:
        """Of a record the loads that are asked for. Raises GlmppError if it answers another question, or lacks some."""
        check_record(path, question, self.question)
        rows = self.rows[self.rows["rank"].isin(ranks) & (self.rows.cache == cache) & self.rows.format.isin(repeats)]
        counted = rows.groupby(["rank", "format"]).size().to_dict()
        asked = {f"loads of stage {rank}, {form}, {cache}": times for rank in ranks for form, times in repeats.items()}
        found = {
            f"loads of stage {rank}, {form}, {cache}": counted.get((rank, form), 0) for rank in ranks for form in repeats
        }
        check_record(path, asked, found)
        return replace(self, rows=rows.reset_index(drop=True))


def load_times(
    checkpoint: Checkpoint,
    pp_size: int | Deployment,
    ranks: list[int] | None = None,
    formats: tuple[str, ...] = (STOCK, GLMPP, FLOOR),
    cache: str = "warm",
    repeats: int | dict[str, int] = 3,
    reader: str | None = None,
    shard: int = 0,
    replica: int = 0,
    recorded: str | Path | None = None,
    progress: bool | None = None,
) -> LoadTimes:
    """Load stages of a checkpoint folder with the installed vLLM's own classes, in a child process, on the CPU.

    Args:
        checkpoint: from a folder.
        pp_size: pipeline stages, or a deployment.
        ranks: stages to load; default all.
        formats: of STOCK, FILTERED, GLMPP, FLOOR. FILTERED is STOCK with vLLM's filter of experts on. These two have the
            kit's helper in the place of an affected release's.
        cache: "warm": all shards have been read before; "cold": they are dropped from the page cache before each load.
        repeats: loads of each stage, for all formats or by format.
        shard, replica: which rank of each stage.
        reader: the load format's reader, see `glmpp.serving.load_format.StageModelLoader`; GLMPP only.
        recorded: where to save to with GLMPP_RECORD=1, and what to return where vLLM is not installed.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), no folder, or the child broke
            down.
    """
    if checkpoint.directory is None:
        raise GlmppError("load_times needs a checkpoint with files: from_directory, or write_checkpoint")
    if cache not in ("warm", "cold") or (reader is not None and reader not in READERS):
        raise GlmppError(f"cache={cache!r}, reader={reader!r}: choose warm or cold, and one of {', '.join(READERS)}")
    deployment = Deployment.of(pp_size)
    ranks = list(range(deployment.pp)) if ranks is None else ranks
    rows = []
    counted = {form: repeats[form] if isinstance(repeats, dict) else repeats for form in formats}
    layout = {name: value for name, value in question(checkpoint, deployment).items() if name in LAYOUT}
    asked = {**layout, "shard": shard, "replica": replica, "reader": reader}
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError(NO_VLLM)
        return LoadTimes.load(recorded).only(recorded, asked, ranks, cache, counted)
    loads = len(ranks) * sum(counted[form] for form in formats)
    with progress_bar(what=f"loading, {cache}", total=loads, show=progress) as bar:
        for form in formats:
            request = {
                "kind": "load_time",
                "format": form,
                "guard": "helper" if form in (STOCK, FILTERED) else "loader",
                "helper": "glmpp.loader:load_fp8_indexer_wk",
                "callers": None,
                "weights": "real",
                "gpu": "cpu",
                "strict": False,
                "all_deaths": False,
                "tensors": [],
                "layer_counts": deployment.partition,
                "model": str(checkpoint.directory.resolve()),
                "files": sorted({spec.file for spec in checkpoint.values()}),
                "size": deployment.pp,
                "shards": deployment.tp,
                "replicas": deployment.dp,
                "ep": deployment.ep,
                "shard": shard,
                "replica": replica,
                "ranks": ranks,
                "cache": cache,
                "repeats": counted[form],
                "reader": reader if form == GLMPP else None,
            }
            messages = ask(request, bar)
            rows += [message for message in messages if message["kind"] == "load"]
            versions = next(message["versions"] for message in messages if message["kind"] == "ready")
    machine = {**versions, "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, CPU only"}
    times = LoadTimes(pd.DataFrame(rows).drop(columns="kind"), machine, question=asked)
    if recorded is not None and os.environ.get("GLMPP_RECORD") == "1":
        times.save(recorded)
    return times


def project(times: LoadTimes, small: Checkpoint, real: Checkpoint, pp_size: int, bytes_per_second: float) -> pd.DataFrame:
    """What the parts would take at the real size, by arithmetic from what was measured at the small one. Not a measurement.

    Names, tensors and loop turns are as many in both checkpoints, so the seconds of choosing, making tensors and looping
    carry over; what has to move grows with the bytes and is added to "vllm", where mapped bytes are read. The stock load
    is taken to read what its stage keeps plus the rest of every shard it opens, as seen cold at the small size.

    Args:
        times: warm, with every rank.
        bytes_per_second: of the storage, for one stage.

    Returns:
        As `LoadTimes.median()`: (rank, format) -> seconds by part, and `total`.
    """
    table = times.median().drop(index=FLOOR, level="format", errors="ignore")[[*PARTS]].astype(float).copy()
    stages, small_stages = make_stages(real.config, pp_size), make_stages(small.config, pp_size)
    kept, small_kept = stage_bytes(real, stages), stage_bytes(small, small_stages)
    for rank, form in table.index:
        moved = kept[rank] if form == GLMPP else real.nbytes
        table.loc[(rank, form), "vllm"] += moved / bytes_per_second
        table.loc[(rank, form), "dequantising"] *= kept[rank] / small_kept[rank]
    table["total"] = table.sum(axis=1)
    return table
