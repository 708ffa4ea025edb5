"""What the hub's configs and checkpoints say where transformers' classes say otherwise, for `tiny_models`."""

from __future__ import annotations

# Model type -> what transformers saves where the hub's configs, and vLLM, say something else.
RENAMED = {
    "granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"},
    "minimax_m3_vl": {"silu": "swigluoai"},
}

# Model type -> fields of the hub's configs that transformers' classes do not keep.
ADDED = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "layernorm_epsilon": 1e-5,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 64,
        "swa_v_head_dim": 64,
        "sliding_window_size": 128,
    },
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    "deepseek_v4": {"topk_method": "noaux_tc"},
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
    "qianfan_ocr": {
        "force_image_size": 64,
        "ps_version": "v2",
        "select_layer": -1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "dynamic_image_size": True,
        "use_thumbnail": True,
    },
    "qwen4_exp_vision": {"deepstack_visual_indexes": []},
    "minimax_m3_vl_text": {
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 128,
            "sparse_disable_index_value": [0, 0, 0, 1, 1, 1],
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": [0, 0, 0, 1, 1, 1],
        },
    },
    "minimax_m3_vl_vision": {"img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}},
    "muse_spark_text": {"num_shared_experts": 0},
    "moss_transcribe_diarize_audio": {
        "d_model": 256,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
    },
    "lfm2": {"block_dim": 256, "block_ff_dim": 256},
}

# Model type -> tensor names that transformers saves, and what the hub's checkpoints say: patterns and what replaces them;
# a name that becomes empty is not there.
_VISION = (r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model.")  # CLIP, SigLIP, SigLIP 2
TENSORS = {
    # Of Kimi's layers only those with experts are called block_sparse_moe there.
    "kimi_linear": ((r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r"\1.mlp.\2."),),
    **dict.fromkeys(
        (
            "cohere2_vision",
            "colpali",
            "gemma3",
            "granite4_vision",
            "lfm2_vl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "paligemma",
        ),
        (_VISION,),
    ),
    "moss_transcribe_diarize": (
        (r"\.audio_tower\.", ".whisper_encoder."),
        (r"\.multi_modal_projector\.linear_1\.", ".vq_adaptor.layers.0."),
        (r"\.multi_modal_projector\.linear_2\.", ".vq_adaptor.layers.2."),
        (r"\.multi_modal_projector\.norm\.", ".vq_adaptor.layers.3."),
    ),
    **dict.fromkeys(
        ("audioflamingo3", "glmasr", "qwen2_audio", "voxtral"),
        ((r"^language_model\.model\.model\.", "language_model.model."),),
    ),
    "longcat_flash": ((r".*\.experts\.(?:[4-9]|\d\d+)\..*", ""),),  # zero experts have no weights
    "hy_v4": (
        (r"\.hc_pre\.(hc_(?:attn|mlp)_layer)\.", r".\1.hc_pre."),
        (r"\.hc_pre\.hc_head\.", ".hc_head."),
        (r"\.(mlp|shared_experts)\.linear_gate\.", r".\1.gate_proj."),
    ),
    "cosmos3_edge": (
        (r"^(model\.visual\..*)\.to_([qkv])\.", r"\1.\2_proj."),
        (r"^(model\.visual\..*)\.up_proj\.", r"\1.fc1."),
        (r"^(model\.visual\..*)\.down_proj\.", r"\1.fc2."),
    ),
    "minimax_m3_vl": ((r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj|fc[12])\.", r"\1.mlp.\2."),),
    "qianfan_ocr": ((r"^language_model\.model\.encoder\.", "language_model.model."),),
    "deepseek_v4": (
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.", ""),
    ),
}

# Model type -> what transformers 5.20 does not turn back into the hub's layout, inputs first, when it saves.
TRANSPOSED = {"qwen3_vl_moe": r"\.mlp\.experts\.(gate_up|down)_proj$"}

# Model type -> fields that are set before the model is made: sizes that stay as published, since GPU kernels have no others,
# and what the hub's configs set where transformers' defaults are None, or do not fit the sizes.
_LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
PUBLISHED = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("kimi_linear", "longcat_flash"), _LATENT),
    "glm_ocr_text": {"intermediate_size": 768},  # out_hidden_size times in_channels, as published
    "glm4v_text": {"attention_bias": True},
    "mimo_v2_flash": {"add_swa_attention_sink_bias": True},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl_text": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv", "conv", "conv"]},
    "falcon_h1": {"mamba_d_ssm": 512},
    "blip-2": {"qformer_config.encoder_hidden_size": 256},
    "dbrx": {"attn_config.kv_n_heads": 2, "attn_config.rope_theta": 500000.0},
    "granite4_vision": {
        "qformer_config.num_hidden_layers": 1,
        "qformer_config.encoder_hidden_size": 256,
        "qformer_config.intermediate_size": 3072,
    },
    "siglip2_vision_model": {"vision_use_head": False},
    "gemma4_text": {"per_layer_config": {5: {"head_dim": 512}}},
    "gemma4_unified_text": {"per_layer_config": {5: {"head_dim": 512}}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [11, 11, 10]}}
    },
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "qwen3_omni_moe_vision_encoder": {"image_size": 768, "apply_vit_abs_pos_embed": True},
    "minimax_m3_vl_text": {
        "head_dim": 128,  # that of the indexer
        "index_n_heads": 2,  # as many as keys, and shared experts as wide as the others, as published
        "shared_intermediate_size": 256,
        "layer_types": [*["full_attention"] * 3, *["minimax_m3_sparse"] * 3],
    },
    "qwen3_omni_moe_talker_code_predictor": {"num_hidden_layers": 5},
    "deepseek_v4": {"head_dim": 512, "mlp_layer_types": [*["hash_moe"] * 3, *["moe"] * 3]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "molmo2_adapter": {"vision_feature_layer": [5, 3]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 128},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
        "output_gate_type": "silu",
    },
    "cosmos3_edge_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000000.0, "mrope_section": [12, 10, 10]}
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [11, 11, 10]}
    },
    "falcon": {"ffn_hidden_size": 1024},
    "minimax_m3_vl": {"projector_hidden_size": 256, "merged_hidden_size": 1024},
    "muse_spark": {"out_hidden_size": 1024},
    "muse_glimmer": {"out_hidden_size": 1024},
}

# Model type -> what its config is made with, before the sizes.
GIVEN = {
    "emu3": {"vocabulary_map": {"<image>": 0, "<|visual token 000000|>": 1}},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "granite4_vision": {
        "vision_config": {"model_type": "siglip_vision_model"},
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [2, 3, 4, 5],
    },
}

# Model types whose head is the embedding in every checkpoint of the hub.
TIED = {
    *("bloom", "cohere_compass", "cohere2_vision", "gemma2", "lfm2", "lfm2_moe", "lfm2_vl", "moss_transcribe_diarize"),
    "qwen3_asr",
}

# Path -> content: what makes an embedding model, whose tensors lack the prefix "model.", a folder of sentence-transformers.
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 256, "pooling_mode_lasttoken": True},
}
