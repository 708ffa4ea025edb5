"""A checkpoint from what a user calls a model."""

from __future__ import annotations

from pathlib import Path

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.workers import TIMEOUT
from glmpp.errors import GlmppError
from glmpp.formats.config import load_config
from glmpp.formats.files import exists, list_folder
from glmpp.formats.weights import ADAPTER, MISTRALS, adapter_line, check_serves_alone, weight_files


def open_checkpoint(model: str, revision: str | None = None, seconds: float = TIMEOUT, judged: bool = False) -> Checkpoint:
    """A checkpoint from what a user calls a model: a folder, a config.json, or a Hub repository.

    Args:
        seconds: that the Hub may take.
        judged: as of `Checkpoint.from_directory`.

    Raises:
        GlmppError: none of these, no model of its own (an adapter, a drafter), or it cannot be read.
    """
    if not model:
        raise GlmppError("the name of the model is empty")
    path = Path(model)
    if exists(path):
        checkpoint = _open_folder(path, judged) if path.is_dir() else _from_config(path)
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")):
        checkpoint = Checkpoint.from_hub(model, revision, seconds=seconds)
    else:
        raise GlmppError(f"{model}: no such folder or file, and not the name of a Hub repository (org/name)")
    check_serves_alone(checkpoint.config, model)
    return checkpoint


def _open_folder(path: Path, judged: bool) -> Checkpoint:
    names = list_folder(path)
    if "config.json" not in names:
        if ADAPTER in names:
            raise GlmppError(adapter_line(str(path), load_config(path / ADAPTER)))
        if "params.json" in names:
            raise GlmppError(
                f"{path}: holds params.json and no config.json, Mistral's own format, in which vLLM opens {MISTRALS}; "
                "glmpp reads models with a config.json"
            )
    found = weight_files(names)
    if found.files or found.index or any(name.endswith(".gguf") for name in names):
        return Checkpoint.from_directory(path, judged)
    try:
        return _from_config(path)
    except GlmppError as error:
        raise GlmppError(f"{error} ({path} holds no weights that vLLM opens, and so its config alone is read)") from None


def _from_config(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.from_config(path)
    checkpoint.source = f"{path} (names and shapes from the config alone)"
    return checkpoint
