"""glmpp: loading huge quantised checkpoints over many GPUs, and one bug that shows how it goes wrong.

Read in this order: checkpoint (what is in it), partition (which stage holds what), dequant (block FP8 -> BF16), loader (the
helper of the bug before and after, and how a stage loads), ledger (what became of every tensor). Behind these: `formats`
(what lies on disk), `serving` (what runs in vLLM's own worker), `dryrun` (what asks it in a fork), `layouts` (which split to
take), `cli` (the command), `lab` (what the notebooks show).
"""

import importlib

# Imported when they are asked for: torch takes seconds, and a serving process that wants the load format needs none of it.
_FROM = {
    "Checkpoint": "glmpp.checkpoint",
    "Deployment": "glmpp.dryrun.deployment",
    "DryRunReport": "glmpp.dryrun.report",
    "GlmppError": "glmpp.errors",
    "Ledger": "glmpp.ledger",
    "Stage": "glmpp.partition",
    "StageReport": "glmpp.dryrun.stage_report",
    "TensorSpec": "glmpp.formats.tensor",
    "balance": "glmpp.layouts.split",
    "balance_cache": "glmpp.layouts.split",
    "claim": "glmpp.lab.notebook",
    "dequantize": "glmpp.dequant",
    "dry_run": "glmpp.dryrun.dry_run",
    "environment": "glmpp.lab.notebook",
    "error_stats": "glmpp.lab.error",
    "load_config": "glmpp.formats.config",
    "load_fp8_indexer_wk": "glmpp.loader",
    "load_stage": "glmpp.loader",
    "make_stages": "glmpp.partition",
    "partition_layers": "glmpp.partition",
    "quantize": "glmpp.dequant",
    "reduced_config": "glmpp.formats.glm5",
    "stage_bytes": "glmpp.partition",
    "synthetic_original": "glmpp.synthetic",
    "write_checkpoint": "glmpp.synthetic",
}
__all__ = list(_FROM)


def __getattr__(name: str):
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'glmpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
