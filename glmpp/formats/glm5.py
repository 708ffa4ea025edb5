"""The GLM-5 family (`glm_moe_dsa`): every tensor that a config stands for, and smaller configs of the same structure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from glmpp.formats.glm5_config import DTYPES, glm_config, has_indexer
from glmpp.formats.tensor import TensorSpec


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
