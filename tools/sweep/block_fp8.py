"""A tiny checkpoint's linear layers in block FP8: as names, and as bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import quantize
from glmpp.errors import GlmppError
from glmpp.formats.tensor import TensorSpec

BLOCK = 128
LINEAR = re.compile(r"\.layers\..+(_proj|_proj_with_mqa|\.wq_b|\.wk|\.experts\.\d+\.w[123])\.weight$")
# Kept in BF16 by the hub's block-FP8 checkpoints: the indexer's head weights, small projections of Mamba, other towers;
# and Kimi's delta attention (known by its f_a_proj), whose projections vLLM fuses into one BF16 parameter.
NOT_QUANTISED = re.compile(r"\.(weights_proj|dt_proj|x_proj)\.|visual|vision|audio|mtp|^encoder\.")


def write_block_fp8(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The checkpoint of `block_fp8` with its bytes, quantised by the kit, in one file."""
    planned, made = block_fp8(checkpoint), {}
    for name, tensor in checkpoint.read():
        if f"{name}_scale_inv" in planned:
            made[name], made[f"{name}_scale_inv"] = quantize(tensor, (BLOCK, BLOCK))
        else:
            made[name] = tensor.clone()
    directory.mkdir()
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(planned.config))
    return Checkpoint.from_directory(directory)


def block_fp8(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the linear weights of its layers in block FP8: names, dtypes and scale grids; no data.

    As in the hub's FP8 checkpoints, embeddings, norms, routers and everything outside the language model's layers stay.

    Raises:
        GlmppError: nothing is left to quantise.
    """
    specs: list[TensorSpec] = []
    kept: list[str] = []
    delta_attention = tuple(name.partition("f_a_proj.")[0] for name in checkpoint if ".f_a_proj." in name)
    for spec in checkpoint.values():
        stays = NOT_QUANTISED.search(spec.name) or spec.name.startswith(delta_attention or ("\0",))
        # vLLM's Glm5Next builds latent attention in BF16 and has no place for these two scales.
        stays = stays or (delta_attention and re.search(r"\.(wq_b|kv_b_proj)\.", spec.name))
        if LINEAR.search(spec.name) and not stays and len(spec.shape) == 2:
            specs.append(TensorSpec(spec.name, "F8_E4M3", spec.shape))
            specs.append(TensorSpec(f"{spec.name}_scale_inv", "F32", tuple(-(-size // BLOCK) for size in spec.shape)))
        else:
            specs.append(TensorSpec(spec.name, spec.dtype, spec.shape))
            kept.append(spec.name.removesuffix(".weight"))
    if not any(spec.is_scale for spec in specs):
        raise GlmppError("nothing to quantise")
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    return Checkpoint(specs, {**checkpoint.config, "quantization_config": quantization})
