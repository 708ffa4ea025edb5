"""Tiny checkpoints of other architectures, from transformers' own classes, for `glmpp.verdict.sweep`.

The sizes below replace those of a default config, wherever a field of that name occurs, in nested configs too. They are
multiples of 128, so that a block-FP8 variant has whole blocks, and six layers hold every kind of layer of the patterns in
use (every fourth layer full attention, every eighth attention among Mamba, every second an MoE).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS = 6


SIZES = {
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "depth": 2,
    "hidden_size": 256,
    "d_model": 256,
    "n_embd": 256,
    "embed_dim": 256,
    "word_embed_proj_dim": 256,
    "intermediate_size": 256,
    "ffn_dim": 256,
    "n_inner": 256,
    "ffn_hidden_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "d_kv": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 64,
    "image_size": 64,
    "patch_size": 16,
    "out_hidden_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


# Model type -> what transformers saves where the hub's configs, and vLLM, say something else.
RENAMED = {"granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"}}


# Model type -> fields of the hub's configs that transformers' classes do not keep.
ADDED = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "layernorm_epsilon": 1e-5,
    },
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 256},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "first_k_dense_replace": 1},
    "glm4_moe": {"head_dim": 64},
    "glm4v_moe_text": {"head_dim": 64, "norm_topk_prob": True, "use_qk_norm": False},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "glm5_next_text": {
        "mhc": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "mla_use_nope": True,
        "indexer_rope_interleave": True,
    },
    "kimi_linear": {
        "mla_use_nope": True,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "linear_attn_config": {  # numbered from 1
            "kda_layers": [1, 2, 3, 4, 6],
            "full_attn_layers": [5],
            "num_heads": 32,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {"block_dim": 256, "block_ff_dim": 256},
}

# Model type -> names that transformers saves, and what the hub's checkpoints say: of Kimi's layers only those with experts
# are called block_sparse_moe there.
TENSORS = {"kimi_linear": (r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r"\1.mlp.\2.")}
# Model type -> sizes that stay as published: GPU kernels have no others.
_LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
PUBLISHED = dict.fromkeys(
    ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash"),
    _LATENT,
)
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


def shrink(config) -> None:
    """Give a transformers config, and those nested in it, the sizes above."""
    lengths = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")}
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif name == "mlp_layer_types" and isinstance(value, list):
            setattr(config, name, ["dense", *["sparse"] * (LAYERS - 1)])
        elif isinstance(value, list) and len(value) in lengths and len(value) > LAYERS:
            setattr(config, name, value[:LAYERS])
        elif name in TOKENS and isinstance(value, int) and value >= SIZES["vocab_size"]:
            setattr(config, name, 1)
    for name, size in SIZES.items():
        name = getattr(config, "attribute_map", {}).get(name, name)
        if isinstance(vars(config).get(name), int) and vars(config)[name]:  # 0 says that there is no such part
            setattr(config, name, size)
    for name, size in PUBLISHED.get(config.model_type, {}).items():
        setattr(config, name, size)
    if getattr(config, "kv_lora_rank", None):  # latent attention has a key for every head
        config.num_key_value_heads = config.num_attention_heads
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


def make(architecture: str, directory: Path, tied: bool) -> dict:
    """Write a tiny checkpoint, random values, as transformers saves it: under the names of the hub.

    Returns:
        {} or, when there is none to be had, {"why": …}.
    """
    import transformers
    from vllm.model_executor.models.registry import ModelRegistry

    kind = getattr(transformers, architecture, None)
    if kind is None:
        return {"why": "transformers has no class of this name"}
    try:
        if not ModelRegistry.models[architecture].inspect_model_cls().supports_pp:
            return {"why": "does not declare pipeline support"}
    except Exception as error:
        return {"why": f"cannot be imported: {one_line(error)}"}
    transformers.logging.set_verbosity_error()
    try:
        config = kind.config_class()
        shrink(config)
        for part in (config, getattr(config, "text_config", None)):
            if part is not None:
                part.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = fill(kind(config).to(torch.bfloat16))
        model.config.architectures = [architecture]
        model.save_pretrained(directory)
    except Exception as error:
        return {"why": f"no tiny config: {one_line(error)}"}
    if config.model_type in TENSORS:
        rename(directory / "model.safetensors", *TENSORS[config.model_type])
    path = directory / "config.json"
    text = path.read_text()
    for saved, on_hub in RENAMED.get(config.model_type, {}).items():
        text = text.replace(f'"{saved}"', f'"{on_hub}"')
    saved = json.loads(text)
    for part in [saved, *(value for value in saved.values() if isinstance(value, dict))]:
        part.update({key: value for key, value in ADDED.get(part.get("model_type"), {}).items() if part.get(key) is None})
    path.write_text(json.dumps(saved))
    return {}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in what transformers leaves at zero or one: what is lost must not look like what memory holds."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
            tensor.normal_(mean=1.0, std=0.05)
    return model


def rename(shard: Path, saved: str, on_hub: str) -> None:
    """Give the tensors of a file other names, by a regular expression and what replaces it."""
    save_file({re.sub(saved, on_hub, name): tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
