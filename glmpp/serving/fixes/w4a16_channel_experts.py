"""Experts in W4A16 with a scale for each channel cannot be built on an H100: an assertion without words.

Where vLLM prefers another kernel to Marlin, the chooser is not told that the scales are for channels and picks a kernel that
wants groups. The fix asks it for Marlin, which has them, unless a kernel was asked for by name. For any model with experts;
listed are those that it was tried on.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("Qwen3MoeForCausalLM",)
CURES = (("AssertionError", r"^vllm/"),)
SCHEME = ("pack-quantized", "channel")


def apply() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    select = wna16.select_wna16_moe_backend

    def choose(config, weight_key, quant_config, **more):
        asked = config.moe_backend
        try:
            if quant_config.strategy == "channel" and asked == "auto":
                config.moe_backend = "marlin"
            return select(config=config, weight_key=weight_key, quant_config=quant_config, **more)
        finally:
            config.moe_backend = asked

    wna16.select_wna16_moe_backend = choose
