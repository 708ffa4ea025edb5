"""The small checkpoint that the real engine serves, what it is asked, and mutations of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.shard import read_shard
from glmpp.lab.engine import LENGTHS, LOST, SIZES
from glmpp.synthetic import write_checkpoint

LONGEST = 256  # tokens of prompt and answer
TOKENS = 24  # of an answer


def write_served_checkpoint(config: dict | str | Path, directory: str | Path) -> Checkpoint:
    """A small checkpoint with real bytes, and a tokenizer for it in which token 7 is the word `t7`."""
    checkpoint = write_checkpoint(reduced_config(config, **SIZES), directory)
    words = {f"t{token}": token for token in range(checkpoint.config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    Path(directory, "tokenizer.json").write_text(json.dumps(tokenizer))
    Path(directory, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return checkpoint


def prompts() -> list[list[int]]:
    """Random token ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 512, (length,), generator=generator).tolist() for length in LENGTHS]


# --- mutations of a checkpoint --------------------------------------------------------------------------------------


def swapped(name: str) -> str:
    """wk of layer 4 for that of layer 8."""
    if ".indexer.wk." not in name:
        return name
    return name.replace(".4.", ".x.").replace(".8.", ".4.").replace(".x.", ".8.")


def shifted(name: str) -> str:
    """The layers of stage 1 of 2, each one further on."""
    parts = name.split(".")
    if parts[1] == "layers" and 6 <= int(parts[2]) < 12:
        parts[2] = str(6 + (int(parts[2]) - 5) % 6)
    return ".".join(parts)


def without_a_scale(name: str) -> str | None:
    """One scale of one expert on stage 1 of 2 lost."""
    return None if name == LOST else name


def mutated(checkpoint: Checkpoint, folder: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of the checkpoint whose tensors have the names that `rename` makes of theirs; None loses a tensor."""
    shutil.copytree(checkpoint.directory, folder)
    weight_map = {}
    for file in sorted({spec.file for spec in checkpoint.values()}):
        held = {new: tensor for name, tensor in read_shard(checkpoint.directory / file) if (new := rename(name))}
        save_file(held, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
