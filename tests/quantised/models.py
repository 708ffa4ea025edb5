"""The models that are quantised: names and shapes of their tensors, config.json; no data.

Sizes are multiples of 256, so that no kernel refuses them for their shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from glmpp.checkpoint import Checkpoint, TensorSpec

LAYERS = 4
HIDDEN = 512
INTERMEDIATE = 1024
EXPERT = 512  # intermediate size of an expert
EXPERTS = 4
HEADS, KV_HEADS, HEAD = 4, 2, 128
VOCABULARY = 512


@dataclass
class Model:
    """An unquantised model.

    Attributes:
        linears: module -> (out, in) of those that are quantised.
        kept: module -> (out, in) of the linear layers that every writer leaves alone: router and lm_head.
        plain: the other tensors: name -> shape.
        attentions: the modules that hold a KV cache.
    """

    config: dict
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    plain: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)

    def attention(self, at: str, norms: bool = False) -> None:
        """Grouped-query attention."""
        self.linears[f"{at}.q_proj"] = (HEADS * HEAD, HIDDEN)
        self.linears[f"{at}.k_proj"] = self.linears[f"{at}.v_proj"] = (KV_HEADS * HEAD, HIDDEN)
        self.linears[f"{at}.o_proj"] = (HIDDEN, HEADS * HEAD)
        if norms:
            self.plain[f"{at}.q_norm.weight"] = self.plain[f"{at}.k_norm.weight"] = (HEAD,)
        self.attentions.append(at)

    def mlp(self, at: str, size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up, down = (f"{at}.{name}" for name in names)
        self.linears[gate] = self.linears[up] = (size, HIDDEN)
        self.linears[down] = (HIDDEN, size)

    def around(self) -> Model:
        """Norms of the layers, embeddings, head."""
        for layer in range(LAYERS):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.plain[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
        self.plain["model.embed_tokens.weight"] = (VOCABULARY, HIDDEN)
        self.plain["model.norm.weight"] = (HIDDEN,)
        self.kept["lm_head"] = (VOCABULARY, HIDDEN)
        return self


COMMON = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "max_position_embeddings": 512,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "attention_bias": False,
    "attention_dropout": 0.0,
}


def llama() -> Model:
    """LlamaForCausalLM, as meta-llama/Llama-3.1-8B-Instruct names its tensors."""
    config = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0}
    model = Model({**config, "intermediate_size": INTERMEDIATE, "head_dim": HEAD, "mlp_bias": False})
    for layer in range(LAYERS):
        model.attention(f"model.layers.{layer}.self_attn")
        model.mlp(f"model.layers.{layer}.mlp", INTERMEDIATE)
    return model.around()


def qwen3_moe() -> Model:
    """Qwen3MoeForCausalLM, as Qwen/Qwen3-30B-A3B names its tensors."""
    config = {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": HEAD,
        "intermediate_size": INTERMEDIATE,
        "mlp_only_layers": [],
        "moe_intermediate_size": EXPERT,
        "norm_topk_prob": True,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
    }
    model = Model(config)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        model.attention(f"{at}.self_attn", norms=True)
        model.kept[f"{at}.mlp.gate"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            model.mlp(f"{at}.mlp.experts.{expert}", EXPERT)
    return model.around()


def mixtral() -> Model:
    """MixtralForCausalLM, as mistralai/Mixtral-8x7B-Instruct-v0.1 names its tensors."""
    config = {
        **COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": HEAD,
        "intermediate_size": EXPERT,
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    }
    model = Model(config)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        model.attention(f"{at}.self_attn")
        model.kept[f"{at}.block_sparse_moe.gate"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            model.mlp(f"{at}.block_sparse_moe.experts.{expert}", EXPERT, ("w1", "w3", "w2"))
    return model.around()


def deepseek_v3() -> Model:
    """DeepseekV3ForCausalLM, as deepseek-ai/DeepSeek-V3 names its tensors; one dense layer, no MTP layer."""
    nope, rope, value, q_rank, kv_rank = 128, 64, 128, 512, 512
    config = {
        **COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "intermediate_size": INTERMEDIATE,
        "kv_lora_rank": kv_rank,
        "moe_intermediate_size": EXPERT,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 16,  # of the published 128: as many as the latent attention of a GPU asks for at least
        "num_experts_per_tok": 2,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": value,
    }
    heads = config["num_attention_heads"]
    model = Model(config)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        attention = f"{at}.self_attn"
        model.linears[f"{attention}.q_a_proj"] = (q_rank, HIDDEN)
        model.linears[f"{attention}.q_b_proj"] = (heads * (nope + rope), q_rank)
        model.linears[f"{attention}.kv_a_proj_with_mqa"] = (kv_rank + rope, HIDDEN)
        model.linears[f"{attention}.kv_b_proj"] = (heads * (nope + value), kv_rank)
        model.linears[f"{attention}.o_proj"] = (HIDDEN, heads * value)
        model.plain[f"{attention}.q_a_layernorm.weight"] = (q_rank,)
        model.plain[f"{attention}.kv_a_layernorm.weight"] = (kv_rank,)
        model.attentions.append(attention)
        if layer < config["first_k_dense_replace"]:
            model.mlp(f"{at}.mlp", INTERMEDIATE)
            continue
        model.kept[f"{at}.mlp.gate"] = (EXPERTS, HIDDEN)
        model.plain[f"{at}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        model.mlp(f"{at}.mlp.shared_experts", EXPERT)
        for expert in range(EXPERTS):
            model.mlp(f"{at}.mlp.experts.{expert}", EXPERT)
    return model.around()


def gpt_oss() -> Checkpoint:
    """openai/gpt-oss-20b: MXFP4 experts, both matrices of all of them in one tensor; all else in BF16.

    Source: the model's own index (blocks, scales), and transformers' Mxfp4Config and integrations/mxfp4.py.
    """
    heads, kv_heads, head = 8, 2, 64
    config = {
        **COMMON,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 2,
        "head_dim": head,
        "initial_context_length": 4096,
        "intermediate_size": EXPERT,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": heads,
        "num_experts_per_tok": 2,
        "num_key_value_heads": kv_heads,
        "num_local_experts": EXPERTS,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    }
    specs = [TensorSpec("lm_head.weight", "BF16", (VOCABULARY, HIDDEN))]
    specs += [TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    specs += [TensorSpec("model.norm.weight", "BF16", (HIDDEN,))]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            specs.append(TensorSpec(f"{at}.{name}.weight", "BF16", (HIDDEN,)))
        outs = {"q_proj": heads * head, "k_proj": kv_heads * head, "v_proj": kv_heads * head}
        for name, out in outs.items():
            specs.append(TensorSpec(f"{at}.self_attn.{name}.weight", "BF16", (out, HIDDEN)))
            specs.append(TensorSpec(f"{at}.self_attn.{name}.bias", "BF16", (out,)))
        specs.append(TensorSpec(f"{at}.self_attn.o_proj.weight", "BF16", (HIDDEN, heads * head)))
        specs.append(TensorSpec(f"{at}.self_attn.o_proj.bias", "BF16", (HIDDEN,)))
        specs.append(TensorSpec(f"{at}.self_attn.sinks", "BF16", (heads,)))
        specs.append(TensorSpec(f"{at}.mlp.router.weight", "BF16", (EXPERTS, HIDDEN)))
        specs.append(TensorSpec(f"{at}.mlp.router.bias", "BF16", (EXPERTS,)))
        for name, out, size in (("gate_up_proj", 2 * EXPERT, HIDDEN), ("down_proj", HIDDEN, EXPERT)):
            experts = f"{at}.mlp.experts.{name}"
            specs.append(TensorSpec(f"{experts}_blocks", "U8", (EXPERTS, out, size // 32, 16)))
            specs.append(TensorSpec(f"{experts}_scales", "U8", (EXPERTS, out, size // 32)))
            specs.append(TensorSpec(f"{experts}_bias", "BF16", (EXPERTS, out)))
    return Checkpoint(specs, config)


MODELS: dict[str, Callable[[], Model]] = {
    "dense": llama,
    "moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
}
