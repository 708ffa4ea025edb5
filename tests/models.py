"""Tiny checkpoints of other architectures, as transformers saves them: real bytes, random weights, sharded."""

from __future__ import annotations

from pathlib import Path

SIZES = {
    "hidden_size": 128,  # heads of 64: the smaller ones have no attention kernel for the CPU
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


def write_model(kind: str, directory: Path) -> Path:
    """Write a checkpoint of `kind` (a function below) into `directory` unless it is there."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    if not directory.exists():
        torch.manual_seed(0)
        model = globals()[kind](transformers).to(torch.bfloat16)
        for parameter in model.parameters():  # transformers leaves some at zero or one
            torch.nn.init.normal_(parameter, std=0.05)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(directory, max_shard_size="200KB")
        config = directory / "config.json"  # on the hub it says "attention", which is what vLLM looks for
        config.write_text(
            config.read_text().replace('"full_attention"', '"attention"') if "granite" in kind else config.read_text()
        )
    return directory


def llama(transformers):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))


def llama_tied(transformers):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def granite_hybrid(transformers):
    config = transformers.GraniteMoeHybridConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        layer_types=["attention"] * 4,
        position_embedding_type="rope",
        tie_word_embeddings=True,
        mamba_n_heads=4,
        mamba_d_head=64,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def qwen3_moe(transformers):
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32, tie_word_embeddings=False
    )
    return transformers.Qwen3MoeForCausalLM(config)


def qwen2_5_vl(transformers):
    """A wrapper: `model.layers.0…` in the checkpoint is `language_model.model.layers.0…` in vLLM."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12]}},
        vision_config={**vision, "patch_size": 4},
        tie_word_embeddings=False,
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def bert(transformers):
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=256))
