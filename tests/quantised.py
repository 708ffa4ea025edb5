"""Tiny checkpoints in every published way of quantising: names, dtypes, shapes and config.json; no data.

A `Format` turns a linear weight [out, in] into the tensors that its writer stores for it, and gives the entry
`quantization_config` of config.json. Its `source` names what the form was taken from: the program that writes it (name and
release, file) and, where there is one, a public model that has it.

Sizes are multiples of 256, so that no kernel refuses them for their shape.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from glmpp.checkpoint import Checkpoint, TensorSpec

LAYERS = 4
HIDDEN = 512
INTERMEDIATE = 1024
EXPERT = 512  # intermediate size of an expert
EXPERTS = 4
HEADS, KV_HEADS, HEAD = 4, 2, 128
VOCABULARY = 512

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> dtype, shape


# --- models -------------------------------------------------------------------------------------------------------


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


# --- formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A way of quantising, as it is published.

    Attributes:
        method: what vLLM calls the method that reads it, in QUANTIZATION_METHODS.
        source: what the names, shapes and the config were taken from.
        linear: the tensors of a linear layer [out, in].
        config: `quantization_config`, of the model at hand.
        cache: tensors of an attention module, for the scales of its KV cache.
        keeps: whether a linear layer of this name stays in BF16, besides router and lm_head.
        models: of MODELS.
    """

    method: str
    source: str
    linear: Callable[[int, int], Tensors]
    config: Callable[[Model], dict]
    cache: Tensors = field(default_factory=dict)
    keeps: Callable[[str], bool] = lambda name: False
    models: tuple[str, ...] = ("dense", "moe")


def grid(out: int, size: int, rows: int, columns: int) -> tuple[int, int]:
    return math.ceil(out / rows), math.ceil(size / columns)


def kept(model: Model) -> list[str]:
    return list(model.kept)


# vLLM's own "fp8": the names of DeepSeek's blocks, and those of AutoFP8.


def fp8_block(scale: str, out: int, size: int) -> Tensors:
    return {"weight": ("F8_E4M3", (out, size)), "weight_scale_inv": (scale, grid(out, size, 128, 128))}


def fp8_block_config(model: Model, **more) -> dict:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [*kept(model), *(name.removesuffix(".weight") for name in model.plain if "norm" in name)],
        **more,
    }


def fp8_tensor(static: bool, out: int, size: int) -> Tensors:
    scales: Tensors = {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", ())}
    return {**scales, "input_scale": ("F32", ())} if static else scales


def fp8_tensor_config(model: Model, scheme: str, **more) -> dict:
    return {"activation_scheme": scheme, "ignored_layers": kept(model), "quant_method": "fp8", **more}


OUTPUT_SCALES: Tensors = {"k_proj.output_scale": ("F32", ()), "v_proj.output_scale": ("F32", ())}

# compressed-tensors: the presets of its quant_scheme.py, compressed by its compressors, as llm-compressor saves them.


def args(bits: int, kind: str, strategy: str, dynamic: bool | str = False, **more) -> dict:
    """One QuantizationArgs as it is written to config.json."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": bits,
        "observer": None if dynamic is True else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
        **more,
    }


def compressed(model: Model, form: str, weights: dict, inputs: dict | None = None, cache: dict | None = None) -> dict:
    group = {
        "format": form,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": kept(model),
        "kv_cache_scheme": cache,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",
    }


def packed(
    bits: int, group: int | None, out: int, size: int, zero_point: bool = False, order: bool = False, scale: str = "BF16"
) -> Tensors:
    """Integers in I32 along the columns (`pack_to_int32`); zero points along the rows."""
    groups = 1 if group is None else size // group
    tensors: Tensors = {
        "weight_packed": ("I32", (out, size * bits // 32)),
        "weight_scale": (scale, (out, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if zero_point:
        tensors["weight_zero_point"] = ("I32", (out * bits // 32, groups))
    if order:
        tensors["weight_g_idx"] = ("I32", (size,))
    return tensors


FP8_CACHE = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
ATTENTION_SCALES: Tensors = {"k_scale": ("BF16", (1,)), "v_scale": ("BF16", (1,))}
NVFP4 = partial(args, 4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
MX4 = partial(args, 4, "float", "group", group_size=32, scale_dtype="torch.uint8")
MX8 = partial(args, 8, "float", "group", group_size=32, scale_dtype="torch.uint8")
TOKEN8 = args(8, "int", "token", True)
TOKEN_FP8 = args(8, "float", "token", True)

# ModelOpt: hf_quant_config.json as `convert_hf_quant_config_format` turns it into the entry of config.json.


def modelopt(model: Model, algorithm: str, groups: dict | None = None, cache: bool = False, **more) -> dict:
    """What it writes for an algorithm; the newer ones come without groups."""
    config = {
        "ignore": kept(model),
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
        **more,
    }
    if groups is not None:
        config["config_groups"] = groups
    if cache:
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


def group(weights: dict, inputs: dict | None, targets: list[str]) -> dict:
    activations = {} if inputs is None else {"input_activations": {"dynamic": False, **inputs}}
    return {**activations, "weights": {"dynamic": False, **weights}, "targets": targets}


FLOAT8, FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float", "group_size": 16}
OF_FP8 = {"group_0": group(FLOAT8, FLOAT8, ["Linear"])}
OF_NVFP4 = {"group_0": group(FLOAT4, FLOAT4, ["Linear"])}
PROJECTION_SCALES: Tensors = {"k_proj.k_scale": ("F32", ()), "v_proj.v_scale": ("F32", ())}


def nvfp4(inputs: bool, out: int, size: int) -> Tensors:
    tensors: Tensors = {
        "weight": ("U8", (out, size // 2)),
        "weight_scale": ("F8_E4M3", (out, size // 16)),
        "weight_scale_2": ("F32", ()),
    }
    return {**tensors, "input_scale": ("F32", ())} if inputs else tensors


def modelopt_mixed(model: Model) -> dict:
    """Attention in FP8, the rest in NVFP4; every layer is listed."""
    layers = {
        name: {"quant_algo": "FP8"} if ".self_attn." in name else {"quant_algo": "NVFP4", "group_size": 16}
        for name in model.linears
    }
    attention = [name for name in layers if ".self_attn." in name]
    groups = {
        "group_0": group(FLOAT8, FLOAT8, sorted(attention)),
        "group_1": group(FLOAT4, FLOAT4, sorted(layers.keys() - set(attention))),
    }
    return modelopt(model, "MIXED_PRECISION", groups, quantized_layers=layers)


# Quark: `QConfig.to_dict`, with `export` as its exporter adds it.


def tensor_config(dtype: str, scheme: str, dynamic: bool = False, **more) -> dict:
    """One QTensorConfig as it is written to config.json."""
    return {
        "dtype": dtype,
        "is_dynamic": dynamic,
        "qscheme": scheme,
        "ch_axis": None,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerTensorMinMaxObserver",
        "is_scale_quant": False,
        **more,
    }


def quark(model: Model, weight: dict | list, inputs: dict | list | None, cache: bool = False) -> dict:
    everywhere = {
        "input_tensors": inputs,
        "output_tensors": None,
        "weight": weight,
        "bias": None,
        "target_device": None,
    }
    of_cache = {**everywhere, "output_tensors": tensor_config("fp8_e4m3", "per_tensor")}
    cached = ["*k_proj", "*v_proj"] if cache else []
    return {
        "algo_config": None,
        "exclude": kept(model),
        "export": {
            "kv_cache_group": cached,
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": everywhere,
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {name: of_cache for name in cached},
        "layer_quant_config": {name: of_cache for name in cached},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": "0.13",
    }


E4M3 = partial(tensor_config, "fp8_e4m3")
MX = {"ch_axis": -1, "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even", "symmetric": None}
MX_FP4 = partial(tensor_config, "fp4", "per_group", **MX)

# Whole numbers: GPTQ, AWQ, AutoRound.


def gptq(bits: int, group: int, out: int, size: int) -> Tensors:
    """GPTQModel's and AutoGPTQ's QuantLinear: packed along the rows of the transposed weight."""
    return {
        "g_idx": ("I32", (size,)),
        "qweight": ("I32", (size * bits // 32, out)),
        "qzeros": ("I32", (size // group, out * bits // 32)),
        "scales": ("F16", (size // group, out)),
    }


def gptq_config(model: Model, bits: int = 4, order: bool = False, symmetric: bool = True) -> dict:
    config = {
        "bits": bits,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": order,
        "group_size": 128,
        "lm_head": False,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
    }
    if len(model.kept) > 1:  # GPTQModel's way to say that the router is not quantised
        config["dynamic"] = {r"-:.*mlp\.gate$": {}}
    return config


def awq(group: int, out: int, size: int) -> Tensors:
    """AutoAWQ's WQLinear_GEMM: packed along the columns of the transposed weight."""
    return {
        "qweight": ("I32", (size, out // 8)),
        "qzeros": ("I32", (size // group, out // 8)),
        "scales": ("F16", (size // group, out)),
    }


def awq_config(model: Model) -> dict:
    routers = ["gate"] if len(model.kept) > 1 else None
    return {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": routers,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def autoround(model: Model, form: str, **more) -> dict:
    return {
        "autoround_version": "0.16.1",
        "bits": 4,
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in model.kept if name != "lm_head"},
        "group_size": 128,
        "packing_format": form,
        "quant_method": "auto-round",
        "sym": True,
        **more,
    }


# Others.


def bitsandbytes_4bit(out: int, size: int) -> Tensors:
    """`Params4bit` with double quantisation: blocks of 64, their scales in blocks of 256."""
    return {
        "weight": ("U8", (out * size // 2, 1)),
        "weight.absmax": ("U8", (out * size // 64,)),
        "weight.nested_absmax": ("F32", (math.ceil(out * size / 64 / 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (87,)),
    }


def bitsandbytes_config(model: Model, bits: int) -> dict:
    return {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [name.rsplit(".", 1)[-1] for name in model.kept],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }


def torchao_config(model: Model) -> dict:
    fp8 = {"_data": "float8_e4m3fn", "_type": "torch.dtype"}
    row = {"_data": {}, "_type": "PerRow", "_version": 1}
    data = {
        "activation_dtype": fp8,
        "activation_value_lb": None,
        "activation_value_ub": None,
        "granularity": [row, row],
        "kernel_preference": {"_data": "AUTO", "_type": "KernelPreference"},
        "mm_config": {
            "_data": {"emulate": False, "pad_inner_dim": False, "use_fast_accum": True},
            "_type": "Float8MMConfig",
            "_version": 1,
        },
        "set_inductor_config": True,
        "version": 2,
        "weight_dtype": fp8,
    }
    of_all = {"_data": data, "_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2}
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": kept(model),
        "quant_method": "torchao",
        "quant_type": {"default": of_all},
        "quant_type_kwargs": {},
        "untie_embedding_weights": False,
    }


def fp_quant(out: int, size: int) -> Tensors:
    """FPQuant's FPQuantLinear in NVFP4 after `pre_forward`."""
    return {
        "act_global_scale": ("F32", (1,)),
        "backward_hadamard_matrix": ("BF16", (16, 16)),
        "forward_hadamard_matrix": ("BF16", (16, 16)),
        "qweight": ("U8", (out, size // 2)),
        "scales": ("U8", (out, size // 16)),
        "weight_global_scale": ("F32", (1,)),
    }


FORMATS: dict[str, Format] = {
    # FP8 in vLLM's own format.
    "fp8, blocks": Format(
        "fp8",
        "Qwen/Qwen3-8B-FP8, Qwen/Qwen3-30B-A3B-FP8: scales in BF16",
        partial(fp8_block, "BF16"),
        fp8_block_config,
    ),
    "fp8, blocks of DeepSeek": Format(
        "fp8",
        "deepseek-ai/DeepSeek-V3: scales in F32; convert.py and kernel.py of its inference folder",
        partial(fp8_block, "F32"),
        fp8_block_config,
        models=("deepseek_v3",),
    ),
    "fp8, blocks with rounded scales": Format(
        "fp8",
        "deepseek-ai/DeepSeek-V3.1: scale_fmt says that the scales are powers of two; stored in F32",
        partial(fp8_block, "F32"),
        partial(fp8_block_config, scale_fmt="ue8m0"),
        models=("dense", "moe", "deepseek_v3"),
    ),
    "fp8, tensor": Format(
        "fp8",
        "AutoFP8 (quantize.py), activation_scheme static; neuralmagic/Meta-Llama-3-8B-Instruct-FP8",
        partial(fp8_tensor, True),
        partial(fp8_tensor_config, scheme="static"),
        models=("dense", "moe", "mixtral"),
    ),
    "fp8, tensor, dynamic": Format(
        "fp8",
        "AutoFP8 (quantize.py), activation_scheme dynamic",
        partial(fp8_tensor, False),
        partial(fp8_tensor_config, scheme="dynamic"),
        models=("dense", "moe", "mixtral"),
    ),
    "fp8, tensor, cache": Format(
        "fp8",
        "AutoFP8 (quantize.py), kv_cache_quant_layers; neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV",
        partial(fp8_tensor, True),
        partial(fp8_tensor_config, scheme="static", kv_cache_scheme="static"),
        cache=OUTPUT_SCALES,
    ),
    # FP8 in compressed-tensors.
    "compressed-tensors, FP8 tensor": Format(
        "compressed-tensors",
        "preset FP8, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("BF16", (1,)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(model, "float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor")),
    ),
    "compressed-tensors, FP8 channel": Format(
        "compressed-tensors",
        "preset FP8_DYNAMIC, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "float-quantized", args(8, "float", "channel"), TOKEN_FP8),
        models=("dense", "moe", "mixtral", "deepseek_v3"),
    ),
    "compressed-tensors, FP8 blocks": Format(
        "compressed-tensors",
        "preset FP8_BLOCK, naive_quantized; RedHatAI/Qwen3-8B-FP8-block",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", grid(out, size, 128, 128))},
        lambda model: compressed(
            model,
            "float-quantized",
            args(8, "float", "block", block_structure=[128, 128]),
            args(8, "float", "group", True, group_size=128),
        ),
    ),
    "compressed-tensors, FP8 weights": Format(
        "compressed-tensors",
        "FP8_DYNAMIC without input_activations, naive_quantized (W8A16)",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "float-quantized", args(8, "float", "channel")),
    ),
    "compressed-tensors, FP8 tensor, cache": Format(
        "compressed-tensors",
        "preset FP8 with kv_cache_scheme; RedHatAI/Llama-3.3-70B-Instruct-FP8-KV",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("BF16", (1,)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(
            model, "float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor"), FP8_CACHE
        ),
        cache=ATTENTION_SCALES,
    ),
    # FP8 in ModelOpt.
    "modelopt, FP8": Format(
        "modelopt",
        "modelopt 0.47.0 (export/unified_export_hf.py), FP8; nvidia/Llama-3.1-8B-Instruct-FP8 without its KV scales",
        partial(fp8_tensor, True),
        lambda model: modelopt(model, "FP8", OF_FP8),
    ),
    "modelopt, FP8, cache": Format(
        "modelopt",
        "modelopt 0.47.0 (export/quant_utils.py: k_proj.k_scale), FP8 and its KV cache; nvidia/Llama-3.1-8B-Instruct-FP8",
        partial(fp8_tensor, True),
        lambda model: modelopt(model, "FP8", OF_FP8, cache=True),
        cache=PROJECTION_SCALES,
    ),
    "modelopt, FP8 channel": Format(
        "modelopt",
        "modelopt 0.47.0, FP8_PER_CHANNEL_PER_TOKEN: one scale per row, none of the inputs",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out,))},
        lambda model: modelopt(model, "FP8_PER_CHANNEL_PER_TOKEN"),
    ),
    "modelopt, FP8 blocks": Format(
        "modelopt",
        "modelopt 0.47.0, FP8_PB_WO: scales keep the dimensions of the blocks, [rows, 1, columns, 1]",
        lambda out, size: {
            "weight": ("F8_E4M3", (out, size)),
            "weight_scale": ("F32", (math.ceil(out / 128), 1, math.ceil(size / 128), 1)),
        },
        lambda model: modelopt(model, "FP8_PB_WO"),
    ),
    # FP8 in Quark.
    "quark, FP8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), FP8E4M3PerTensorSpec; amd/Llama-3.1-8B-Instruct-FP8-KV without its KV scales",
        partial(fp8_tensor, True),
        lambda model: quark(model, E4M3("per_tensor"), E4M3("per_tensor")),
        models=("dense", "moe", "mixtral"),
    ),
    "quark, FP8, cache": Format(
        "quark",
        "amd-quark 0.13 (torch/export), kv_cache_group; amd/Llama-3.1-8B-Instruct-FP8-KV",
        partial(fp8_tensor, True),
        lambda model: quark(model, E4M3("per_tensor"), E4M3("per_tensor"), cache=True),
        cache=OUTPUT_SCALES,
    ),
    "quark, FP8 channel": Format(
        "quark",
        "amd-quark 0.13 (torch/export), ptpc_fp8: per channel, inputs per token",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out,))},
        lambda model: quark(model, E4M3("per_channel", ch_axis=0), E4M3("per_channel", True, ch_axis=1)),
    ),
    "quark, FP8 blocks": Format(
        "quark",
        "amd-quark 0.13 (torch/export), FP8E4M3PerBlockSpec with inputs per group of 128",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", grid(out, size, 128, 128))},
        lambda model: quark(
            model,
            E4M3("per_block", ch_axis=-1, block_size=[128, 128]),
            E4M3("per_group", True, ch_axis=-1, group_size=128),
        ),
    ),
    "fbgemm, FP8": Format(
        "fbgemm_fp8",
        "transformers' FbgemmFp8Config and integrations/fbgemm_fp8.py; meta-llama/Llama-3.1-405B-Instruct-FP8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("F32", (out, 1))},
        lambda model: {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": [*kept(model), *(name for name in model.linears if ".self_attn." in name)],
            "quant_method": "fbgemm_fp8",
        },
        keeps=lambda name: ".self_attn." in name,
    ),
    # Four bits, floating.
    "modelopt, NVFP4": Format(
        "modelopt_fp4",
        "modelopt 0.47.0 (qtensor/nvfp4_tensor.py), NVFP4; nvidia/Llama-3.3-70B-Instruct-FP4, nvidia/Qwen3-30B-A3B-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4),
        models=("dense", "moe", "mixtral"),
    ),
    "modelopt, NVFP4, cache": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, NVFP4 with an FP8 KV cache; nvidia/Llama-3.1-8B-Instruct-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4, cache=True),
        cache=PROJECTION_SCALES,
    ),
    "modelopt, NVFP4 of DeepSeek": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, NVFP4 with attention left in BF16; nvidia/DeepSeek-R1-0528-FP4",
        partial(nvfp4, True),
        lambda model: modelopt(model, "NVFP4", OF_NVFP4, ignore=[*kept(model), *(f"{name}*" for name in model.attentions)]),
        keeps=lambda name: ".self_attn." in name,
        models=("deepseek_v3",),
    ),
    "modelopt, NVFP4 weights": Format(
        "modelopt_fp4",
        "modelopt 0.47.0, W4A16_NVFP4: no scale of the inputs",
        partial(nvfp4, False),
        lambda model: modelopt(model, "W4A16_NVFP4", {"group_0": group(FLOAT4, None, ["Linear"])}),
    ),
    "modelopt, mixed": Format(
        "modelopt_mixed",
        "modelopt 0.47.0 (export/convert_hf_config.py), MIXED_PRECISION: FP8 attention, NVFP4 elsewhere",
        partial(nvfp4, True),
        modelopt_mixed,
    ),
    "compressed-tensors, NVFP4": Format(
        "compressed-tensors",
        "preset NVFP4, compressors/nvfp4; RedHatAI/Qwen3-30B-A3B-NVFP4, RedHatAI/Llama-3.1-8B-Instruct-NVFP4",
        lambda out, size: {
            "weight_packed": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_global_scale": ("F32", (1,)),
            "input_global_scale": ("F32", (1,)),
        },
        lambda model: compressed(model, "nvfp4-pack-quantized", NVFP4(), NVFP4("local")),
    ),
    "compressed-tensors, NVFP4 weights": Format(
        "compressed-tensors",
        "preset NVFP4A16, compressors/nvfp4; RedHatAI/Llama-3.1-8B-Instruct-NVFP4A16",
        lambda out, size: {
            "weight_packed": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_global_scale": ("F32", (1,)),
        },
        lambda model: compressed(model, "nvfp4-pack-quantized", NVFP4()),
    ),
    "quark, NVFP4": Format(
        "quark",
        "amd-quark 0.13 (torch/export), NVFP4: two stages, of which the scales of the second are named _2",
        lambda out, size: {
            "weight": ("U8", (out, size // 2)),
            "weight_scale": ("F8_E4M3", (out, size // 16)),
            "weight_scale_2": ("F32", ()),
            "input_scale_2": ("F32", ()),
        },
        lambda model: quark(
            model,
            [tensor_config("fp4", "per_group", ch_axis=-1, group_size=16), E4M3("per_tensor", is_scale_quant=True)],
            [tensor_config("fp4", "per_group", True, ch_axis=-1, group_size=16), E4M3("per_tensor", is_scale_quant=True)],
        ),
    ),
    "compressed-tensors, MXFP4": Format(
        "compressed-tensors",
        "preset MXFP4, compressors/mxfp4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4(), MX4(True)),
    ),
    "compressed-tensors, MXFP4 weights": Format(
        "compressed-tensors",
        "preset MXFP4A16, compressors/mxfp4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4()),
    ),
    "compressed-tensors, MXFP4, FP8 inputs": Format(
        "compressed-tensors",
        "MXFP4 weights of preset MXFP4, inputs of preset FP8_DYNAMIC (W4A8)",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp4-pack-quantized", MX4(), TOKEN_FP8),
    ),
    "quark, MXFP4": Format(
        "quark",
        "amd-quark 0.13 (torch/export), OCP_MXFP4Spec; amd/DeepSeek-R1-0528-MXFP4-Preview",
        lambda out, size: {"weight": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: quark(model, MX_FP4(), MX_FP4(True)),
    ),
    "autoround, MXFP4": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/qlinear_fp.py), MXFP4",
        lambda out, size: {"weight_packed": ("U8", (out, size // 2)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: autoround(
            model,
            "auto_round:llm_compressor",
            data_type="mx_fp",
            group_size=32,
            act_bits=4,
            act_data_type="mx_fp",
            act_dynamic=True,
            act_group_size=32,
            act_sym=True,
        ),
    ),
    # Eight bits in blocks of 32.
    "modelopt, MXFP8": Format(
        "modelopt_mxfp8",
        "modelopt 0.47.0 (qtensor/mxfp8_tensor.py), MXFP8: scales E8M0 in U8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: modelopt(model, "MXFP8"),
    ),
    "compressed-tensors, MXFP8": Format(
        "compressed-tensors",
        "preset MXFP8, compressors/mxfp8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: compressed(model, "mxfp8-quantized", MX8(), MX8(True)),
    ),
    "quark, MXFP8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), OCP_MXFP8E4M3Spec",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: quark(
            model, tensor_config("fp8_e4m3", "per_group", **MX), tensor_config("fp8_e4m3", "per_group", True, **MX)
        ),
    ),
    "autoround, MXFP8": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/qlinear_fp.py), MXFP8",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale": ("U8", (out, size // 32))},
        lambda model: autoround(
            model,
            "auto_round:llm_compressor",
            bits=8,
            data_type="mx_fp",
            group_size=32,
            act_bits=8,
            act_data_type="mx_fp",
            act_dynamic=True,
            act_group_size=32,
            act_sym=True,
        ),
    ),
    "autoround, FP8 blocks": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/export_to_fp8.py: FP8BlockQLinear)",
        lambda out, size: {"weight": ("F8_E4M3", (out, size)), "weight_scale_inv": ("BF16", grid(out, size, 128, 128))},
        lambda model: autoround(
            model,
            "auto_round:fp8",
            activation_scheme="dynamic",
            bits=8,
            data_type="fp",
            fmt="e4m3",
            group_size=[128, 128],
            act_bits=8,
            act_data_type="fp",
            act_dynamic=True,
            act_group_size=128,
            act_sym=True,
        ),
    ),
    # Four and eight bits, whole numbers.
    "compressed-tensors, W4A16": Format(
        "compressed-tensors",
        "preset W4A16, compressors/pack_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128)),
        models=("dense", "moe", "mixtral"),
    ),
    "compressed-tensors, W4A16 of Kimi": Format(
        "compressed-tensors",
        "moonshotai/Kimi-K2-Thinking: the routed experts alone, in groups of 32",
        partial(packed, 4, 32),
        lambda model: {
            **compressed(model, "pack-quantized", args(4, "int", "group", group_size=32)),
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        },
        keeps=lambda name: ".experts." not in name,
        models=("deepseek_v3",),
    ),
    "compressed-tensors, W4A16 channel": Format(
        "compressed-tensors",
        "W4A16 with strategy channel, compressors/pack_quantized",
        partial(packed, 4, None),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "channel")),
    ),
    "compressed-tensors, W4A16 with zero points": Format(
        "compressed-tensors",
        "preset W4A16_ASYM, compressors/pack_quantized, as llm-compressor's AWQModifier saves it",
        partial(packed, 4, 128, zero_point=True),
        lambda model: compressed(
            model,
            "pack-quantized",
            args(4, "int", "group", group_size=128, symmetric=False, zp_dtype="torch.int8"),
        ),
    ),
    "compressed-tensors, W4A16 in the order of activation": Format(
        "compressed-tensors",
        "preset W4A16 with actorder group (llm-compressor's GPTQModifier): weight_g_idx",
        partial(packed, 4, 128, order=True),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128, actorder="group")),
    ),
    "compressed-tensors, W8A16": Format(
        "compressed-tensors",
        "preset W8A16, compressors/pack_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a16",
        partial(packed, 8, 128),
        lambda model: compressed(model, "pack-quantized", args(8, "int", "group", group_size=128)),
    ),
    "compressed-tensors, W4A8 FP8": Format(
        "compressed-tensors",
        "preset W4AFP8, compressors/pack_quantized",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128), TOKEN_FP8),
    ),
    "compressed-tensors, W4A8 int": Format(
        "compressed-tensors",
        "preset W4A8, compressors/pack_quantized",
        partial(packed, 4, 128),
        lambda model: compressed(model, "pack-quantized", args(4, "int", "group", group_size=128), TOKEN8),
    ),
    "compressed-tensors, W8A8 int8": Format(
        "compressed-tensors",
        "preset W8A8, naive_quantized; RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        lambda out, size: {"weight": ("I8", (out, size)), "weight_scale": ("BF16", (out, 1))},
        lambda model: compressed(model, "int-quantized", args(8, "int", "channel"), TOKEN8),
    ),
    "compressed-tensors, W8A8 int8, static": Format(
        "compressed-tensors",
        "W8A8 with static inputs per tensor, naive_quantized",
        lambda out, size: {
            "weight": ("I8", (out, size)),
            "weight_scale": ("BF16", (out, 1)),
            "input_scale": ("BF16", (1,)),
        },
        lambda model: compressed(model, "int-quantized", args(8, "int", "channel"), args(8, "int", "tensor")),
    ),
    "quark, int8": Format(
        "quark",
        "amd-quark 0.13 (torch/export), Int8PerTensorSpec weights and static inputs",
        lambda out, size: {
            "weight": ("I8", (out, size)),
            "weight_scale": ("F32", ()),
            "weight_zero_point": ("I32", ()),
            "input_scale": ("F32", ()),
            "input_zero_point": ("I32", ()),
        },
        lambda model: quark(model, tensor_config("int8", "per_tensor"), tensor_config("int8", "per_tensor")),
    ),
    "quark, int4 weights": Format(
        "quark",
        "amd-quark 0.13 (torch/export), Int4PerGroupSpec, pack_method reorder",
        lambda out, size: {
            "weight": ("I32", (size, out // 8)),
            "weight_scale": ("BF16", (size // 128, out)),
            "weight_zero_point": ("I32", (size // 128, out // 8)),
        },
        lambda model: quark(model, tensor_config("int4", "per_group", ch_axis=-1, group_size=128), None),
    ),
    "gptq": Format(
        "gptq",
        "AutoGPTQ, GPTQModel; Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4, Qwen/Qwen3-30B-A3B-GPTQ-Int4",
        partial(gptq, 4, 128),
        gptq_config,
    ),
    "gptq, 8 bits": Format(
        "gptq",
        "AutoGPTQ, GPTQModel; Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8",
        partial(gptq, 8, 128),
        partial(gptq_config, bits=8),
    ),
    "gptq, in the order of activation": Format(
        "gptq",
        "AutoGPTQ, desc_act; TheBloke/Llama-2-7B-Chat-GPTQ, branch gptq-4bit-128g-actorder_True",
        partial(gptq, 4, 128),
        partial(gptq_config, order=True),
    ),
    "awq": Format(
        "awq",
        "AutoAWQ 0.2.9 (awq/modules/linear/gemm.py); Qwen/Qwen2.5-7B-Instruct-AWQ, Qwen/Qwen3-32B-AWQ",
        partial(awq, 128),
        awq_config,
    ),
    "autoround": Format(
        "inc",
        "auto-round 0.16.1 (export_to_autoround/export.py), auto_round:auto_gptq; Intel/Qwen3-30B-A3B-int4-AutoRound",
        partial(gptq, 4, 128),
        partial(autoround, form="auto_round:auto_gptq"),
    ),
    "autoround, as awq": Format(
        "inc",
        "auto-round 0.16.1 (export_to_awq), auto_round:auto_awq",
        partial(awq, 128),
        partial(autoround, form="auto_round:auto_awq", sym=False),
    ),
    # Libraries that vLLM calls and does not bring.
    "bitsandbytes, 4 bits": Format(
        "bitsandbytes",
        "bitsandbytes (functional.QuantState.as_dict), transformers' BitsAndBytesConfig; unsloth/Llama-3.1-8B-bnb-4bit",
        bitsandbytes_4bit,
        partial(bitsandbytes_config, bits=4),
    ),
    "bitsandbytes, 8 bits": Format(
        "bitsandbytes",
        "bitsandbytes (nn.Linear8bitLt), transformers' BitsAndBytesConfig",
        lambda out, size: {"weight": ("I8", (out, size)), "SCB": ("F32", (out,)), "weight_format": ("U8", ())},
        partial(bitsandbytes_config, bits=8),
    ),
    "torchao, FP8": Format(
        "torchao",
        "torchao's flatten_tensor_state_dict, transformers' TorchAoConfig; pytorch/Qwen3-8B-FP8",
        lambda out, size: {"_weight_qdata": ("F8_E4M3", (out, size)), "_weight_scale": ("F32", (out, 1))},
        torchao_config,
    ),
    "fp_quant, NVFP4": Format(
        "fp_quant",
        "fp_quant 0.3.2 (module/linear.py), transformers' FPQuantConfig; ISTA-DASLab's models",
        fp_quant,
        lambda model: {
            "backward_dtype": "bf16",
            "forward_dtype": "nvfp4",
            "forward_method": "abs_max",
            "hadamard_group_size": 16,
            "modules_to_not_convert": [name.rsplit(".", 1)[-1] for name in model.kept],
            "pseudoquantization": False,
            "quant_method": "fp_quant",
            "store_master_weights": False,
            "transform_init": "hadamard",
        },
    ),
}

# vLLM's other methods: why there is no checkpoint of their own above. What is in FORMATS is read off there.
ELSEWHERE: dict[str, str] = {
    "auto_awq": "reads awq",
    "auto_gptq": "reads gptq",
    "awq_marlin": "reads awq",
    "gptq_marlin": "reads gptq",
    "gpt_oss_mxfp4": "reads mxfp4 of GPT-OSS: `gpt_oss` above",
    "mxfp4": "GPT-OSS is its one published checkpoint: `gpt_oss` above",
    "moe_wna16": "reads gptq and awq when asked to",
    "humming": "another kernel for the checkpoints of other methods, when asked for",
    "cpu_awq": "reads awq on a CPU",
    "gguf": "a file format of its own, not safetensors",
    "deepseek_v4_fp8": "DeepSeek-V4 alone; its class is part of the sweep",
    "online": "no checkpoint: quantised while an unquantised one is loaded",
    "experts_int8": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_tensor": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_block": "no checkpoint: quantised while an unquantised one is loaded",
    "fp8_per_channel": "no checkpoint: quantised while an unquantised one is loaded",
    "int8_per_channel_weight_only": "no checkpoint: quantised while an unquantised one is loaded",
    "nvfp4_per_token": "no checkpoint: quantised while an unquantised one is loaded",
    "mxfp8": "no checkpoint: quantised while an unquantised one is loaded; as a word in a config it means modelopt_mxfp8",
}


def quantised(form: str, model: str) -> Checkpoint:
    """A checkpoint of a format of FORMATS and a model of MODELS, or of "mxfp4" and "gpt_oss"."""
    if (form, model) == ("mxfp4", "gpt_oss"):
        return gpt_oss()
    chosen, made = FORMATS[form], MODELS[model]()
    specs = [TensorSpec(name, "BF16", shape) for name, shape in made.plain.items()]
    specs += [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in made.kept.items()]
    mixed = chosen.method == "modelopt_mixed"
    for name, (out, size) in made.linears.items():
        if chosen.keeps(name):
            tensors: Tensors = {"weight": ("BF16", (out, size))}
        elif mixed and ".self_attn." in name:
            tensors = fp8_tensor(True, out, size)
        else:
            tensors = chosen.linear(out, size)
        specs += [TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in tensors.items()]
    for name in made.attentions:
        specs += [TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in chosen.cache.items()]
    # A deep copy, for formats that say a part of it twice.
    return Checkpoint(specs, {**made.config, "quantization_config": copy.deepcopy(chosen.config(made))})


def cases() -> list[tuple[str, str]]:
    """Every format with each of its models."""
    return [("mxfp4", "gpt_oss"), *((name, model) for name, form in FORMATS.items() for model in form.models)]
