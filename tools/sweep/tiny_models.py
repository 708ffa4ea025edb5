"""Tiny checkpoints of other architectures, from transformers' own classes; runs in a process that has imported vLLM.

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

from glmpp.errors import GlmppError
from sweep.hub_names import ADDED, GIVEN, PUBLISHED, RENAMED, SENTENCE_TRANSFORMERS, TENSORS, TIED, TRANSPOSED

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
    for path, value in PUBLISHED.get(config.model_type, {}).items():
        part, _, name = path.rpartition(".")
        setattr(getattr(config, part) if part else config, name, value)
    if getattr(config, "kv_lora_rank", None):  # latent attention has a key for every head
        config.num_key_value_heads = config.num_attention_heads
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


def known_architectures() -> tuple[list[str], dict[str, str | None]]:
    """Names of the architectures that the installed vLLM has, and the versions of what is installed."""
    from vllm.model_executor.models.registry import ModelRegistry

    from glmpp.dryrun.child.handlers import versions

    return sorted(ModelRegistry.get_supported_archs()), versions()


def make(architecture: str, directory: str, tied: bool) -> None:
    """Write a tiny checkpoint, random values, as transformers saves it: under the names of the hub.

    Raises:
        GlmppError: there is none to be had; the message says why.
    """
    import transformers
    from vllm.model_executor.models.registry import ModelRegistry

    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise GlmppError("transformers has no class of this name")
    try:
        supports_pp = ModelRegistry.models[architecture].inspect_model_cls().supports_pp
    except Exception as error:
        raise GlmppError(f"cannot be imported: {one_line(error)}") from error
    if not supports_pp:
        raise GlmppError("does not declare pipeline support")
    transformers.logging.set_verbosity_error()
    try:
        config = kind.config_class(**GIVEN.get(kind.config_class.model_type, {}))
        shrink(config)
        for part in (config, getattr(config, "text_config", None)):
            if part is not None:
                part.tie_word_embeddings = tied or config.model_type in TIED
        torch.manual_seed(0)
        model = fill(kind(config).to(torch.bfloat16))
        model.config.architectures = [architecture]
        model.save_pretrained(directory)
    except Exception as error:
        raise GlmppError(f"no tiny config: {one_line(error)}") from error
    as_on_the_hub(Path(directory), architecture, config.model_type)


def as_on_the_hub(directory: Path, architecture: str, model_type: str) -> None:
    """Turn what transformers has saved into what the hub's folders hold; see `hub_names`."""
    if model_type in TENSORS or model_type in TRANSPOSED:
        rename(directory / "model.safetensors", model_type)
    path = directory / "config.json"
    text = path.read_text()
    for saved, on_hub in RENAMED.get(model_type, {}).items():
        text = text.replace(f'"{saved}"', f'"{on_hub}"')
    config = json.loads(text)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.update({key: value for key, value in ADDED.get(part.get("model_type"), {}).items() if part.get(key) is None})
    path.write_text(json.dumps(config))
    for name, content in SENTENCE_TRANSFORMERS.items() if re.search("(?<!LMHead)Model$", architecture) else ():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in what transformers leaves at zero or one: what is lost must not look like what memory holds."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
            tensor.normal_(mean=1.0, std=0.05)
    return model


def rename(shard: Path, model_type: str) -> None:
    """Give the tensors of a file the names and the layout that the hub's checkpoints have."""
    tensors = load_file(shard)
    for saved, on_hub in TENSORS.get(model_type, ()):
        tensors = {name: tensor for old, tensor in tensors.items() if (name := re.sub(saved, on_hub, old))}
    for name in filter(re.compile(TRANSPOSED.get(model_type, "$^")).search, tensors):
        tensors[name] = tensors[name].transpose(-2, -1).contiguous()
    save_file(tensors, shard, {"format": "pt"})


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
