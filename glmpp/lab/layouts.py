"""What notebook 08 shows: which rank holds which part of a layer, and what servers logged beside what the kit counts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.formats.config import load_config
from glmpp.formats.tensor import TensorSpec
from glmpp.lab.notebook import DATA, RECORDED, ROOT
from glmpp.layouts.layout import Layouts
from glmpp.layouts.search import layouts, question

# Parts of a layer, by what their names hold in the checkpoint and in vLLM.
PARTS = {
    "heads (q_b, kv_b, o)": r"self_attn\.(q_b|kv_b|o)_proj\.",
    "latents (q_a, kv_a)": r"self_attn\.(fused_qkv_a|q_a|kv_a)_",
    "indexer": r"self_attn\.indexer\.",
    "router": r"mlp\.gate\.",
    "shared expert": r"mlp\.shared_experts\.",
    "256 experts": r"mlp\.experts\.",
}
HERE, NOWHERE = "all", ""


def layouts_on(checkpoint: Checkpoint, gpus: int, live: bool) -> Layouts:
    """Every layout of so many H200: live, or as it was recorded. While results are recorded, live."""
    recorded = RECORDED / f"layouts_{gpus}.json"
    if live or records.recording():
        return layouts(checkpoint, gpus, "h200", recorded=recorded)
    return Layouts.load(recorded, question(checkpoint, gpus, "h200"))


def parts_of_layer(checkpoint: Checkpoint, deployment: Deployment, layer: int, recorded: Path, live: bool) -> pd.DataFrame:
    """What each GPU of a deployment holds of a layer: "all" of a part, "1/8", "32-63" for experts, "" for nothing.

    Ranks of the layer's stage are run with the load format; those of other stages hold nothing of it. Recorded as `dry_run`.

    Returns:
        Parts in rows, GPUs in columns.
    """
    asked = {"checkpoint": records.digest(checkpoint), "layout": deployment.layout, "layer": layer, "gpu": deployment.gpu}
    if vllm_version() is None or not (live or records.recording()):
        return pd.DataFrame(records.read(recorded, asked)["table"]).rename(columns=int)
    (stage,) = [one.rank for one in deployment.stages(checkpoint.config) if layer in one.layers]
    ranks = [(stage, shard, 0) for shard in range(deployment.tp)]
    report = dry_run(checkpoint, replace(deployment, guard="loader"), ranks=ranks, control=False)
    whole = _elements({name: spec.numel for name, spec in checkpoint.items()}, layer)
    table = pd.DataFrame(NOWHERE, index=list(PARTS), columns=range(deployment.gpus))
    for one in report.stages:
        held = _elements({name: size for name, (_, size) in one.ledger.parameters.items()}, layer)
        rank = stage * deployment.tp + one.run.tp_rank
        table[rank] = [_share(held[part], whole[part], part, one.experts) for part in PARTS]
    if records.recording():
        recorded.write_text(json.dumps({**asked, "table": json.loads(table.to_json())}, indent=1) + "\n")
    return table


def _elements(sizes: dict[str, int], layer: int) -> dict[str, int]:
    """Elements of each part of a layer, scales left out."""
    own = {name: size for name, size in sizes.items() if f"layers.{layer}." in name and "scale" not in name}
    return {part: sum(size for name, size in own.items() if re.search(pattern, name)) for part, pattern in PARTS.items()}


def _share(held: int, whole: int, part: str, experts: list[int] | None) -> str:
    if experts and part.endswith("experts"):
        return f"{experts[0]}-{experts[-1]}"
    return HERE if held >= whole else f"1/{round(whole / held)}" if held else NOWHERE


def logged(recorded: Path) -> pd.DataFrame:
    """For each log under data/logs the bytes that a token took on a rank, and what vLLM's classes say here."""
    logs = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "logs").glob("*.json"))}
    rows = [{"model": name, "on": log["gpus"], "logged": log["said"][-1], "TP": log["tp"]} for name, log in logs.items()]
    if vllm_version() is None:
        found = pd.DataFrame(json.loads(recorded.read_text()))
        records.check(recorded, {"logs": rows}, {"logs": found[list(rows[0])].to_dict("records")})
        return found
    for row, log in zip(rows, logs.values()):
        config = load_config(ROOT / log["config"]) if isinstance(log["config"], str) else log["config"]
        built = Checkpoint([TensorSpec("model.norm.weight", "BF16", (config["hidden_size"],))], config)
        deployment = Deployment(tp=log["tp"], gpu=log["gpu"], guard="loader")
        (one,) = dry_run(built, deployment, ranks=[(0, 0, 0)], control=False, progress=False).stages
        bytes_logged = log["available_gib"] * 2**30 / log["tokens"]
        here = one.memory.kv_cache.bytes_per_token
        row |= {"bytes per token, logged": bytes_logged, "here": here, "off by, %": 100 * (here / bytes_logged - 1)}
    if records.recording():
        recorded.write_text(json.dumps(rows, indent=1) + "\n")
    return pd.DataFrame(rows)


def table(found: Layouts) -> pd.DataFrame:
    """A row for each layout, best first."""
    rows = [
        {
            "layout": one.deployment.layout,
            "verdict": one.verdict,
            "split": one.deployment.partition or "even",
            "GB on the fullest": one.fit.fullest / 1e9 if one.fit else float("nan"),
            "tokens": one.tokens,
            "with vLLM's split": one.even or one.tokens,
            f"requests of {found.asked[1]:,}": one.requests,
            "load format": "glmpp" if one.deployment.guard == "loader" else "vLLM's own",
        }
        for one in found.layouts
    ]
    return pd.DataFrame(rows).set_index("layout")
