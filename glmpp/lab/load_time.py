"""How long does a pipeline stage take to load, and what does the time go into? Measured with vLLM's own classes.

Three ways, side by side: vLLM's stock load (with the skip, without which an affected release dies), the load format
"glmpp", and the floor: `load_weights` of the model, handed the stage's tensors from a list in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pandas as pd
from tqdm import tqdm

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import Options, question, stage_request
from glmpp.dryrun.installed import NO_VLLM, vllm_version
from glmpp.dryrun.messages import Load, LoadTimeRequest, Ready, Run
from glmpp.dryrun.workers import ask
from glmpp.errors import GlmppError
from glmpp.partition import make_stages, stage_bytes
from glmpp.progress import progress_bar

STOCK, GLMPP, FLOOR = "stock", "glmpp", "in-memory list"
PARTS = ("choosing", "reading", "dequantising", "vllm")
LAYOUT = ("checkpoint", "pp_size", "tp_size", "dp_size", "ep", "layer_counts")  # of a deployment; the rest has no part in it
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
        question: the checkpoint's digest and the layout.
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
) -> LoadTimes:
    """Load stages of a checkpoint folder with the installed vLLM's own classes, in a child process, on the CPU.

    Args:
        checkpoint: from a folder.
        deployment: pipeline stages, or a deployment, of which the first rank of each stage is loaded.
        ranks: stages to load; default all.
        repeats: format -> loads of each stage; formats are STOCK, GLMPP, FLOOR.
        cache: "warm": all shards have been read before; "cold": they are dropped from the page cache before each load.
        recorded: where to save to with GLMPP_RECORD=1, and what to return where vLLM is not installed.

    Raises:
        GlmppError: vLLM is not installed (and nothing was recorded, or of another question), no folder, or the child broke
            down.
    """
    if checkpoint.directory is None:
        raise GlmppError("load_times needs a checkpoint with files: from_directory, or write_checkpoint")
    if cache not in ("warm", "cold"):
        raise GlmppError(f"cache={cache!r}: choose warm or cold")
    deployment = Deployment.of(deployment)
    ranks = list(range(deployment.pp)) if ranks is None else ranks
    layout = question(checkpoint, deployment)
    asked = {name: getattr(layout, name) for name in LAYOUT}
    if vllm_version() is None:
        if recorded is None:
            raise GlmppError(NO_VLLM)
        found = LoadTimes.load(recorded)
        records.check(recorded, asked, found.question)
        return found.only(recorded, ranks, cache, repeats)
    runs = [deployment.run(stage) for stage in ranks]
    with progress_bar(what=f"loading, {cache}", total=len(runs) * sum(repeats.values())) as bar:
        parts = [measure(checkpoint, deployment, runs, form, times, cache, bar) for form, times in repeats.items()]
    times = replace(parts[0], rows=pd.concat([part.rows for part in parts], ignore_index=True), question=asked)
    if recorded is not None and records.recording():
        times.save(recorded)
    return times


def measure(
    checkpoint: Checkpoint,
    deployment: Deployment,
    runs: list[Run],
    form: str,
    repeats: int,
    cache: str,
    bar: tqdm | None = None,
    **how,
) -> LoadTimes:
    """Load runs in one format.

    Args:
        form: STOCK, with the kit's helper in the place of an affected release's; GLMPP; FLOOR.
        how: what else a `LoadTimeRequest` says: filtered, reader.
    """
    served = replace(deployment, guard="helper" if form == STOCK else "loader", gpu="cpu")
    stages = msgspec.structs.replace(
        stage_request(checkpoint, served, Options(weights="real")),
        tensors=[],
        model=str(checkpoint.directory.resolve()),
        files=sorted({spec.file for spec in checkpoint.values()}),
        runs=runs,
    )
    request = LoadTimeRequest(
        gpu="cpu", stages=stages, repeats=repeats, in_memory=form == FLOOR, cold=cache == "cold", **how
    )
    messages = ask(request, bar)
    rows = [{"format": form, "cache": cache, **message.row} for message in messages if isinstance(message, Load)]
    (ready,) = (message for message in messages if isinstance(message, Ready))
    return LoadTimes(pd.DataFrame(rows), {**ready.versions, "system": f"{records.SYSTEM}, CPU only"})


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
