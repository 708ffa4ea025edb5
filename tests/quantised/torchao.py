"""torchao, a library that vLLM calls and does not bring."""

from __future__ import annotations

from glmpp.dryrun.stage_report import CANNOT_TELL
from quantised.form import Format, Refusal, kept
from quantised.models import Model


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


FORMATS: dict[str, Format] = {
    "torchao, FP8": Format(
        "torchao",
        "torchao's flatten_tensor_state_dict, transformers' TorchAoConfig; pytorch/Qwen3-8B-FP8",
        lambda out, size: {"_weight_qdata": ("F8_E4M3", (out, size)), "_weight_scale": ("F32", (out, 1))},
        torchao_config,
    ),
}

REFUSALS: list[Refusal] = [
    Refusal("ImportError: Please install torchao>=", ("torchao, FP8",), verdict=CANNOT_TELL),
]
