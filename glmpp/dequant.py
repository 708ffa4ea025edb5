"""Block FP8 -> BF16 and back, and how to measure what was lost.

A block-FP8 tensor is a weight of float8_e4m3fn codes and a grid of scales, one per block:
`value = code * scale_inv`. It is *multiplied*, despite the name: the suffix `_inv` names it as the inverse of the
factor that the quantiser divided by. https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glmpp.errors import GlmppError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn
_BAND_ELEMENTS = 1 << 16  # float32 intermediate of one band: 256 kB, so that it stays in the second-level cache


def dequantize(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    check: bool = True,
) -> torch.Tensor:
    """Return `weight * scale_inv` per block, bit-exact with `(fp8 -> fp32) * scale -> dtype`, round to nearest even.

    Args:
        weight: float8_e4m3fn [rows, cols].
        scale_inv: float32 (or bf16/f16) factors, or E8M0 exponents as float8_e8m0fnu or uint8 (value 2 ** (code - 127)).
            Shape [ceil(rows / block rows), ceil(cols / block cols)] for blocks, the last ones ragged;
            [rows] or [rows, 1] for one scale per output channel; [] or [1] for one per tensor.
        block_size: (rows, cols) of a block, e.g. (128, 128), or (1, 32) for MX.
        out: written in place and returned, [rows, cols], any strides (a row slice of a fused parameter will do).
        dtype: of the result when there is no `out`.
        backend: "torch", or "auto", which is torch on every device for now.
        check: refuse scales that are negative, NaN or infinite.

    Raises:
        GlmppError: dtype or shape does not fit; the message names both shapes. Nothing is inferred from a division.
    """
    if backend not in ("auto", "torch"):
        raise GlmppError(f"backend {backend!r} is unknown; choose 'auto' or 'torch'")
    if weight.dtype != FP8 or weight.ndim != 2:
        raise GlmppError(f"expected a float8_e4m3fn matrix, got {weight.dtype} {list(weight.shape)}")
    grid, (block_rows, block_cols) = _as_grid(weight, scale_inv, block_size)
    if out is None:
        out = torch.empty_like(weight, dtype=dtype)
    elif out.shape != weight.shape:
        raise GlmppError(f"out has shape {list(out.shape)}, the weight {list(weight.shape)}")
    if weight.is_meta:
        return out
    if check and not bool(((grid >= 0) & torch.isfinite(grid)).all()):
        bad = ((grid < 0) | ~torch.isfinite(grid)).nonzero()[0].tolist()
        raise GlmppError(
            f"scale {bad} of shape {list(scale_inv.shape)} is {grid[tuple(bad)].item()}: expected finite and >= 0"
        )

    rows, cols = weight.shape
    band = max(1, _BAND_ELEMENTS // max(cols, 1))
    # One scale per column, for the block row at hand: [cols] float32.
    for block_row in range(grid.shape[0]):
        scales = grid[block_row].repeat_interleave(block_cols)[:cols] if grid.shape[1] > 1 else grid[block_row]
        last = min((block_row + 1) * block_rows, rows)
        for start in range(block_row * block_rows, last, band):
            stop = min(start + band, last)
            out[start:stop] = weight[start:stop].float().mul_(scales)
    return out


def quantize(
    weight: torch.Tensor, block_size: tuple[int, int] = (128, 128), power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `dequantize`: FP8 codes and float32 scales of absmax / 448 per block.

    Args:
        weight: [rows, cols], any float dtype; quantised in float32, round to nearest even.
        block_size: (rows, cols) of a block; the last ones may be ragged.
        power_of_two: round each scale up to a power of two, as UE8M0 checkpoints do.

    Returns:
        (float8_e4m3fn [rows, cols], float32 [ceil(rows / block rows), ceil(cols / block cols)]); a block of zeros gets
        scale 1.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise GlmppError(f"expected a float matrix, got {weight.dtype} {list(weight.shape)}")
    rows, cols = weight.shape
    (block_rows, block_cols), values = block_size, weight.float()
    grid_rows, grid_cols = math.ceil(rows / block_rows), math.ceil(cols / block_cols)
    padded = values.new_zeros(grid_rows * block_rows, grid_cols * block_cols)
    padded[:rows, :cols] = values
    absmax = padded.view(grid_rows, block_rows, grid_cols, block_cols).abs().amax(dim=(1, 3))
    scale = absmax / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    spread = scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_cols, 1)[:, :cols]
    return (values / spread).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


@dataclass(frozen=True)
class ErrorStats:
    """What a round trip lost. Relative figures are dimensionless; `max_abs` is in the units of the weight."""

    relative_frobenius: float
    sqnr_db: float
    max_abs: float
    worst_index: tuple[int, ...]


def error_stats(original: torch.Tensor, restored: torch.Tensor) -> ErrorStats:
    """Compare two tensors of one shape in float64.

    Returns:
        relative Frobenius error ||restored - original|| / ||original||, the same as a signal-to-quantisation-noise ratio
        in dB (-20 log10 of it; inf when equal), the largest absolute error and where it is.
    """
    if original.shape != restored.shape:
        raise GlmppError(f"cannot compare shapes {list(original.shape)} and {list(restored.shape)}")
    reference = original.double()
    error = restored.double() - reference
    relative = (error.norm() / reference.norm()).item()
    worst = int(error.abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    sqnr = math.inf if relative == 0 else -20 * math.log10(relative)
    return ErrorStats(relative, sqnr, error.abs().max().item(), index)


def _as_grid(
    weight: torch.Tensor, scale_inv: torch.Tensor, block_size: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scales as a float32 grid [block rows, block cols] and the block size that goes with it."""
    rows, cols = weight.shape
    shape, blocks = tuple(scale_inv.shape), (math.ceil(rows / block_size[0]), math.ceil(cols / block_size[1]))
    if shape == blocks:
        grid, size = scale_inv, block_size
    elif shape in ((rows,), (rows, 1)):
        grid, size = scale_inv.reshape(rows, 1), (1, cols)
    elif shape in ((), (1,)):
        grid, size = scale_inv.reshape(1, 1), (rows, cols)
    else:
        raise GlmppError(
            f"scale grid {list(shape)} does not fit weight {list(weight.shape)}: blocks of {list(block_size)} need "
            f"{list(blocks)}, one scale per channel needs [{rows}] or [{rows}, 1]"
        )
    if grid.dtype in (torch.uint8, torch.float8_e8m0fnu):
        if grid.is_meta:
            return torch.empty(grid.shape, device="meta"), size
        codes = grid.view(torch.uint8).int()
        return torch.where(
            codes == 255, math.nan, torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes - 127)
        ), size
    if not grid.is_floating_point():
        raise GlmppError(f"scales are {grid.dtype}; expected a float type, or E8M0 as float8_e8m0fnu or uint8")
    return grid.float(), size
