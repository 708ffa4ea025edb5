"""A model's config.json: where it is, and how many layers it speaks of."""

from __future__ import annotations

from pathlib import Path

from glmpp.errors import GlmppError
from glmpp.formats.files import parse_json, read_bytes


def load_config(source: dict | str | Path) -> dict:
    """A config as a dict: from a dict, a config.json, or a folder that holds one. Raises GlmppError if it cannot."""
    if isinstance(source, dict):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise GlmppError(f"{path}: no such file")
    return parse_json(read_bytes(path), str(path))


# Where a config says how many layers it has, as a number or by naming the kind of each (Nemotron-H: a letter each).
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types", "block_configs")


# Where a multimodal wrapper describes its language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")


# Model types of which one field decides, whatever the others say. Source: transformers' and vLLM's configuration classes.
DECISIVE = {
    "nemotron_h": ("layers_block_type", "layer_types", "hybrid_override_pattern"),
    "longcat_flash": ("num_layers",),  # num_hidden_layers counts attention sublayers, two in each
}


def text_config(config: dict) -> dict:
    """The part of a config that describes the language model: the whole, or a nested one of a multimodal wrapper.

    Raises:
        GlmppError: no part says how many layers it has.
    """
    if _layers(config) is not None:
        return config
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    raise GlmppError(
        f"config.json says none of {', '.join(LAYER_COUNTS + LAYER_LISTS)}: the layers cannot be dealt out to stages"
    )


def tower_layers(config: dict) -> dict[str, int]:
    """Layers of the parts beside the language model that have some, by name: {"vision": 27} for a `vision_config`."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if not isinstance(value, dict) or (name := key.removesuffix("_config")) == "quantization":
            continue
        if key in TEXT_CONFIGS:
            found |= tower_layers(value)
        elif (count := value["depth"] if isinstance(value.get("depth"), int) else layer_count_said(value)) is not None:
            found[name] = count
    return found


def layer_count(config: dict) -> int:
    """Main layers of the language model. Raises GlmppError if the config does not say."""
    return _layers(text_config(config))


def _layers(config: dict) -> int | None:
    """Main layers that this part of a config itself speaks of."""
    kind = config.get("model_type")
    for key in (*(DECISIVE.get(kind, ()) if isinstance(kind, str) else ()), *LAYER_COUNTS, *LAYER_LISTS):
        value = config.get(key)
        if key in LAYER_COUNTS and isinstance(value, int):
            return value
        if key in LAYER_LISTS and isinstance(value, (list, str)) and value:
            return len(value)
    return None


def layer_count_said(config: dict) -> int | None:
    """Main layers, or None if the config does not say it in a way that the kit knows; vLLM may."""
    try:
        return layer_count(config)
    except GlmppError:
        return None
