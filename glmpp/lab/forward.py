"""What loaded stages compute: their parameters in transformers' GLM class, run one stage after another, on the CPU.

vLLM's own forward pass of this model needs a GPU. transformers' `GlmMoeDsaForCausalLM` computes the same model without one,
indexer included. A stage is that class with the stage's layers alone; its output is the input of the next, as between
pipeline stages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import FP8, dequantize
from glmpp.errors import GlmppError
from glmpp.loader import place
from glmpp.partition import Stage, make_stages

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# transformers stacks the experts as vLLM does, under other names.
STACKED = {"mlp.experts.gate_up_proj": "mlp.experts.w13_weight", "mlp.experts.down_proj": "mlp.experts.w2_weight"}


def transformers_model(config: dict, **overrides) -> torch.nn.Module:
    """transformers' `GlmMoeDsaForCausalLM` of a GLM-5 config, unquantised, with random weights, in float32.

    Raises:
        GlmppError: transformers is missing or too old for the model.
    """
    return _transformers().GlmMoeDsaForCausalLM(_unquantised(config, overrides)).float().eval()


def _transformers() -> ModuleType:
    """The library, imported without its warning about widgets and with its progress bars off."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
            from transformers import GlmMoeDsaForCausalLM  # noqa: F401  an older release does not know it
    except ImportError as error:
        raise GlmppError("needs transformers >= 5.6 (pip install '.[lab]' in a checkout of glmpp)") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _unquantised(config: dict, overrides: dict) -> PretrainedConfig:
    fields = {key: value for key, value in config.items() if key not in ("quantization_config", "architectures")}
    return _transformers().GlmMoeDsaConfig(**fields | overrides, attn_implementation="eager")


def stage_model(config: dict, stage: Stage, params: Mapping[str, torch.Tensor], **overrides) -> torch.nn.Module:
    """transformers' model with one stage's layers, holding what the stage loaded.

    Args:
        config: of the checkpoint, `glm_moe_dsa`.
        params: vLLM's parameter name -> tensor, FP8 with its scale grid beside it, as `load_stage` returns.
        overrides: fields of the config to change, e.g. `index_topk`.

    Returns:
        A `GlmMoeDsaForCausalLM` that computes in float32 with BF16 weights; embedding, final norm and lm_head are the
        identity on a stage that does not own them.

    Raises:
        GlmppError: the stage did not load a parameter that the model has.
    """
    model = transformers_model(config, **overrides)
    for parent, part, name in (
        (model.model, "embed_tokens", "model.embed_tokens."),
        (model.model, "norm", "model.norm."),
        (model, "lm_head", "lm_head."),
    ):
        if not stage.owns(name):
            setattr(parent, part, torch.nn.Identity())
    layers = {str(index): model.model.layers[index] for index in stage.layers}
    model.model.layers = torch.nn.ModuleDict(layers)  # under their own numbers while they are filled
    for name, target in model.state_dict().items():
        target.copy_(_restored(name, len(target), params, stage))
    model.model.layers = torch.nn.ModuleList(layers.values())
    return model


def _restored(name: str, rows: int, params: Mapping[str, torch.Tensor], stage: Stage) -> torch.Tensor:
    """What transformers calls `name`, cut out of the fused parameter that vLLM loads it into, dequantised to BF16."""
    stacked = next((name.replace(*names) for names in STACKED.items() if name.endswith(names[0])), None)
    where = place(name)
    parameter = stacked or where.parameter
    if parameter not in params:
        raise GlmppError(f"{stage}: {parameter!r} was not loaded, and {name!r} is computed from it")
    weight = params[parameter]
    if weight.dtype == FP8:
        scale = params[f"{parameter}_scale_inv"]
        weight = torch.stack(list(map(dequantize, weight, scale))) if stacked else dequantize(weight, scale)
    return weight[-rows:] if where.shard else weight[:rows]


@torch.no_grad()
def run_stages(models: Iterable[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary], float32, from token ids [batch, tokens]: one stage after another."""
    passed = tokens
    for model in models:
        entrance = {"input_ids": passed} if passed is tokens else {"inputs_embeds": passed}
        passed = model(**entrance, use_cache=False).logits  # hidden states, until the stage with the lm_head
    return passed


def unsplit_model(checkpoint: Checkpoint, **overrides) -> torch.nn.Module:
    """The whole model as transformers itself loads it, from the checkpoint's tensors dequantised one by one.

    Nothing of the kit decides where a tensor goes. Float32 over BF16 weights, as `stage_model`.
    """
    (stage,) = make_stages(checkpoint.config, 1)
    tensors = dict(checkpoint.read([name for name in checkpoint if stage.owns(name)]))  # all but the MTP layer's
    scales = {name: tensors.pop(f"{name}_scale_inv") for name in list(tensors) if f"{name}_scale_inv" in tensors}
    whole = {name: dequantize(tensor, scales[name]) if name in scales else tensor for name, tensor in tensors.items()}
    config = _unquantised(checkpoint.config, overrides)
    classes = _transformers()
    model = classes.GlmMoeDsaForCausalLM.from_pretrained(None, config=config, state_dict=whole, dtype=torch.bfloat16)
    return model.float().eval()
