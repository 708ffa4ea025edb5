"""glmpp: loading huge FP8 checkpoints under pipeline parallelism, and one bug that shows how it goes wrong.

Read in this order: partition (which stage holds what), dequant (block FP8 -> BF16), loader (the helper of the bug,
before and after, and the ledger), checkpoint (what feeds them), dry_run (the real vLLM, one stage at a time).
"""

from glmpp.checkpoint import Checkpoint, TensorSpec, load_config, reduced_config, synthetic_original, write_checkpoint
from glmpp.dequant import dequantize, quantize
from glmpp.dry_run import DryRunReport, StageReport, dry_run
from glmpp.error import error_stats
from glmpp.errors import GlmppError
from glmpp.loader import Ledger, load_fp8_indexer_wk, load_stage
from glmpp.notebook import environment, verdict
from glmpp.partition import Stage, balance, make_stages, partition_layers, stage_bytes

__all__ = [
    "Checkpoint",
    "DryRunReport",
    "GlmppError",
    "Ledger",
    "Stage",
    "StageReport",
    "TensorSpec",
    "balance",
    "dequantize",
    "dry_run",
    "environment",
    "error_stats",
    "load_config",
    "load_fp8_indexer_wk",
    "load_stage",
    "make_stages",
    "partition_layers",
    "quantize",
    "reduced_config",
    "stage_bytes",
    "synthetic_original",
    "verdict",
    "write_checkpoint",
]
