"""Tiny checkpoints with the structure of those in public reports, real bytes and all: what their reporters had in hand.

Each function at the end writes one folder; those before it make the tensors of a layer. A linear weight is made by one of
`plain`, `fp8`, `nvfp4`, which differ in the tensors that they store for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from models import write_model
from safetensors.torch import save_file

from glmpp.formats.config import load_config
from glmpp.formats.glm5 import reduced_config

Tensors = dict[str, torch.Tensor]
Linear = Callable[[Tensors, str, int, int], None]  # into, module, rows, columns

VOCABULARY = 512
BLOCK, GROUP = 128, 16  # of FP8, of NVFP4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


# --- tensors ------------------------------------------------------------------------------------------------------


def put(into: Tensors, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
    into[name] = (torch.randn(shape) * 0.02 + 0.01).to(dtype)


def plain(into: Tensors, module: str, rows: int, columns: int) -> None:
    put(into, f"{module}.weight", rows, columns)


def fp8(into: Tensors, module: str, rows: int, columns: int) -> None:
    """In blocks, as DeepSeek writes it."""
    put(into, f"{module}.weight", rows, columns, dtype=torch.float8_e4m3fn)
    put(into, f"{module}.weight_scale_inv", -(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)


def fp8_config(kept: list[str]) -> dict:
    """The entry of config.json for `fp8`. Args: kept: modules that are not quantised."""
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return {**scheme, "modules_to_not_convert": kept}


def nvfp4(into: Tensors, module: str, rows: int, columns: int) -> None:
    """As ModelOpt writes it: two numbers in a byte."""
    into[f"{module}.weight"] = torch.ones(rows, columns // 2, dtype=torch.uint8)
    put(into, f"{module}.weight_scale", rows, columns // GROUP, dtype=torch.float8_e4m3fn)
    put(into, f"{module}.weight_scale_2", dtype=torch.float32)
    put(into, f"{module}.input_scale", dtype=torch.float32)


def modelopt(ignored: list[str]) -> dict:
    """The entry of config.json for `nvfp4`."""
    numbers = {"num_bits": 4, "type": "float", "group_size": GROUP, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": numbers, "input_activations": numbers}}
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored, "config_groups": groups}


# --- layers -------------------------------------------------------------------------------------------------------


def norms(into: Tensors, at: str, hidden: int, *names: str) -> None:
    for name in names or ("input_layernorm", "post_attention_layernorm"):
        put(into, f"{at}.{name}.weight", hidden)


def attention(into: Tensors, at: str, hidden: int, heads: int, kv: int, head: int, linear: Linear = plain) -> None:
    """Grouped-query attention."""
    for name, rows in (("q", heads), ("k", kv), ("v", kv)):
        linear(into, f"{at}.{name}_proj", rows * head, hidden)
    linear(into, f"{at}.o_proj", hidden, heads * head)


def mlp(into: Tensors, at: str, hidden: int, inner: int, linear: Linear = plain) -> None:
    for name in ("gate_proj", "up_proj"):
        linear(into, f"{at}.{name}", inner, hidden)
    linear(into, f"{at}.down_proj", hidden, inner)


def ends(into: Tensors, model: str, hidden: int, head: str = "lm_head") -> None:
    """Embedding, last norm, head."""
    put(into, f"{model}.embed_tokens.weight", VOCABULARY, hidden)
    put(into, f"{model}.norm.weight", hidden)
    put(into, f"{head}.weight", VOCABULARY, hidden)


def llama(config: dict, model: str = "model", head: str = "lm_head", linear: Linear = plain) -> Tensors:
    """Args: model, head: what the two are called in the checkpoint."""
    into: Tensors = {}
    hidden = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        at = f"{model}.layers.{layer}"
        norms(into, at, hidden)
        heads = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        attention(into, f"{at}.self_attn", hidden, *heads, linear)
        mlp(into, f"{at}.mlp", hidden, config["intermediate_size"], linear)
    ends(into, model, hidden, head)
    return into


def qwen3_moe(inner: int, kv: int, linear: Linear, expert: Linear) -> tuple[Tensors, dict]:
    """Two layers of eight experts; args: inner: width of an expert; kv: heads; how layers and experts are stored."""
    into: Tensors = {}
    layers, hidden, experts, heads, head = 2, 512, 8, 16, 128
    for layer in range(layers):
        at = f"model.layers.{layer}"
        norms(into, at, hidden)
        attention(into, f"{at}.self_attn", hidden, heads, kv, head, linear)
        norms(into, f"{at}.self_attn", head, "q_norm", "k_norm")
        plain(into, f"{at}.mlp.gate", experts, hidden)
        for number in range(experts):
            mlp(into, f"{at}.mlp.experts.{number}", hidden, inner, expert)
    ends(into, "model", hidden)
    config = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden}
    config |= {"num_hidden_layers": layers, "intermediate_size": 2 * inner, "moe_intermediate_size": inner}
    config |= {"num_experts": experts, "num_experts_per_tok": 2, "num_attention_heads": heads, "num_key_value_heads": kv}
    config |= {"head_dim": head, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return into, config


# --- folders ------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Tensors, config: dict, shards: int = 1) -> Path:
    """A folder with config.json and shards, without an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, each = list(tensors), -(-len(tensors) // shards)
    for at in range(shards):
        file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[at * each : (at + 1) * each]}, folder / file)
    return folder


def fp8_experts_of_640(folder: Path) -> Path:
    """Block FP8, experts of five blocks: a rank of TP=2, 4 or 8 would have a part of one."""
    tensors, config = qwen3_moe(640, 8, fp8, fp8)
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    return write(folder, tensors, config | {"quantization_config": fp8_config(kept)})


def nvfp4_experts_without_input_scale(folder: Path) -> Path:
    """NVFP4 experts of which three of sixteen have seen no data when they were calibrated."""
    tensors, config = qwen3_moe(256, 4, plain, nvfp4)
    for layer, number in ((0, 3), (1, 5), (1, 6)):
        for name in ("gate", "up", "down"):
            del tensors[f"model.layers.{layer}.mlp.experts.{number}.{name}_proj.input_scale"]
    ignored = ["lm_head", "model.layers.*.self_attn*", "model.layers.*.mlp.gate"]
    return write(folder, tensors, config | {"quantization_config": modelopt(ignored)})


def nemotron_h_nvfp4(folder: Path) -> Path:
    """NVFP4 experts of 1856, which is 116 groups: of TP=8 a rank has 14 and a half."""
    into: Tensors = {}
    pattern, hidden, experts, inner, heads, head, groups, state = "ME*E", 512, 8, 1856, 16, 64, 8, 64
    mamba = heads * head
    kept = {
        "M": ["in_proj", "out_proj", "conv1d"],
        "*": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "E": ["gate", "shared_experts.up_proj", "shared_experts.down_proj"],
    }
    for layer, kind in enumerate(pattern):
        norms(into, f"backbone.layers.{layer}", hidden, "norm")
        at = f"backbone.layers.{layer}.mixer"
        if kind == "M":
            plain(into, f"{at}.in_proj", 2 * mamba + 2 * groups * state + heads, hidden)
            put(into, f"{at}.conv1d.weight", mamba + 2 * groups * state, 1, 4)
            put(into, f"{at}.conv1d.bias", mamba + 2 * groups * state)
            for name in ("A_log", "D", "dt_bias"):
                put(into, f"{at}.{name}", heads)
            norms(into, at, mamba, "norm")
            plain(into, f"{at}.out_proj", hidden, mamba)
        elif kind == "*":
            attention(into, at, hidden, heads, 2, head)
        else:
            plain(into, f"{at}.gate", experts, hidden)
            put(into, f"{at}.gate.e_score_correction_bias", experts, dtype=torch.float32)
            for number in range(experts):
                nvfp4(into, f"{at}.experts.{number}.up_proj", inner, hidden)
                nvfp4(into, f"{at}.experts.{number}.down_proj", hidden, inner)
            plain(into, f"{at}.shared_experts.up_proj", 2 * inner, hidden)
            plain(into, f"{at}.shared_experts.down_proj", hidden, 2 * inner)
    put(into, "backbone.embeddings.weight", VOCABULARY, hidden)
    put(into, "backbone.norm_f.weight", hidden)
    put(into, "lm_head.weight", VOCABULARY, hidden)
    ignored = [f"backbone.layers.{at}.mixer.{name}" for at, kind in enumerate(pattern) for name in kept[kind]]
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "hidden_size": hidden,
        "vocab_size": VOCABULARY,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": head,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "moe_shared_expert_intermediate_size": 2 * inner,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "mamba_num_heads": heads,
        "mamba_head_dim": head,
        "n_groups": groups,
        "ssm_state_size": state,
        "conv_kernel": 4,
        "expand": 2,
        "chunk_size": 128,
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "layer_norm_epsilon": 1e-5,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "time_step_limit": [0.0, 1e9],
        "torch_dtype": "bfloat16",
        "quantization_config": modelopt(["lm_head", *ignored]),
    }
    return write(folder, into, config)


def qwen35(folder: Path) -> Path:
    """A BF16 hybrid of linear and full attention, a vision tower, and an MTP layer under a name of its own."""
    into: Tensors = {}
    layers, hidden, inner, heads, kv, head = 8, 256, 256, 8, 2, 64
    key_heads, value_heads, width = 8, 16, 32
    model = "model.language_model"

    def full(at: str) -> None:
        plain(into, f"{at}.self_attn.q_proj", 2 * heads * head, hidden)  # half of it is a gate
        for name in ("k_proj", "v_proj"):
            plain(into, f"{at}.self_attn.{name}", kv * head, hidden)
        plain(into, f"{at}.self_attn.o_proj", hidden, heads * head)
        norms(into, f"{at}.self_attn", head, "q_norm", "k_norm")

    def linear(at: str) -> None:
        key, value = key_heads * width, value_heads * width
        plain(into, f"{at}.in_proj_qkv", 2 * key + value, hidden)
        plain(into, f"{at}.in_proj_z", value, hidden)
        plain(into, f"{at}.in_proj_a", value_heads, hidden)
        plain(into, f"{at}.in_proj_b", value_heads, hidden)
        put(into, f"{at}.conv1d.weight", 2 * key + value, 1, 4)
        put(into, f"{at}.dt_bias", value_heads)
        put(into, f"{at}.A_log", value_heads, dtype=torch.float32)
        put(into, f"{at}.norm.weight", width, dtype=torch.float32)
        plain(into, f"{at}.out_proj", hidden, value)

    kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(layers)]
    for layer, kind in enumerate(kinds):
        at = f"{model}.layers.{layer}"
        full(at) if kind == "full_attention" else linear(f"{at}.linear_attn")
        norms(into, at, hidden)
        mlp(into, f"{at}.mlp", hidden, inner)
    ends(into, model, hidden)
    full("mtp.layers.0")
    norms(into, "mtp.layers.0", hidden)
    mlp(into, "mtp.layers.0.mlp", hidden, inner)
    plain(into, "mtp.fc", hidden, 2 * hidden)
    norms(into, "mtp", hidden, "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    vision(into, "model.visual", hidden)
    language = {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": VOCABULARY,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_conv_kernel_dim": 4,
        "layer_types": kinds,
        "full_attention_interval": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
    }
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": language,
        "vision_config": VISION | {"out_hidden_size": hidden},
        "tie_word_embeddings": False,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }
    return write(folder, into, config)


VISION = {
    "model_type": "qwen3_5",
    "depth": 2,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "deepstack_visual_indexes": [],
}


def vision(into: Tensors, at: str, hidden: int) -> None:
    """The tower of Qwen3.5."""
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]

    def with_bias(module: str, *shape: int) -> None:
        put(into, f"{module}.weight", *shape)
        put(into, f"{module}.bias", shape[0])

    with_bias(f"{at}.patch_embed.proj", width, 3, 2, 16, 16)
    put(into, f"{at}.pos_embed.weight", VISION["num_position_embeddings"], width)
    for block in range(VISION["depth"]):
        with_bias(f"{at}.blocks.{block}.norm1", width)
        with_bias(f"{at}.blocks.{block}.norm2", width)
        with_bias(f"{at}.blocks.{block}.attn.qkv", 3 * width, width)
        with_bias(f"{at}.blocks.{block}.attn.proj", width, width)
        with_bias(f"{at}.blocks.{block}.mlp.linear_fc1", inner, width)
        with_bias(f"{at}.blocks.{block}.mlp.linear_fc2", width, inner)
    with_bias(f"{at}.merger.norm", width)
    with_bias(f"{at}.merger.linear_fc1", 4 * width, 4 * width)
    with_bias(f"{at}.merger.linear_fc2", hidden, 4 * width)


def glm4_moe_lite(folder: Path) -> Path:
    """GLM-4.7-Flash with its MTP layer, which is numbered after the others and has no embedding of its own."""
    into: Tensors = {}
    layers, hidden, inner, experts, heads, q_rank, kv_rank, nope, rope, value = 6, 256, 128, 4, 4, 128, 512, 128, 64, 128
    for layer in range(layers + 1):
        at = f"model.layers.{layer}"
        norms(into, at, hidden)
        own = f"{at}.self_attn"
        plain(into, f"{own}.q_a_proj", q_rank, hidden)
        norms(into, own, q_rank, "q_a_layernorm")
        plain(into, f"{own}.q_b_proj", heads * (nope + rope), q_rank)
        plain(into, f"{own}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        norms(into, own, kv_rank, "kv_a_layernorm")
        plain(into, f"{own}.kv_b_proj", heads * (nope + value), kv_rank)
        plain(into, f"{own}.o_proj", hidden, heads * value)
        if layer == 0:
            mlp(into, f"{at}.mlp", hidden, hidden)
            continue
        plain(into, f"{at}.mlp.gate", experts, hidden)
        put(into, f"{at}.mlp.gate.e_score_correction_bias", experts, dtype=torch.float32)
        for part in (*(f"experts.{number}" for number in range(experts)), "shared_experts"):
            mlp(into, f"{at}.mlp.{part}", hidden, inner)
    plain(into, f"model.layers.{layers}.eh_proj", hidden, 2 * hidden)
    norms(into, f"model.layers.{layers}", hidden, "enorm", "hnorm", "shared_head.norm")
    ends(into, "model", hidden)
    config = LLAMA | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "qk_head_dim": nope + rope,
        "v_head_dim": value,
        "max_position_embeddings": 512,
        "attention_bias": False,
    }
    del config["head_dim"], config["rope_theta"]
    return write(folder, into, config | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})


def mistral3(folder: Path, says_so: bool) -> Path:
    """The language model has a head of its own, as its config says; the wrapper's says nothing, and its default is another.

    Args:
        says_so: the wrapper's config says it, too.
    """
    width, head = 128, "language_model.lm_head"
    text = LLAMA | {"model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    del text["architectures"]
    into = llama(text, "language_model.model", head)
    hidden = text["hidden_size"]
    norms(into, "multi_modal_projector", width, "norm")
    plain(into, "multi_modal_projector.patch_merger.merging_layer", width, 4 * width)
    plain(into, "multi_modal_projector.linear_1", hidden, width)
    plain(into, "multi_modal_projector.linear_2", hidden, hidden)
    put(into, "vision_tower.patch_conv.weight", width, 3, 14, 14)
    norms(into, "vision_tower", width, "ln_pre")
    for layer in range(2):
        at = f"vision_tower.transformer.layers.{layer}"
        norms(into, at, width, "attention_norm", "ffn_norm")
        attention(into, f"{at}.attention", width, 2, 2, 64)
        mlp(into, f"{at}.feed_forward", width, 2 * width)
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text | {"sliding_window": None},
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "torch_dtype": "bfloat16",
        **({"tie_word_embeddings": False} if says_so else {}),
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 64,
            "image_size": 56,
            "patch_size": 14,
            "num_channels": 3,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
        },
    }
    return write(folder, into, config)


def qwen2_5_vl(folder: Path) -> Path:
    """A wrapper whose config ties the head, which the language model's own denies, and the checkpoint too."""
    write_model("qwen2_5_vl", folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = True, False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def leftovers(folder: Path, indexed: bool) -> Path:
    """As trainers leave it: the merged model, beside it an adapter and an optimizer. Args: indexed: an index names all."""
    write(folder, llama(LLAMA), LLAMA)
    lora: Tensors = {}
    for layer in range(LLAMA["num_hidden_layers"]):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        put(lora, f"{at}.lora_A.weight", 8, 256)
        put(lora, f"{at}.lora_B.weight", 512, 8)
    save_file(lora, folder / "adapter_model.safetensors")
    state = {"state.0.exp_avg": torch.ones(4, 4), "state.0.exp_avg_sq": torch.ones(4, 4)}
    save_file(state, folder / "optimizer.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    if indexed:
        files = {"model.safetensors": llama(LLAMA), "adapter_model.safetensors": lora, "optimizer.safetensors": state}
        write_index(folder, {name: file for file, tensors in files.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards(folder: Path, indexed: bool = False) -> Path:
    """Two shards. Args: indexed: an index names them, and older shards lie beside them."""
    tensors = llama(LLAMA)
    write(folder, tensors, LLAMA, 2)
    if indexed:
        first = -(-len(tensors) // 2)
        of = {name: f"model-0000{1 + (at >= first)}-of-00002.safetensors" for at, name in enumerate(tensors)}
        write_index(folder, of)
        for at in (1, 2, 3):
            save_file({"model.norm.weight": torch.zeros(3)}, folder / f"model-0000{at}-of-00003.safetensors")
    return folder


def eagle3(folder: Path) -> Path:
    """A drafter in the speculators format."""
    into: Tensors = {}
    hidden = 256
    plain(into, "fc", hidden, 3 * hidden)
    norms(into, "layers.0", hidden, "hidden_norm", "input_layernorm", "post_attention_layernorm")
    attention(into, "layers.0.self_attn", 2 * hidden, 8, 4, 64)
    mlp(into, "layers.0.mlp", hidden, 512)
    inner = {name: said for name, said in LLAMA.items() if name != "architectures"} | {"num_hidden_layers": 1}
    verifier = {"name_or_path": "/nowhere/verifier", "architectures": ["LlamaForCausalLM"]}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.4.0",
        "draft_vocab_size": 128,
        "transformer_layer_config": inner,
        "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
    }
    return write(folder, into, config)


def glm_5_2(folder: Path, glm_5_1: Path) -> Path:
    """A config of GLM-5.2's structure: most layers have no indexer of their own and go by the one before.

    Args: glm_5_1: config.json of GLM-5.1.
    """
    full = [layer < 3 or layer % 4 == 2 for layer in range(78)]
    config = load_config(glm_5_1) | {"indexer_types": ["full" if own else "shared" for own in full]}
    config |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    config["rope_parameters"] = {"rope_theta": 8_000_000, "rope_type": "default"}
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1024, "intermediate_size": 1024}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(reduced_config(config, **sizes)))
    return folder


REPORTS: dict[str, Callable[[Path], Path]] = {
    "fp8 experts of 640": fp8_experts_of_640,
    "nvfp4 experts without input_scale": nvfp4_experts_without_input_scale,
    "nemotron-h": nemotron_h_nvfp4,
    "qwen3.5": qwen35,
    "qwen2.5-vl, two words on the head": qwen2_5_vl,
    "glm-4.7-flash": glm4_moe_lite,
    "mistral3": partial(mistral3, says_so=False),
    "mistral3, says so": partial(mistral3, says_so=True),
    "leftovers": partial(leftovers, indexed=False),
    "leftovers, indexed": partial(leftovers, indexed=True),
    "shards without an index": shards,
    "older shards beside an index": partial(shards, indexed=True),
    "eagle3": eagle3,
}
