"""How long does a pipeline stage take to load, and what does the time go into? Measured with vLLM's own classes.

Three ways, side by side: vLLM's stock load (with the skip, without which an affected release dies), the load format
"glmpp", and the floor: `load_weights` of the model, handed the stage's tensors from a list in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import question, stage_request
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.workers import ask
from glmpp.errors import GlmppError
from glmpp.partition import make_stages, stage_bytes
from glmpp.progress import progress_bar

STOCK, GLMPP, FLOOR = "stock", "glmpp", "in-memory list"
FILTERED = "stock, filter of experts on"
PARTS = ("choosing", "reading", "dequantising", "vllm")
LAYOUT = ("checkpoint", "pp_size", "tp_size", "dp_size", "ep", "layer_counts")  # of a deployment; the rest has no part in it
READERS = (None, "safetensors", "runai_streamer", "fastsafetensors")
THREE_EACH = {STOCK: 3, GLMPP: 3, FLOOR: 3}


@dataclass
class LoadTimes:
    """Seconds and bytes of every load.

    Attributes:
        rows: one row per load: rank, format, cache; `total` and its parts `choosing` (from the index), `reading`
            (opening shards, making tensors), `dequantising` (the indexer's helper), `vllm` (everything else: the loop of
            `load_weights`, and the copies into parameters, which is where mapped bytes are read), in seconds; `tensors`
            and `bytes_handed` to the model; `files_opened`; cold only: `bytes_in_cache_before`, `bytes_read`.
        machine: what it was measured on.
        recorded: None for a live run; otherwise when it was recorded.
        question: the checkpoint's digest, the layout, the rank of each stage and the reader.
    """

    rows: pd.DataFrame
    machine: dict[str, str]
    recorded: str | None = None
    question: dict = field(default_factory=dict)

    @property
    def source(self) -> str:
        return records.caption(self.recorded, self.machine)

    def median(self, cache: str = "warm") -> pd.DataFrame:
        """Of each rank and format the load with the median total, so that its parts add up; indexed by both."""
        rows = self.rows[self.rows.cache == cache].sort_values("total")
        groups = rows.groupby(["rank", "format"])
        middle = groups.cumcount() == (groups.total.transform("size") - 1) // 2
        return rows[middle].set_index(["rank", "format"]).sort_index()

    def save(self, path: str | Path) -> None:
        head = {"recorded": records.today(), "machine": self.machine, "question": self.question}
        records.write(path, head, "rows", self.rows.to_dict("records"))

    @classmethod
    def load(cls, path: str | Path) -> LoadTimes:
        content = records.read(path)
        return cls(pd.DataFrame(content.pop("rows")), **content)

    def only(self, path: str | Path, ranks: list[int], cache: str, repeats: dict[str, int]) -> LoadTimes:
        """Of a record the loads that are asked for. Raises GlmppError if it lacks some."""
        rows = self.rows[self.rows["rank"].isin(ranks) & (self.rows.cache == cache) & self.rows.format.isin(repeats)]
        counted = rows.groupby(["rank", "format"]).size()
        asked, found = {}, {}
        for rank, form in ((rank, form) for rank in ranks for form in repeats):
            what = f"loads of stage {rank}, {form}, {cache}"
            asked[what], found[what] = repeats[form], int(counted.get((rank, form), 0))
        records.check(path, asked, found)
        return replace(self, rows=rows.reset_index(drop=True))


def load_times(
    checkpoint: Checkpoint,
    deployment: int | Deployment,
    ranks: list[int] | None = None,
    repeats: dict[str, int] = THREE_EACH,
    cache: str = "warm",
    recorded: str | Path | None = None,
    reader: str | None = None,
    place: tuple[int, int] = (0, 0),
) -> LoadTimes:
    """Load stages of a checkpoint folder with the installed vLLM's own classes, in a child process, on the CPU.

    Args:
        checkpoint: from a folder.
        deployment: pipeline stages, or a deployment.
        ranks: stages to load; default all.
        repeats: format -> loads of each stage; formats are STOCK, FILTERED, GLMPP, FLOOR. FILTERED is STOCK with vLLM's
            filter of experts on. These two have the kit's helper in the place of an affected release's.
        cache: "warm": all shards have been read before; "cold": they are dropped from the page cache before each load.
        recorded: where to save to with GLMPP_RECORD=1, and what to return where vLLM is not installed.
        reader: the load format's reader, see `glmpp.serving.load_format.StageModelLoader`; GLMPP only.
        place: shard and replica of the rank of each stage.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), no folder, or the child broke
            down.
    """
    if checkpoint.directory is None:
        raise GlmppError("load_times needs a checkpoint with files: from_directory, or write_checkpoint")
    if cache not in ("warm", "cold") or reader not in READERS:
        raise GlmppError(f"cache={cache!r}, reader={reader!r}: choose warm or cold, and one of {', '.join(READERS[1:])}")
    deployment = Deployment.of(deployment)
    ranks = list(range(deployment.pp)) if ranks is None else ranks
    of_a_stage = {"shard": place[0], "replica": place[1], "reader": reader}
    layout = question(checkpoint, deployment)
    asked = {name: layout[name] for name in LAYOUT} | of_a_stage
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError(NO_VLLM)
        found = LoadTimes.load(recorded)
        records.check(recorded, asked, found.question)
        return found.only(recorded, ranks, cache, repeats)
    rows = []
    with progress_bar(what=f"loading, {cache}", total=len(ranks) * sum(repeats.values())) as bar:
        for form, times in repeats.items():
            served = replace(deployment, guard="helper" if form in (STOCK, FILTERED) else "loader", gpu="cpu")
            request = {
                **stage_request(checkpoint, served, "real"),
                **of_a_stage,
                "kind": "load_time",
                "format": form,
                "tensors": [],
                "model": str(checkpoint.directory.resolve()),
                "files": sorted({spec.file for spec in checkpoint.values()}),
                "size": deployment.pp,
                "shards": deployment.tp,
                "replicas": deployment.dp,
                "ep": deployment.ep,
                "ranks": ranks,
                "cache": cache,
                "repeats": times,
                "reader": reader if form == GLMPP else None,
            }
            messages = ask(request, bar)
            rows += [message for message in messages if message["kind"] == "load"]
            versions = next(message["versions"] for message in messages if message["kind"] == "ready")
    machine = {**versions, "system": f"{records.SYSTEM}, CPU only"}
    times = LoadTimes(pd.DataFrame(rows).drop(columns="kind"), machine, question=asked)
    if recorded is not None and records.recording():
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
    table = times.median().drop(index=FLOOR, level="format", errors="ignore")[[*PARTS]].astype(float)
    kept, small_kept = (stage_bytes(one, make_stages(one.config, pp_size)) for one in (real, small))
    for rank, form in table.index:
        moved = kept[rank] if form == GLMPP else real.nbytes
        table.loc[(rank, form), "vllm"] += moved / bytes_per_second
        table.loc[(rank, form), "dequantising"] *= kept[rank] / small_kept[rank]
    return table.assign(total=table.sum(axis=1))
