"""glmpp: loading huge quantised checkpoints over many GPUs, and one bug that shows how it goes wrong.

Read in this order: checkpoint (what is in it), partition (which stage holds what), dequant (block FP8 -> BF16), loader (the
helper of the bug before and after, and how a stage loads), ledger (what became of every tensor). Behind these: `formats`
(what lies on disk), `engine` (inside a process with vLLM), `verdict` (what asks it), `lab` (what the notebooks show).
"""

import importlib

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize
from glmpp.errors import GlmppError
from glmpp.formats.config import load_config
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.tensor import TensorSpec
from glmpp.ledger import Ledger
from glmpp.loader import load_fp8_indexer_wk, load_stage
from glmpp.partition import Stage, balance, balance_cache, make_stages, partition_layers, stage_bytes
from glmpp.synthetic import synthetic_original, write_checkpoint

# Imported when they are asked for: a serving process that wants the load format alone needs none of it.
_LATER = {
    "Deployment": "glmpp.verdict.deployment",
    "DryRunReport": "glmpp.verdict.report",
    "StageReport": "glmpp.verdict.stage_report",
    "dry_run": "glmpp.verdict.dry_run",
    "claim": "glmpp.lab.notebook",
    "environment": "glmpp.lab.notebook",
    "error_stats": "glmpp.lab.error",
}

__all__ = [
    "Checkpoint",
    "GlmppError",
    "Ledger",
    "Stage",
    "TensorSpec",
    "balance",
    "balance_cache",
    "dequantize",
    "load_config",
    "load_fp8_indexer_wk",
    "load_stage",
    "make_stages",
    "partition_layers",
    "quantize",
    "reduced_config",
    "stage_bytes",
    "synthetic_original",
    "write_checkpoint",
    *_LATER,
]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'glmpp' has no attribute {name!r}")
