"""Block FP8 -> BF16 on a GPU. Imported on first use: without Triton everything else of the kit works.

The FP8 code is decoded with integers, so that the kernel also runs on GPUs without FP8 (compute capability < 8.9) and in
Triton's CPU interpreter.
"""

from __future__ import annotations

import os

import torch

from glmpp.errors import GlmppError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise GlmppError("backend 'triton' needs the package triton, which comes with torch on Linux") from error

TILE = 32, 128


@triton.jit
def _dequantize_kernel(
    codes, scales, out, rows, cols, block_rows, block_cols, grid_cols,
    code_stride, out_row_stride, out_col_stride, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    col = tl.program_id(1) * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
    inside = (row < rows) & (col < cols)
    code = tl.load(codes + row.to(tl.int64) * code_stride + col, mask=inside, other=0).to(tl.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)  # 2^-9: subnormal codes
    magnitude = tl.where((code & 127) == 127, float("nan"), magnitude)
    scale = tl.load(scales + (row // block_rows).to(tl.int64) * grid_cols + col // block_cols, mask=inside, other=0.0)
    sign = tl.where(code >= 128, -1.0, 1.0)  # a factor: Triton negates by subtracting from 0, which loses the sign of 0
    value = sign * magnitude * scale
    target = out + row.to(tl.int64) * out_row_stride + col.to(tl.int64) * out_col_stride
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def launch(weight: torch.Tensor, grid: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> None:
    """Dequantise into `out`.

    Args:
        weight: float8_e4m3fn [rows, cols], any row stride, columns contiguous.
        grid: float32 [ceil(rows / block rows), ceil(cols / block cols)].
        block: (rows, cols) of a block.
        out: bfloat16, float16 or float32 [rows, cols], any strides, on the same device.

    Raises:
        GlmppError: not a CUDA tensor (and TRITON_INTERPRET=1 is not set), or `out` is elsewhere.
    """
    if not weight.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise GlmppError(f"backend 'triton' needs CUDA tensors, the weight is on {weight.device}")
    if out.device != weight.device or grid.device != weight.device:
        raise GlmppError(f"weight, scale and out must be on one device: {weight.device}, {grid.device}, {out.device}")
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (rows, cols), grid = weight.shape, grid.contiguous()
    tiles = triton.cdiv(rows, TILE[0]), triton.cdiv(cols, TILE[1])
    with torch.cuda.device_of(weight):  # Triton launches on the current device, whatever its arguments are on
        _dequantize_kernel[tiles](
            weight.view(torch.uint8), grid, out, rows, cols, *block, grid.shape[1], weight.stride(0), *out.stride(), *TILE
        )
