"""`dequantize` against an oracle in integers: no torch cast, no ml_dtypes cast, only the bits of the formats."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import glmpp.dequant
from glmpp.dequant import FP8, dequantize, quantize
from glmpp.errors import GlmppError


def decode_e4m3fn(code: int) -> float:
    """A float8_e4m3fn code by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def bf16_bits(value: np.float32) -> int:
    """The bfloat16 nearest to a float32, ties to even, by integer arithmetic on its bits; NaN gives 0x7fc0."""
    if np.isnan(value):
        return 0x7FC0
    bits = int(np.float32(value).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


DECODED = np.array([decode_e4m3fn(code) for code in range(256)], dtype=np.float32)


def oracle(codes: np.ndarray, scale_of) -> np.ndarray:
    """bfloat16 bits of code * scale, one element at a time in float32."""
    result = np.empty(codes.shape, dtype=np.uint16)
    for (row, col), code in np.ndenumerate(codes):
        with np.errstate(over="ignore", invalid="ignore"):
            result[row, col] = bf16_bits(DECODED[code] * np.float32(scale_of(row, col)))
    return result


def bits(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 bits, NaNs in one canonical form (their sign and payload carry nothing)."""
    found = tensor.contiguous().view(torch.uint16).numpy().copy()
    found[torch.isnan(tensor).numpy()] = 0x7FC0
    return found


def as_fp8(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.uint8)).view(FP8)


@pytest.mark.filterwarnings("ignore:the weight")
def test_all_256_codes_times_many_scales():
    codes = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    rng = np.random.default_rng(0)
    scales = (rng.standard_normal(64) ** 2 * 10.0 ** rng.integers(-42, 37, 64)).astype(np.float32)
    got = dequantize(as_fp8(codes), torch.from_numpy(scales))
    assert np.array_equal(bits(got), oracle(codes, lambda row, col: scales[row]))


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_nan_codes_stay_nan_and_are_reported(nan):
    weight = torch.full((3, 300), 0x38, dtype=torch.uint8)
    weight[1, 299] = nan
    with pytest.warns(UserWarning, match=r"\[3, 300\] holds 1 NaN codes"):
        restored = dequantize(weight.view(FP8), torch.ones(1, 3))
    assert torch.isnan(restored).nonzero().tolist() == [[1, 299]] and restored[0, 0] == 1.0


@pytest.mark.filterwarnings("ignore:the weight")
def test_nan_codes_of_both_signs():
    restored = dequantize(torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8).view(FP8), torch.ones(1, 1))
    assert torch.isnan(restored).tolist() == [[True, True, False]]
    assert restored[0, 2] == 1.0


@pytest.mark.filterwarnings("ignore:the weight")
def test_ragged_576_rows():
    """kv_a_proj_with_mqa of GLM-5.1: 576 rows are four blocks of 128 and half a block."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (576, 200), dtype=np.uint8)
    scales = rng.random((5, 2), dtype=np.float32)
    got = dequantize(as_fp8(codes), torch.from_numpy(scales))
    assert np.array_equal(bits(got), oracle(codes, lambda row, col: scales[row // 128, col // 128]))


@pytest.mark.filterwarnings("ignore:the weight")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape_and_block_and_scale_layout(data):
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
    layout = data.draw(st.sampled_from(["block", "channel", "column of channels", "tensor"]))
    kind = data.draw(st.sampled_from(["float32", "bfloat16", "uint8 E8M0", "float8_e8m0fnu"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    if data.draw(st.booleans()):
        codes[codes & 0x7F == 0x7F] = 0x80  # NaN codes take another path
    shape = {
        "block": (-(-rows // block[0]), -(-cols // block[1])),
        "channel": (rows,),
        "column of channels": (rows, 1),
        "tensor": (),
    }[layout]
    if kind in ("uint8 E8M0", "float8_e8m0fnu"):
        exponents = rng.integers(0, 255, shape, dtype=np.uint8)
        values = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
        stored = torch.from_numpy(np.asarray(exponents))
        stored = stored.view(torch.float8_e8m0fnu) if kind == "float8_e8m0fnu" else stored
    else:
        magnitude = data.draw(st.sampled_from([1e-4, 1.0, 1e3, 1e-38]))  # 1e3: too large for the fast path
        stored = torch.from_numpy(np.asarray(rng.random(shape) * magnitude, dtype=np.float32)).to(getattr(torch, kind))
        values = stored.float().numpy()

    def scale_of(row, col):
        if layout == "block":
            return values[row // block[0], col // block[1]]
        return values.reshape(-1)[row if layout != "tensor" else 0]

    assert np.array_equal(bits(dequantize(as_fp8(codes), stored, block)), oracle(codes, scale_of))


@pytest.mark.filterwarnings("ignore:the weight")
def test_mx_layout_of_one_scale_per_32_columns():
    codes = np.random.default_rng(2).integers(0, 256, (3, 96), dtype=np.uint8)
    exponents = np.array([[120, 127, 130], [0, 254, 127], [1, 2, 3]], dtype=np.uint8)
    got = dequantize(as_fp8(codes), torch.from_numpy(exponents), block_size=(1, 32))
    assert np.array_equal(bits(got), oracle(codes, lambda row, col: 2.0 ** (int(exponents[row, col // 32]) - 127)))


@pytest.mark.parametrize("shape", [(4, 2), (5, 1), (2, 5), (10,), (575, 1), (2,)])
def test_a_grid_that_does_not_fit_names_both_shapes(shape):
    weight = torch.zeros(576, 256, dtype=FP8)
    with pytest.raises(GlmppError) as error:
        dequantize(weight, torch.ones(shape))
    assert str(list(shape)) in str(error.value) and "[576, 256]" in str(error.value)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_bad_scale_is_an_error_unless_asked_for(bad):
    weight, scale = torch.ones(2, 2).to(FP8), torch.tensor([[1.0], [bad]])
    with pytest.raises(GlmppError, match=r"scale \[1, 0\]"):
        dequantize(weight, scale)
    assert dequantize(weight, scale, check=False).shape == (2, 2)


def test_e8m0_code_255_is_nan_and_refused():
    with pytest.raises(GlmppError, match="nan"):
        dequantize(torch.ones(1, 1).to(FP8), torch.tensor([[255]], dtype=torch.uint8))


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.zeros(4, dtype=FP8)])
def test_a_weight_that_is_not_an_fp8_matrix_is_an_error(weight):
    with pytest.raises(GlmppError, match="expected a float8_e4m3fn matrix"):
        dequantize(weight, torch.ones(1, 1))


def test_integer_scales_are_an_error():
    with pytest.raises(GlmppError, match="expected a float type"):
        dequantize(torch.zeros(2, 2, dtype=FP8), torch.ones(1, 1, dtype=torch.int32))


def test_out_is_written_in_place_and_nothing_else_is():
    weight, scale = quantize(torch.randn(128, 300, generator=torch.Generator().manual_seed(0)))
    fused = torch.full((160, 300), 7.0, dtype=torch.bfloat16)
    returned = dequantize(weight, scale, out=fused[:128])
    assert returned.data_ptr() == fused.data_ptr()
    assert torch.equal(fused[:128], dequantize(weight, scale))
    assert (fused[128:] == 7).all()
    columns = torch.zeros(300, 128, dtype=torch.bfloat16).t()  # not contiguous
    assert torch.equal(dequantize(weight, scale, out=columns), fused[:128])
    with pytest.raises(GlmppError, match=r"\[160, 300\]"):
        dequantize(weight, scale, out=fused)


def test_meta_tensors_give_a_meta_result_of_the_right_shape():
    got = dequantize(torch.empty(576, 256, dtype=FP8, device="meta"), torch.empty(5, 2, device="meta"))
    assert got.is_meta and got.shape == (576, 256) and got.dtype == torch.bfloat16


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.booleans(),
    st.integers(0, 99),
)
def test_quantize_then_dequantize_stays_within_half_an_fp8_step(rows, cols, block, power_of_two, seed):
    original = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize(original, block, power_of_two)
    restored = dequantize(codes, scale, block, dtype=torch.float32)
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    # Half a step: 2^-4 of the value for normal codes, 2^-10 of the scale below them.
    bound = torch.maximum(original.abs() * 2**-4, spread * 2**-10) * (1 + 1e-5)
    assert ((restored - original).abs() <= bound).all()
    assert (codes.float().abs() <= 448).all()
    if power_of_two:
        assert torch.equal(torch.exp2(torch.round(torch.log2(scale))), scale)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 0x7F7FFFFF), st.integers(-3, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@example(0x43E00001, 0, torch.float32)  # the float32 above 448: a logarithm in float32 rounds down
@example(0x43E00000, 0, torch.bfloat16)
@example(1, 0, torch.float32)
@example(0x7F7FFFFF, 0, torch.float32)
def test_a_scale_is_the_smallest_power_of_two_that_reaches(pattern, beside, default):
    """Every positive float32 by its bits, and the neighbours of 448 times a power of two; by fractions."""
    near = np.float32(448 * 2.0 ** (pattern % 260 - 140)).view(np.uint32).item() + beside
    values = [np.uint32(each).view(np.float32).item() for each in (pattern, min(max(near, 1), 0x7F7FFFFF))]
    torch.set_default_dtype(default)
    try:
        codes, scale = quantize(torch.tensor(values, dtype=torch.float32).reshape(2, 1), (1, 1), power_of_two=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, found, code in zip(values, scale.flatten().tolist(), codes.float().flatten().tolist()):
        found, needed = Fraction(found), Fraction(value) / 448
        assert found.numerator == 1 or found.denominator == 1
        assert (found.numerator * found.denominator).bit_count() == 1
        assert found >= needed and (found / 2 < needed or found == Fraction(1, 2**149))
        assert abs(Fraction(code) * found - Fraction(value)) <= max(Fraction(value) / 16, found / 1024)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 0x7F7FFFFF), min_size=1, max_size=8), st.integers(0, 254), st.booleans())
@example([700], 0, False)
def test_quantize_stays_within_half_an_fp8_step_whatever_the_size_of_the_values(patterns, exponent, power_of_two):
    """Values of one size, from the smallest of float32 to the largest; scales neither 0 nor infinite."""
    values = [np.uint32(exponent << 23 | each & 0x7FFFFF).view(np.float32).item() for each in patterns]
    codes, scale = quantize(torch.tensor([values]), (1, 8), power_of_two)
    (step,) = map(Fraction, scale.flatten().tolist())
    assert step > 0
    for value, code in zip(map(Fraction, values), codes.float()[0].tolist()):
        assert abs(Fraction(code) * step - value) <= max(value / 16, step / 1024) * Fraction(100_001, 100_000)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_value_that_is_no_number_gets_a_scale_that_dequantize_refuses(value, power_of_two):
    codes, scale = quantize(torch.tensor([[1.0, value], [1.0, 2.0]]), (1, 2), power_of_two)
    assert not scale[0].isfinite().any() and scale[1].isfinite().all()
    with pytest.raises(GlmppError, match=r"scale \[0, 0\]"):
        dequantize(codes, scale, (1, 2))


def test_a_block_of_zeros_survives():
    for power_of_two in (False, True):
        codes, scale = quantize(torch.zeros(130, 5), power_of_two=power_of_two)
        assert torch.equal(scale, torch.ones(2, 1)) and not dequantize(codes, scale).any()


def test_fast_and_slow_path_agree_on_the_real_shapes_and_any_strides():
    """[576, 6144] as in GLM-5.1; a weight and an out that are slices of larger tensors."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (576, 6200), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0x80
    weight = codes.view(FP8)[:, 7:6151]
    scale = torch.rand(5, 48, generator=generator) * 1e-3
    expected = torch.empty(576, 6144, dtype=torch.bfloat16)
    glmpp.dequant._multiply(weight, scale, (128, 128), expected)
    assert glmpp.dequant._fits_shift(scale, expected)
    big = torch.zeros(600, 7000, dtype=torch.bfloat16)
    for got in (dequantize(weight, scale), dequantize(weight, scale, out=big[5:581, 3:6147])):
        assert torch.equal(got.contiguous().view(torch.int16), expected.view(torch.int16))
    assert not big[:5].any() and not big[581:].any() and not big[:, :3].any() and not big[:, 6147:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_output_types_round_the_same_float32_product_once(dtype):
    weight, scale = quantize(torch.randn(130, 260, generator=torch.Generator().manual_seed(1)))
    product = weight.float() * scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :260]
    assert torch.equal(dequantize(weight, scale, dtype=dtype), product.to(dtype))


@pytest.mark.parametrize("scale", [-0.0, -1.0, 2.0**8, 3e38])
def test_scales_outside_the_fast_path_take_the_slow_one(scale):
    weight = torch.tensor([[0x00, 0x80, 0x01, 0x81, 0x7E, 0xFE]], dtype=torch.uint8)
    got = dequantize(weight.view(FP8), torch.tensor([[scale]]), check=False)
    assert np.array_equal(bits(got), oracle(weight.numpy(), lambda row, col: scale))


def test_flushed_subnormals_take_the_slow_path():
    weight, scale = torch.arange(16, dtype=torch.uint8).view(1, 16).view(FP8), torch.ones(1, 1)
    expected = dequantize(weight, scale)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert not glmpp.dequant._fits_shift(scale, expected)
        assert torch.equal(dequantize(weight, scale), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_of_the_caller_do_not_matter(dtype):
    """vLLM loads weights under a default dtype of bfloat16 and a default device."""
    generator = torch.Generator().manual_seed(7)
    cases = [
        (quantize(torch.randn(300, 260, generator=generator)), (128, 128)),
        (quantize(torch.randn(9, 64), (1, 32)), (1, 32)),
    ]
    exponents = torch.randint(100, 140, (3, 3), dtype=torch.uint8)
    cases.append(((cases[0][0][0], exponents), (128, 128)))
    expected = [dequantize(*pair, block) for pair, block in cases]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = [dequantize(*pair, block) for pair, block in cases]
            codes, scale = quantize(torch.ones(3, 3, dtype=torch.float32, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(got, expected))
    assert scale.dtype == torch.float32 and codes.device.type == "cpu"


MEASURE_MEMORY = """
import resource, sys, torch
from glmpp.dequant import dequantize
rows, cols = map(int, sys.argv[1:3])
weight = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn); weight.view(torch.uint8).fill_(0x38)
scale = torch.ones(-(-rows // 128), -(-cols // 128)); out = torch.ones(rows, cols, dtype=torch.bfloat16)
dequantize(weight[:128, :256], scale[:1, :2])  # first use of every kernel
with open("/proc/self/clear_refs", "w") as file: file.write("5")  # peak := current, see proc(5)
status = lambda key: int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
before = status("VmRSS:")
dequantize(weight, scale, out=out)
print((status("VmHWM:") - before) / out.nbytes)
"""


@pytest.mark.parametrize("shape", [(6144, 6144), (6144, 16384), (2048, 6144)])
def test_extra_memory_is_under_a_tenth_of_the_output(shape):
    """Measured: growth of the peak resident set over the call, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-c", MEASURE_MEMORY, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1


# --- Triton ---


INTERPRETED = """
import torch
from glmpp.dequant import FP8, _multiply, dequantize
generator = torch.Generator().manual_seed(0)
cases = [((70, 300), (32, 128), "block"), ((33, 65), (7, 5), "block")]
cases += [((40, 96), (1, 32), "e8m0"), ((9, 130), (1, 130), "channel")]
for (rows, cols), block, layout in cases:
    weight = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=generator).view(FP8)
    grid = -(-rows // block[0]), -(-cols // block[1])
    stored = factors = torch.rand(grid, generator=generator) * 10
    if layout == "e8m0":
        stored = torch.randint(100, 150, grid, dtype=torch.uint8, generator=generator)
        factors = torch.exp2(stored.float() - 127)
    elif layout == "channel":
        stored = factors.flatten()
    big, expected = torch.zeros(rows + 2, cols + 3), torch.empty(rows, cols)
    got = dequantize(weight, stored, block, out=big[1:-1, 2:-1], backend="triton")
    _multiply(weight, factors, block, expected)
    real = ~expected.isnan()
    assert torch.equal(got.isnan(), expected.isnan()), layout
    assert torch.equal(got[real].view(torch.int32), expected[real].view(torch.int32)), layout
    assert not big[0].any() and not big[-1].any() and not big[:, :2].any() and not big[:, -1].any()
print("equal")
"""


def test_triton_kernel_in_the_cpu_interpreter_gives_the_same_float32_bits():
    """float32, because the interpreter's float32 -> bfloat16 cast truncates. On a GPU see test_triton_on_a_gpu."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-2000:]


FAR_APART = """
import sys, torch
from glmpp.dequant import FP8, dequantize
stride = 2**30
storage = torch.from_file(sys.argv[1], shared=True, size=2 * stride + 2, dtype=torch.float16)
weight = torch.tensor([[0x38, 0x40, 0x48], [0xB8, 0xC0, 0xC8]], dtype=torch.uint8).view(FP8)
out = storage.as_strided((2, 3), (1, stride))
dequantize(weight, torch.tensor([2.0]), out=out, backend="triton")
print([storage[at : at + 2].tolist() for at in (0, stride, 2 * stride)])
"""


def test_a_transposed_out_of_over_2_31_elements_is_written_where_it_lies(tmp_path):
    """In a file of 4 GB of which three pages are on the disk, by Triton's CPU interpreter. Not run on a GPU yet."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", FAR_APART, tmp_path / "sparse"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout == "[[2.0, -2.0], [4.0, -4.0], [8.0, -8.0]]\n", done.stderr[-2000:]
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 1 << 20
    (tmp_path / "sparse").unlink()


def test_triton_launches_on_the_weights_device_not_the_current_one(monkeypatch):
    """By a kernel that notes whose device is the current one; a second GPU has not been at hand."""
    triton_dequant = pytest.importorskip("glmpp.triton_dequant")
    seen, entered = [], []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *args):
            entered.pop()

    kernel = {(1, 1): lambda *args: seen.append(list(entered))}
    monkeypatch.setattr(triton_dequant, "_dequantize_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight = torch.zeros(2, 2, dtype=FP8)
    triton_dequant.launch(weight, torch.ones(1, 1), (128, 128), torch.zeros(2, 2))
    assert len(seen) == 1 and [one is weight for one in seen[0]] == [True] and not entered


def test_triton_refuses_a_cpu_tensor(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(GlmppError, match="needs CUDA tensors, the weight is on cpu"):
        dequantize(torch.zeros(2, 2, dtype=FP8), torch.ones(1, 1), backend="triton")


def test_an_unknown_backend_is_an_error():
    with pytest.raises(GlmppError, match="backend 'numpy' is unknown"):
        dequantize(torch.zeros(2, 2, dtype=FP8), torch.ones(1, 1), backend="numpy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shape", [(6144, 6144), (576, 6144), (128, 6144), (100, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_on_a_gpu_equals_the_cpu(shape, dtype):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    codes[codes & 0x7F == 0x7F] = 0x80
    weight, scale = codes.view(FP8), torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 1e-3
    fused = torch.zeros(shape[0] + 32, shape[1], dtype=dtype, device="cuda")
    got = dequantize(weight.cuda(), scale.cuda(), out=fused[: shape[0]])
    assert torch.equal(got.cpu(), dequantize(weight, scale, dtype=dtype)) and not fused[shape[0] :].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nan_codes_on_a_gpu_stay_nan_and_are_reported():
    weight = torch.tensor([[0x38, 0xFF]], dtype=torch.uint8).view(FP8).cuda()
    with pytest.warns(UserWarning, match="holds 1 NaN codes"):
        restored = dequantize(weight, torch.ones(1, 1, device="cuda"))
    assert torch.isnan(restored).tolist() == [[False, True]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_triton_on_the_second_gpu_equals_the_cpu():
    """Not run yet: two GPUs were not at hand."""
    weight, scale = quantize(torch.randn(100, 300, generator=torch.Generator().manual_seed(1)))
    got = dequantize(weight.to("cuda:1"), scale.to("cuda:1"))
    assert got.device.index == 1 and torch.equal(got.cpu(), dequantize(weight, scale))
