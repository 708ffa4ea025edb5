"""The GLM-5 family (`glm_moe_dsa`): every tensor that a config stands for, and smaller configs of the same structure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glmpp.errors import GlmppError, short
from glmpp.formats.config import READ, Rules, check_fields, config_path, is_list, load_config
from glmpp.formats.tensor import TensorSpec
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
            raise GlmppError(f"{label}: {name} has {len(said):,} entries, expected one for each of {layers:,} layers")
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


def glm_moe_dsa(c: dict) -> Iterator[TensorSpec]:
    """Every tensor of a `glm_moe_dsa` checkpoint, in model order. Source: file metadata of zai-org/GLM-5.1-FP8.

    A layer that goes by another's indexer has no tensors of one: zai-org/GLM-5.2-FP8.
    """
    quantization = c.get("quantization_config") or {}
    block = quantization.get("weight_block_size")
    kept = set(quantization.get("modules_to_not_convert") or ())
    dtype = DTYPES[c.get("dtype") or c.get("torch_dtype")]
    hidden, vocab = c["hidden_size"], c["vocab_size"]

    def linear(module: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
        if block is None or module in kept:
            yield TensorSpec(f"{module}.weight", dtype, (out_features, in_features))
        else:
            yield TensorSpec(f"{module}.weight", "F8_E4M3", (out_features, in_features))
            grid = (-(-out_features // block[0]), -(-in_features // block[1]))
            yield TensorSpec(f"{module}.weight_scale_inv", "F32", grid)

    def plain(name: str, *shape: int, dtype: str = dtype) -> Iterator[TensorSpec]:
        yield TensorSpec(name, dtype, shape)

    def mlp(module: str, width: int) -> Iterator[TensorSpec]:
        yield from linear(f"{module}.gate_proj", width, hidden)
        yield from linear(f"{module}.up_proj", width, hidden)
        yield from linear(f"{module}.down_proj", hidden, width)

    def indexer(at: str) -> Iterator[TensorSpec]:
        yield from linear(f"{at}.wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
        yield from linear(f"{at}.wk", c["index_head_dim"], hidden)
        yield from plain(f"{at}.weights_proj.weight", c["index_n_heads"], hidden)
        yield from plain(f"{at}.k_norm.weight", c["index_head_dim"])
        yield from plain(f"{at}.k_norm.bias", c["index_head_dim"])

    def layer(index: int) -> Iterator[TensorSpec]:
        at, heads = f"model.layers.{index}", c["num_attention_heads"]
        yield from plain(f"{at}.input_layernorm.weight", hidden)
        yield from plain(f"{at}.post_attention_layernorm.weight", hidden)
        attn = f"{at}.self_attn"
        yield from linear(f"{attn}.q_a_proj", c["q_lora_rank"], hidden)
        yield from plain(f"{attn}.q_a_layernorm.weight", c["q_lora_rank"])
        yield from linear(f"{attn}.q_b_proj", heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), c["q_lora_rank"])
        yield from linear(f"{attn}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        yield from plain(f"{attn}.kv_a_layernorm.weight", c["kv_lora_rank"])
        yield from linear(f"{attn}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        yield from linear(f"{attn}.o_proj", hidden, heads * c["v_head_dim"])
        if has_indexer(c, index):
            yield from indexer(f"{attn}.indexer")
        if index < c["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", c["intermediate_size"])
            return
        yield from plain(f"{at}.mlp.gate.weight", c["n_routed_experts"], hidden)
        yield from plain(f"{at}.mlp.gate.e_score_correction_bias", c["n_routed_experts"], dtype="F32")
        for expert in range(c["n_routed_experts"]):
            yield from mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
        yield from mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])

    yield from plain("model.embed_tokens.weight", vocab, hidden)
    for index in range(c["num_hidden_layers"]):
        yield from layer(index)
    for index in range(c["num_hidden_layers"], c["num_hidden_layers"] + (c.get("num_nextn_predict_layers") or 0)):
        yield from layer(index)
        yield from plain(f"model.layers.{index}.eh_proj.weight", hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield from plain(f"model.layers.{index}.{norm}.weight", hidden)
    yield from plain("model.norm.weight", hidden)
    if not c.get("tie_word_embeddings"):
        yield from plain("lm_head.weight", vocab, hidden)


# The smallest sizes at which the GLM-5 classes of vLLM 0.22.1 build and every block layout still occurs:
# kv_lora_rank + qk_rope_head_dim = 576 rows end in half a block, and are what the sparse attention of a GPU asks for.
TINY = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": [1],
}


# All of GLM-5.1's layers and experts, so all its tensor names, at dimensions of one block: 1 GB.
ALL_NAMES = {
    "num_hidden_layers": 78,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
}


def reduced_config(config: dict | str | Path, **sizes: int) -> dict:
    """A GLM-5 config with smaller dimensions and the same structure; `sizes` override the defaults in `TINY`.

    `modules_to_not_convert` is cut to the layers that remain; the MTP layer's entries follow it to its new index. So are the
    lists that have an entry for each layer.
    """
    config = glm_config(config)
    reduced = {**config, **TINY, **sizes}
    layers = reduced["num_hidden_layers"]
    for name in ("indexer_types", "index_topk_pattern"):
        if reduced.get(name) and name not in sizes:
            reduced[name] = reduced[name][:layers] if layers <= len(reduced[name]) else None
    for name in ("mlp_layer_types", "layer_types"):
        reduced.pop(name, None)  # what first_k_dense_replace says, and one kind for all
    if modules := (config.get("quantization_config") or {}).get("modules_to_not_convert"):
        old, new = config["num_hidden_layers"], reduced["num_hidden_layers"]
        template: dict[str, None] = {}
        for module in modules:
            match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)", module)
            if match is None:
                template[module] = None
            elif int(match[1]) >= old:
                template[f"model.layers.{int(match[1]) - old + new}.{match[2]}"] = None
            elif int(match[1]) < new:
                template[module] = None
        reduced["quantization_config"] = {**config["quantization_config"], "modules_to_not_convert": list(template)}
    return reduced
