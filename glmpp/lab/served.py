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
from glmpp.synthetic import write_checkpoint

# Of the small checkpoint. `index_topk` is small enough that a prompt can be longer; 32 index heads as in GLM-5.1, since
# with four a sixteenth of all scores is exactly zero, and ties have no right answer; eps is 1e-6 because transformers
# uses that for the two norms inside attention whatever the config says, and vLLM does what it says. No kernel here minds
# the size of a latent vector.
SIZES = {"index_topk": 16, "index_n_heads": 32, "rms_norm_eps": 1e-6, "kv_lora_rank": 128}
LONGEST = 256  # tokens of prompt and answer
TOKENS = 24  # of an answer
LENGTHS = (5, 40, 12, 25)  # of the prompts: two are shorter and two longer than `index_topk`
SHORT, LONG = (0, 2), (1, 3)


def write_served_checkpoint(config: dict | str | Path, directory: str | Path, **sizes) -> Checkpoint:
    """A small checkpoint with real bytes, and a tokenizer for it in which token 7 is the word `t7`."""
    checkpoint = write_checkpoint(reduced_config(config, **SIZES | sizes), directory)
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


def prompts(vocabulary: int = 512) -> list[list[int]]:
    """Random token ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def right_steps(prompt: int) -> int:
    """How many tokens of the answer to a short prompt do not depend on the indexer: up to index_topk all are attended to."""
    return max(0, SIZES["index_topk"] - LENGTHS[prompt] + 1)


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


LOST = "model.layers.8.mlp.experts.2.up_proj.weight_scale_inv"


def without_a_scale(name: str) -> str | None:
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
