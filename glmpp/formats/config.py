"""A model's config.json: where it is, and how many layers it speaks of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from glmpp.errors import GlmppError, short
from glmpp.formats.files import MAX_CONFIG_BYTES, exists, parse_json, read_bytes

# Where a config says how many layers it has, as a number or by naming the kind of each (Nemotron-H: a letter each).
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types", "block_configs")


# Where a multimodal wrapper describes its language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


# What the kit reads of a config that vLLM reads, too: what it expects, and whether a value is that. The rest is vLLM's.
Rules = dict[str, tuple[str, Callable[[object], bool]]]
READ: Rules = {
    "architectures": ("a list of names", lambda said: said is None or is_list(said, str)),
    "num_nextn_predict_layers": (
        "a whole number, 0 or more",
        lambda said: said is None or (type(said) is int and said >= 0),
    ),
    "tie_word_embeddings": ("true or false", lambda said: said in (None, True, False)),
}
# Names that may not occur twice with different values; a config may hold others so, and vLLM takes the last.
ONCE = {*READ, *LAYER_COUNTS, *LAYER_LISTS, *TEXT_CONFIGS, "model_type"}
# What any part of a config calls its numbers of layers and of experts, and the most of them that is believed unseen.
COUNTS = ((re.compile(r"(?!max_).*(layers|n_layer|depth)"), 1_000), (re.compile(r".*(experts|expert_num)"), 4_096))


# Model types of which one field decides, whatever the others say. Source: transformers' and vLLM's configuration classes.
DECISIVE = {
    "nemotron_h": ("layers_block_type", "layer_types", "hybrid_override_pattern"),
    "longcat_flash": ("num_layers",),  # num_hidden_layers counts attention sublayers, two in each
}


def load_config(source: dict | str | Path, once: set[str] | None = frozenset(ONCE)) -> dict:
    """A config as a dict: from a dict, a config.json, or a folder that holds one. Raises GlmppError if it cannot.

    Args:
        once: as of `glmpp.formats.files.parse_json`.
    """
    if isinstance(source, dict):
        return source
    return parse_json(read_bytes(config_path(source), MAX_CONFIG_BYTES), str(config_path(source)), once)


def config_path(source: str | Path) -> Path:
    """The config.json that is meant. Raises GlmppError if there is none."""
    path = Path(source)
    path = path / "config.json" if os.path.isdir(path) else path
    if not exists(path):
        raise GlmppError(f"{path}: no such file")
    return path


def is_list(said: object, kind: type) -> bool:
    """Whether a value is a list of such values; a truth value is no int."""
    return isinstance(said, list) and all(type(one) is kind for one in said)


def check_fields(config: dict, rules: Rules, label: str) -> None:
    """Raise a GlmppError for the first field that is not what is expected."""
    for name, (expected, fits) in rules.items():
        if not fits(config.get(name)):
            said = f"is {short(config[name])}" if name in config else "is missing"
            raise GlmppError(f"{label}: {name} {said}, expected {expected}")


def check_config(config: dict, label: str, rules: Rules = READ) -> None:
    """Check what the kit reads of a config. Raises GlmppError, in which it is called `label`."""
    check_fields(config, rules, label)
    within = {name: rule for name, rule in rules.items() if name != "architectures"}  # those of the whole are read
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), dict):
            check_config(config[key], f"{label}: {key}", within)


def counts(config: dict) -> Iterator[tuple[str, int, int]]:
    """Numbers of layers and of experts that any part of a config speaks of: field, number, the most that is believed."""
    parts = [("", config)]
    while parts:
        path, part = parts.pop()
        for name, said in part.items():
            if isinstance(said, dict) and name != "quantization_config":
                parts.append((f"{path}{name}.", said))
            elif name in LAYER_LISTS and isinstance(said, (list, str)):
                yield path + name, len(said), COUNTS[0][1]
            for names, most in COUNTS:
                if names.fullmatch(name):
                    numbers = said if isinstance(said, list) else [said]  # some models have experts layer by layer
                    yield path + name, max((one for one in numbers if type(one) is int), default=0), most


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
    names = LAYER_COUNTS + LAYER_LISTS
    said = ", ".join(f"{name} is {short(config[name])}" for name in (*names, *TEXT_CONFIGS) if name in config)
    raise GlmppError(
        f"config.json says none of {', '.join(names)} as a whole number or a list: the layers cannot be dealt out to stages"
        + (f" ({said})" if said else "")
    )


def tower_layers(config: dict) -> dict[str, int]:
    """Layers of the parts beside the language model that have some, by name: {"vision": 27} for a `vision_config`."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if not isinstance(value, dict) or (name := key.removesuffix("_config")) == "quantization":
            continue
        if key in TEXT_CONFIGS:
            found |= tower_layers(value)
        elif (count := value["depth"] if type(value.get("depth")) is int else layer_count_said(value)) is not None:
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
        if key in LAYER_COUNTS and type(value) is int:
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


def has_experts(config: dict) -> bool:
    """Whether a model has experts that could be spread."""
    return any(text_config(config).get(name) for name in EXPERTS)
