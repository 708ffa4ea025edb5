"""The error measures against values worked out by hand, and the gallery's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmpp.dequant import FP8, dequantize, quantize
from glmpp.error import WRONG, error_stats, fp8_step, gallery, indexer_scores, step_histogram, three_errors, topk_overlap
from glmpp.errors import GlmppError


def uneven(n: int = 576, seed: int = 0) -> torch.Tensor:
    """A square matrix whose 128 x 128 blocks differ in magnitude, so that the grid of scales matters."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(-(-n // 128), -(-n // 128), generator=generator) * 4 + 0.5
    return (
        torch.randn(n, n, generator=generator) * magnitude.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :n] * 0.02
    )


def test_error_stats_of_a_known_error():
    original = torch.tensor([[3.0, 4.0]])
    stats = error_stats(original, torch.tensor([[3.0, 4.05]]))
    assert stats.relative_frobenius == pytest.approx(0.01, rel=1e-5)
    assert stats.sqnr_db == pytest.approx(40, rel=1e-5)
    assert stats.max_abs == pytest.approx(0.05, rel=1e-5) and stats.worst_index == (0, 1)
    assert error_stats(original, original).sqnr_db == math.inf
    assert error_stats(torch.zeros(2), torch.ones(2)).relative_frobenius == math.inf
    with pytest.raises(GlmppError, match=r"\[1, 2\] and \[2\]"):
        error_stats(original, torch.zeros(2))


def test_a_nan_is_an_error_not_an_error_measure():
    with pytest.raises(GlmppError, match="1 restored and 0 original values are NaN"):
        error_stats(torch.ones(2), torch.tensor([1.0, math.nan]))


def test_fp8_step_is_the_distance_to_the_next_code():
    codes = torch.arange(0, 0x7E, dtype=torch.uint8)
    values = codes.view(FP8).float().view(1, -1)
    above = (codes + 1).view(FP8).float().view(1, -1)
    for scale in (1.0, 0.37):
        step = fp8_step(values * scale, torch.full((1, 1), scale))
        assert torch.allclose(step, (above - values) * scale, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_quantisation_stays_within_half_a_step(seed):
    original = uneven(200, seed)
    codes, scale = quantize(original)
    edges, share = step_histogram(original, dequantize(codes, scale, dtype=torch.float32), scale)
    assert share.sum().item() == pytest.approx(1)
    assert share[(edges[:-1] < -0.51) | (edges[1:] > 0.51)].sum() == 0


def test_three_errors_are_three_different_things():
    errors = three_errors(uneven())
    assert 30 < errors["FP8 quantisation"].sqnr_db < 33
    assert 54 < errors["BF16 rounding"].sqnr_db < 58
    both = math.hypot(errors["FP8 quantisation"].relative_frobenius, errors["BF16 rounding"].relative_frobenius)
    assert errors["both"].relative_frobenius == pytest.approx(both, rel=0.01)


def test_the_gallery_is_told_apart_by_its_numbers():
    found = {name: stats.sqnr_db for name, (_, stats) in gallery(uneven()).items()}
    assert found.keys() == {"right", *WRONG}
    assert found["right"] > 30
    assert all(sqnr < 10 for name, sqnr in found.items() if name != "right")
    assert found["divided instead of multiplied"] < found["E8M0 exponent read as a number"] < found["scale ignored"] < -50
    assert -10 < found["grid transposed"] < 10 and -10 < found["block size by floor division"] < 10


def test_floor_division_is_harmless_without_a_ragged_edge():
    original = uneven(512)
    _, stats = gallery(original)["block size by floor division"]
    assert stats.sqnr_db > 30


def test_indexer_scores_equal_the_formula():
    generator = torch.Generator().manual_seed(0)
    hidden, wk = torch.randn(7, 16, generator=generator), torch.randn(4, 16, generator=generator)
    queries, weights = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 2, generator=generator)
    got = indexer_scores(hidden, wk, queries, weights)
    for q in range(3):
        for t in range(7):
            k = (wk.double() @ hidden[t].double()).numpy()
            k = (k - k.mean()) / math.sqrt(k.var() + 1e-6)
            expected = sum(
                float(weights[q, h]) * max(0.0, float((queries[q, h].double().numpy() * k).sum())) for h in range(2)
            )
            assert got[q, t].item() == pytest.approx(expected, abs=1e-4)


def test_topk_overlap_counts_common_tokens():
    a = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert topk_overlap(a, a, 3) == 1.0
    assert topk_overlap(a, -a, 2) == 0.0
    assert topk_overlap(a, torch.tensor([[5.0, 4.0, 0.0, 9.0, 1.0]]), 3) == pytest.approx(2 / 3)
    with pytest.raises(GlmppError, match="6 best of 5"):
        topk_overlap(a, a, 6)
