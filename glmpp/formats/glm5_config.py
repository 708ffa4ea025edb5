"""A config of the GLM-5 family (`glm_moe_dsa`), checked field by field before a tensor list is made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from glmpp.errors import GlmppError, short
from glmpp.formats.config import READ, Rules, check_fields, config_path, is_list, load_config
from glmpp.words import some

DTYPES = {None: "BF16", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MOST_IN_ALL = 200_000  # experts of all layers together, six tensors each; GLM-5.1 has 20,000


def _whole(least: int, most: int, optional: bool = False) -> tuple[str, Callable[[object], bool]]:
    """A rule for a field. Args: optional: it may be missing, or null."""
    expected = f"a whole number from {least:,} to {most:,}"
    return expected, lambda said: (optional and said is None) or (type(said) is int and least <= said <= most)


def _only(said: object, kinds: tuple[str, ...]) -> bool:
    """Whether it is a list, or a string, of such names and no others."""
    return isinstance(said, (list, str)) and bool(said) and all(one in kinds for one in said)


# What the tensor list is built from, and other sizes that vLLM reads. The ceilings are far above every published model.
_WIDTH, _HEADS, _LAYERS, _EXPERTS = 1 << 20, 1 << 16, 1_000, 4_096
FIELDS: Rules = {
    **READ,
    "num_hidden_layers": _whole(1, _LAYERS),
    "num_nextn_predict_layers": _whole(0, _LAYERS, optional=True),
    "first_k_dense_replace": _whole(0, 1 << 30),
    "n_routed_experts": _whole(1, _EXPERTS),
    "n_shared_experts": _whole(0, 64),
    "vocab_size": _whole(1, 1 << 24),
    "hidden_size": _whole(1, _WIDTH),
    "intermediate_size": _whole(1, _WIDTH),
    "moe_intermediate_size": _whole(1, _WIDTH),
    "num_attention_heads": _whole(1, _HEADS),
    "q_lora_rank": _whole(1, _WIDTH),
    "kv_lora_rank": _whole(1, _WIDTH),
    "qk_nope_head_dim": _whole(1, _HEADS),
    "qk_rope_head_dim": _whole(1, _HEADS),
    "v_head_dim": _whole(1, _HEADS),
    "index_n_heads": _whole(1, _HEADS),
    "index_head_dim": _whole(1, _HEADS),
    "num_key_value_heads": _whole(1, _HEADS, optional=True),
    "num_experts_per_tok": _whole(1, _EXPERTS, optional=True),
    "max_position_embeddings": _whole(1, 1 << 30, optional=True),
    "dtype": (f"one of {', '.join(filter(None, DTYPES))}", lambda said: said in [*DTYPES]),
    "quantization_config": ("an object", lambda said: said is None or isinstance(said, dict)),
    # Which layers have an indexer, as transformers' GlmMoeDsaConfig reads it: the first of these that is there.
    "indexer_types": ("a list of 'full' and 'shared'", lambda said: said is None or _only(said, ("full", "shared"))),
    "index_topk_pattern": (
        "a string of F and S, or a list of 'full' and 'shared'",
        lambda said: said is None or _only(said, ("F", "S") if isinstance(said, str) else ("full", "shared")),
    ),
    "index_topk_freq": _whole(1, _LAYERS, optional=True),
    "index_skip_topk_offset": _whole(0, _LAYERS, optional=True),
    # Of these the list of tensors knows one value.
    "mlp_layer_types": ("a list of 'dense' and 'sparse'", lambda said: said is None or _only(said, ("dense", "sparse"))),
    "layer_types": (
        "sparse attention in every layer",
        lambda said: said is None or _only(said, ("indexed_attention", "deepseek_sparse_attention")),
    ),
    "topk_method": ("'noaux_tc'", lambda said: said in (None, "noaux_tc")),
    "moe_layer_freq": _whole(1, 1, optional=True),
    "attention_bias": ("false", lambda said: not said),
    "mlp_bias": ("false", lambda said: not said),
}
FIELDS["torch_dtype"] = FIELDS["dtype"]
QUANTIZATION: Rules = {
    "quant_method": ("'fp8'", lambda said: said == "fp8"),
    "activation_scheme": ("'dynamic'", lambda said: said in (None, "dynamic")),
    "fmt": ("'e4m3'", lambda said: said in (None, "e4m3")),
    "weight_block_size": (
        "two whole numbers from 1 to 1,024",
        lambda said: is_list(said, int) and len(said) == 2 and all(1 <= size <= 1024 for size in said),
    ),
    "modules_to_not_convert": ("a list of names", lambda said: said is None or is_list(said, str)),
}
# Fields that neither add a tensor nor change one: of the family, and those that transformers writes for every model.
_NO_PART = """
    model_type auto_map transformers_version use_cache pretraining_tp ep_size initializer_range hidden_act head_dim
    qk_head_dim rms_norm_eps attention_dropout rope_parameters rope_theta rope_scaling rope_interleave
    partial_rotary_factor n_group topk_group scoring_func routed_scaling_factor norm_topk_prob moe_router_dtype
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux index_topk indexer_rope_interleave
    index_share_for_mtp_iteration return_dict return_dict_in_generate output_hidden_states output_attentions
    output_scores torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_decoder
    finetuning_task task_specific_params problem_type id2label label2id num_labels tokenizer_class prefix max_length
    min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
NO_PART = frozenset(_NO_PART.split())


def glm_config(source: dict | str | Path) -> dict:
    """A config of the GLM-5 family, every field of it of its type and in its range.

    Raises:
        GlmppError: another model type, or a field that is not what is expected; the message names file and field.
    """
    config = load_config(source, once=None)
    label = "config.json" if isinstance(source, dict) else str(config_path(source))
    if config.get("model_type") != "glm_moe_dsa":
        raise GlmppError(
            f"from_config knows the model type 'glm_moe_dsa' only, {label} says {short(config.get('model_type'))}; "
            "for other models give the folder that holds the shards"
        )
    check_fields(config, FIELDS, label)
    if quantization := config.get("quantization_config"):
        check_fields(quantization, QUANTIZATION, f"{label}: quantization_config")
    _check_layers(config, label)
    layers = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    if (experts := layers * config["n_routed_experts"]) > MOST_IN_ALL:
        raise GlmppError(
            f"{label}: num_hidden_layers and num_nextn_predict_layers times n_routed_experts is {experts:,}, "
            f"expected at most {MOST_IN_ALL:,}"
        )
    parts = [("", config)]
    while parts:
        path, part = parts.pop()
        if isinstance(part, float) and not math.isfinite(part):
            raise GlmppError(f"{label}: {path[1:]} is {part}, expected a finite number")
        within = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        parts += [(f"{path}.{name}", value) for name, value in within]
    _check_known(config, FIELDS.keys() | NO_PART, label)
    _check_known(config.get("quantization_config") or {}, QUANTIZATION.keys(), f"{label}: quantization_config")
    return config


def _check_known(config: dict, known: Iterable[str], label: str) -> None:
    """Raise a GlmppError for fields that may decide about tensors in a way that is not known here.

    One that is null, false or empty asks for nothing.
    """
    strange = [name for name, said in config.items() if said and name not in known and not _says_nothing(name, config)]
    if strange:
        raise GlmppError(
            f"{label}: the list of tensors that the kit makes from a config does not know {some([*map(short, strange)])}, "
            "which may add tensors or take some away; give the folder that holds the shards, or the Hub repository "
            "(org/name), whose names are read"
        )


def _says_nothing(name: str, config: dict) -> bool:
    """Whether a field is of the tokenizer or of transformers itself, or another name for the number of experts."""
    if name in ("num_experts", "num_local_experts"):
        return config[name] == config.get("n_routed_experts")
    return name.startswith("_") or name.endswith("_token_id")


def _check_layers(config: dict, label: str) -> None:
    """Raise a GlmppError if a list with an entry for each layer has another length, or the layers are not in that order."""
    layers, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    for name in ("indexer_types", "index_topk_pattern", "mlp_layer_types", "layer_types"):
        if (said := config.get(name)) is not None and len(said) not in (layers, layers + mtp):
            each = f"one for each of {layers:,} layers, MTP layers with or without"
            raise GlmppError(f"{label}: {name} has {len(said):,} entries, expected {each}")
    kinds, dense = config.get("mlp_layer_types") or [], config["first_k_dense_replace"]
    if any((kind == "dense") != (layer < dense) for layer, kind in enumerate(kinds)):
        raise GlmppError(f"{label}: mlp_layer_types is not what first_k_dense_replace says, {dense:,} dense layers first")
    if not has_indexer(config, 0) or not all(has_indexer(config, layer) for layer in range(layers, layers + mtp)):
        raise GlmppError(f"{label}: the first layer has no indexer of its own, or an MTP layer has none: expected both")


def has_indexer(config: dict, layer: int) -> bool:
    """Whether a layer has an indexer of its own, or goes by that of the layer before (GLM-5.2). An MTP layer has one.

    Source: `GlmMoeDsaConfig` of transformers 5.23: a list decides, or a pattern, or the numbers that lists are made from.
    """
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")
    if kinds is not None:
        return layer >= len(kinds) or kinds[layer] in ("full", "F")
    offset = 2 if (said := config.get("index_skip_topk_offset")) is None else said
    return layer >= config["num_hidden_layers"] or max(layer - offset + 1, 0) % (config.get("index_topk_freq") or 1) == 0
