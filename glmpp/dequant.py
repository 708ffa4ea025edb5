"""Block FP8 -> BF16 and back.

A block-FP8 tensor is a weight of float8_e4m3fn codes and a grid of scales, one per block:
`value = code * scale_inv`. It is *multiplied*, despite the name: the suffix `_inv` names it as the inverse of the
factor that the quantiser divided by. https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import warnings

import torch

from glmpp.errors import GlmppError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn
_BAND_ELEMENTS = 1 << 20  # of the intermediate at a time (2 MB as int16), so that it stays in the second-level caches


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
        backend: "torch", "triton" (CUDA), or "auto": triton for CUDA tensors, torch for all others.
        check: refuse scales that are negative, NaN or infinite, and look for NaN codes (on a GPU two reads of the weight).

    Raises:
        GlmppError: dtype or shape does not fit; the message names both shapes. Nothing is inferred from a division.

    Warns:
        UserWarning: the weight holds NaN codes (0x7f, 0xff); they stay NaN.
    """
    if backend not in ("auto", "torch", "triton"):
        raise GlmppError(f"backend {backend!r} is unknown; choose 'auto', 'torch' or 'triton'")
    if weight.dtype != FP8 or weight.ndim != 2:
        raise GlmppError(f"expected a float8_e4m3fn matrix, got {weight.dtype} {list(weight.shape)}")
    grid, block = _as_grid(weight, scale_inv, block_size)
    if out is None:
        out = _empty(weight.shape, dtype, weight.device)
    elif out.shape != weight.shape:
        raise GlmppError(f"out has shape {list(out.shape)}, the weight {list(weight.shape)}")
    if weight.is_meta or weight.numel() == 0:
        return out
    if check and not bool(((grid >= 0) & (grid < math.inf)).all()):
        bad = ((grid < 0) | ~torch.isfinite(grid)).nonzero()[0].tolist()
        raise GlmppError(
            f"scale {bad} of shape {list(scale_inv.shape)} is {grid[tuple(bad)].item()}: expected finite and >= 0"
        )

    on_cpu = weight.device.type == "cpu"
    nan_codes = _count_nan_codes(weight) if check or on_cpu else 0
    if nan_codes:
        warnings.warn(f"the weight {list(weight.shape)} holds {nan_codes} NaN codes; they stay NaN", stacklevel=2)
    if backend == "triton" or (backend == "auto" and weight.is_cuda):
        from glmpp.triton_dequant import launch

        launch(weight, grid, block, out)
    elif on_cpu and not nan_codes and _fits_shift(grid, out):
        _shift_and_scale(weight, grid, block, out)
    else:
        _multiply(weight, grid, block, out)
    return out


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty, on huge pages where Linux gives them: faulting in 4 kB pages costs more than filling them.

    torch does the same for all its CPU memory under THP_MEM_ALLOC_ENABLE=1. Where huge pages are off this changes nothing.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 1 << 25 and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def _multiply(weight: torch.Tensor, grid: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> None:
    """The definition, band by band: fp8 -> fp32, times the scale, rounded into `out`."""
    (rows, cols), (block_rows, block_cols) = weight.shape, block
    band = max(1, _BAND_ELEMENTS // cols)
    for block_row in range(grid.shape[0]):
        scales = grid[block_row].repeat_interleave(block_cols)[:cols]
        last = min((block_row + 1) * block_rows, rows)
        for start in range(block_row * block_rows, last, band):
            stop = min(start + band, last)
            out[start:stop] = weight[start:stop].float().mul_(scales)


# The fast path of the CPU. A float8_e4m3fn code s.eeee.mmm, its bits moved to where bfloat16 has sign, exponent and
# mantissa, is the value times 2^-120 (the difference of the biases, 127 - 7), subnormal codes included. Widening to
# int16 copies the sign; a factor of 16 and a mask do the rest. What is left is one multiplication per element by
# scale * 2^120 in float32 and one rounding, and torch has a vectorised kernel for exactly that: batch_norm in
# inference, bfloat16 in and out, float32 weight: x * weight + bias, with bias -0.0 to keep the sign of zeros.
_BIAS_GAP = 2.0**120
_SIGN_EXPONENT_MANTISSA = 0x87F0 - 0x10000  # as int16


def _fits_shift(grid: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether scale * 2^120 is finite and positive, and float32 subnormals are not flushed to zero."""
    smallest, largest = grid.aminmax()
    if not (smallest >= 0 and largest < 2.0**8) or torch.signbit(grid).any():
        return False
    subnormal = torch.tensor(1, dtype=torch.int32, device="cpu").view(torch.float32)
    return out.device.type == "cpu" and bool(subnormal * _BIAS_GAP > 0)


def _shift_and_scale(weight: torch.Tensor, grid: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> None:
    (rows, cols), (block_rows, block_cols) = weight.shape, block
    codes, factors = weight.view(torch.int8), grid * _BIAS_GAP
    blocks = grid.shape[1]
    padded = blocks * block_cols  # >= cols: a ragged last block is filled up in the buffer
    direct = padded == cols and out.dtype == torch.bfloat16
    # A sixteenth of the output at most, so that small tensors stay frugal too.
    band = max(1, min(_BAND_ELEMENTS, weight.numel() // 16) // padded)
    # batch_norm sees [samples, channels, elements]. A band inside one block row is samples of its rows, with a factor for
    # each block. Where a band would span several block rows, every row brings its own factors: one sample, more channels.
    per_row = block_rows < band
    if per_row and block_rows > 1:
        factors = factors.repeat_interleave(block_rows, 0)[:rows]
    band = min(band, rows if per_row else block_rows)
    # Types and devices are all spelt out: vLLM loads under a default dtype of bfloat16 and a default device.
    buffer = torch.zeros(band, padded, dtype=torch.int16, device="cpu")
    step = rows if per_row else block_rows
    channels = (band if per_row else 1) * blocks
    float32 = {"dtype": torch.float32, "device": "cpu"}
    mean, variance = torch.zeros(channels, **float32), torch.ones(channels, **float32)
    bias, unused = torch.full((channels,), -0.0, **float32), (torch.empty(0, **float32), torch.empty(0, **float32))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        for start in range(first, last, band):
            stop = min(start + band, last)
            shifted = buffer[: stop - start]
            shifted[:, :cols].copy_(codes[start:stop])
            shifted.mul_(16).bitwise_and_(_SIGN_EXPONENT_MANTISSA)
            values = shifted.view(torch.bfloat16)
            values = values if out.dtype == torch.bfloat16 else values.float()
            target = out[start:stop] if direct and out[start:stop].is_contiguous() else values
            factor = factors[start:stop].reshape(-1) if per_row else factors[first // block_rows]
            shape = (1, -1, block_cols) if per_row else (stop - start, blocks, block_cols)
            n = factor.numel()
            torch.native_batch_norm(
                values.view(shape),
                factor,
                bias[:n],
                mean[:n],
                variance[:n],
                False,
                0.0,
                0.0,
                out=(target.view(shape), *unused),
            )
            if target is values:
                out[start:stop] = values[:, :cols]


def _count_nan_codes(weight: torch.Tensor) -> int:
    """How many codes are NaN. The two maxima are cheap, the count is made only when it is not zero."""
    codes = weight.view(torch.uint8)
    if codes.max() < 0xFF and weight.view(torch.int8).max() < 0x7F:
        return 0
    return int((codes & 0x7F == 0x7F).sum())


def spread(scale_inv: torch.Tensor, shape: torch.Size, block_size: tuple[int, int]) -> torch.Tensor:
    """The scale of every element: the grid repeated over its blocks and cut to `shape`."""
    full = scale_inv.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return full[: shape[0], : shape[1]]


def quantize(
    weight: torch.Tensor, block_size: tuple[int, int] = (128, 128), power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `dequantize`: FP8 codes and float32 scales of absmax / 448 per block.

    Args:
        weight: [rows, cols], any float dtype; quantised in float32, round to nearest even.
        block_size: (rows, cols) of a block; the last ones may be ragged.
        power_of_two: take the smallest power of two that is not below absmax / 448, as UE8M0 checkpoints do.

    Returns:
        (float8_e4m3fn [rows, cols], float32 [ceil(rows / block rows), ceil(cols / block cols)]). A scale is no smaller than
        float32 has it: 2^-126 with all its digits, 2^-149 for a power of two. A block of zeros gets scale 1; one that holds
        NaN or infinity gets that for a scale, which `dequantize` refuses.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise GlmppError(f"expected a float matrix, got {weight.dtype} {list(weight.shape)}")
    rows, cols = weight.shape
    (block_rows, block_cols), values = block_size, weight.float()
    grid_rows, grid_cols = math.ceil(rows / block_rows), math.ceil(cols / block_cols)
    padded = values.new_zeros(grid_rows * block_rows, grid_cols * block_cols)
    padded[:rows, :cols] = values
    absmax = padded.view(grid_rows, block_rows, grid_cols, block_cols).abs().amax(dim=(1, 3))
    scale = torch.where(absmax == 0, 1.0, (absmax / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny))
    if power_of_two:
        # Exact, unlike a logarithm: absmax is mantissa * 2^exponent with the mantissa in [1/2, 1), and 448 is 7/8 * 2^9.
        mantissa, exponent = torch.frexp(absmax)
        exponent = (exponent - 9 + (mantissa > 7 / 8)).clamp(min=-149)
        scale = torch.where((absmax > 0) & (absmax < math.inf), torch.exp2(exponent.double()).float(), scale)
    return (values / spread(scale, values.shape, block_size)).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


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
