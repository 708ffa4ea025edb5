"""A record answers the question that it was made for, and no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's config, and of the names, dtypes and shapes of its tensors in their order."""
    told = [checkpoint.config, [(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def check_record(path: str | Path, asked: dict, recorded: dict) -> None:
    """Compare a question with the one that a record was made for, field by field; a record need not say all of them.

    Raises:
        GlmppError: they differ; the message says in what.
    """
    asked = json.loads(json.dumps(asked))  # as a record says it: lists for tuples
    differ = [name for name in asked if name in recorded and recorded[name] != asked[name]]
    if differ:
        said = "; ".join(f"{name}: {asked[name]!r} is asked for, {recorded[name]!r} is recorded" for name in differ)
        raise GlmppError(f"{path}: the record answers another question ({said}). Without vLLM there is no other answer")
