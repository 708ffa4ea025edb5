"""What a checkpoint calls the list of its language model's layers."""

from __future__ import annotations

import re

from glmpp.checkpoint import TO_FIRST_NUMBER, Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.config import layer_count, text_config, tower_layers
from glmpp.partition import LAYERS
from glmpp.words import quoted

# Words in the path of a list that is not the language model's: towers, what speaks, and MTP layers in a list of their own.
_TOWERS = {"vision", "visual", "vit", "vpm", "image", "video", "audio", "apm", "speech", "talker", "mtp", "projector"}
_TOWERS |= {"clip", "dit", "qformer", "resampler", "codec"}
_LANGUAGE = {"language", "text", "llm", "thinker", "decoder"}  # of several lists one with such a word


def layer_list(checkpoint: Checkpoint) -> str:
    """What a checkpoint calls the list of its language model's layers, e.g. "model.layers" or "transformer.h".

    It holds exactly the config's layers, with or without its MTP layers; a list of more layers is taken only where there is
    no such list. Lists of a vision or audio tower are left out: by a word in their path, or because they hold as many
    layers as a nested config says of a tower. Of several the one is taken that is called "model.layers", or after language,
    or is no encoder, or has the shortest name.

    Raises:
        GlmppError: there is no such name, or there are two that nothing tells apart.
    """
    num_layers, towers = layer_count(checkpoint.config), tower_layers(checkpoint.config)
    mtp = text_config(checkpoint.config).get("num_nextn_predict_layers") or 0
    found: dict[str, set[int]] = {}
    for name in checkpoint.beginnings:
        if match := TO_FIRST_NUMBER.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    words = _TOWERS | towers.keys()

    def holds(numbers: set[int], count: int) -> bool:
        """Exactly 0 to count - 1. A config may say any number, so no set of so many is made."""
        return len(numbers) == count == max(numbers) + 1

    found = {path: held for path, held in found.items() if words.isdisjoint(re.split(r"[._]", path))}
    exact = [path for path, held in found.items() if holds(held, num_layers) or holds(held, num_layers + mtp)]
    more = [
        path
        for path, held in found.items()
        if len(held) > num_layers and len(held) not in towers.values() and all(map(held.__contains__, range(num_layers)))
    ]
    if not (whole := exact or more):
        raise GlmppError(f"no list of layers in the checkpoint's names holds all of 0 to {num_layers - 1}")

    def order(path: str) -> tuple:
        words = re.split(r"[._]", path)
        return path != LAYERS, _LANGUAGE.isdisjoint(words), "encoder" in words, len(path)

    best = min(whole, key=order)
    if others := [path for path in whole if path != best and order(path) == order(best)]:
        two = f"{quoted(best)} and {quoted(others[0])}"
        raise GlmppError(f"{two} both hold {num_layers} layers: which are the language model's?")
    return best
