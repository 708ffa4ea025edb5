"""Block-FP8 linear layers and experts in plain torch: weights dequantised to BF16 once, activations not quantised."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod, RoutedExperts
from vllm.model_executor.layers.quantization.utils.fp8_utils import create_fp8_scale_parameter, create_fp8_weight_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import BlockQuantScaleParameter

from glmpp.dequant import dequantize


def register() -> None:
    """Have vLLM use `ReferenceFp8Config` for checkpoints that say `"quant_method": "fp8"`."""
    register_quantization_config("fp8")(ReferenceFp8Config)


class ReferenceFp8Config(Fp8Config):
    """vLLM's FP8 quantisation with other kernels; parameters, their names and their loading are the same."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [*super().get_supported_act_dtypes(), torch.float32]

    def get_quant_method(self, layer, prefix):
        kept = is_layer_skipped(prefix=prefix, ignored_layers=self.ignored_layers, fused_mapping=self.packed_modules_mapping)
        if self.weight_block_size and not kept and isinstance(layer, LinearBase):
            return Linear(tuple(self.weight_block_size))
        if self.weight_block_size and not kept and isinstance(layer, RoutedExperts):
            return Experts(self, layer)
        return super().get_quant_method(layer, prefix)


class Linear(LinearMethodBase):
    def __init__(self, block: tuple[int, int]):
        self.block = block

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **more
    ) -> None:
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = rows = sum(output_partition_sizes)
        layer.weight_block_size = list(self.block)
        loader = more.get("weight_loader")
        layer.register_parameter("weight", create_fp8_weight_parameter(rows, input_size_per_partition, loader))
        scale = create_fp8_scale_parameter(
            BlockQuantScaleParameter, output_partition_sizes, input_size_per_partition, layer.weight_block_size, loader
        )
        layer.register_parameter("weight_scale_inv", scale)

    def process_weights_after_loading(self, layer) -> None:
        layer.dequantised = dequantize(layer.weight.data, layer.weight_scale_inv.data, self.block)

    def apply(self, layer, x, bias=None) -> torch.Tensor:
        return linear(x, layer.dequantised.to(x.dtype), bias)


class Experts(Fp8MoEMethod):
    """vLLM's parameters of FP8 experts; of its kernels none is asked for."""

    def __init__(self, quant_config: ReferenceFp8Config, layer):
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.quant_config = quant_config
        self.weight_block_size = self.moe_block_shape = quant_config.weight_block_size
        self.block_quant, self.weight_scale_name, self.weight_scale_refine = True, "weight_scale_inv", None

    is_monolithic = False

    def process_weights_after_loading(self, layer) -> None:
        for name in ("w13", "w2"):
            codes, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data
            block = tuple(self.weight_block_size)
            setattr(layer, f"{name}_dequantised", [dequantize(*pair, block) for pair in zip(codes, scales)])

    def get_fused_moe_quant_config(self, layer) -> None:
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        """The experts' weighted sum [tokens, hidden] of x [tokens, hidden], expert by expert."""
        out = torch.zeros_like(x)
        for expert, (w13, w2) in enumerate(zip(layer.w13_dequantised, layer.w2_dequantised)):
            token, place = (topk_ids == expert).nonzero(as_tuple=True)
            if len(token):
                gate, up = linear(x[token], w13.to(x.dtype)).chunk(2, dim=-1)
                result = linear(silu(gate) * up, w2.to(x.dtype))
                out.index_add_(0, token, (result * topk_weights[token, place, None]).to(x.dtype))
        return out
