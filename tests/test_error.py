"""The error measures against values worked out by hand, and the gallery's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import FP8, dequantize, quantize
from glmpp.errors import GlmppError
from glmpp.formats.glm5 import reduced_config
from glmpp.lab.error import (
    WRONG,
    effect_in_transformers,
    error_by_magnitude,
    error_stats,
    fp8_step,
    gallery,
    indexer_scores,
    original_from,
    overlap_by_context,
    step_histogram,
    tensor_errors,
    three_errors,
    topk_overlap,
)
from glmpp.lab.notebook import measurements
from glmpp.synthetic import synthetic_original, write_checkpoint


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
    # A tie, 0.5 exactly, can come out as 0.50000003 after the division by the step: the bin beside the edge is allowed.
    assert share[(edges[:-1] < -0.56) | (edges[1:] > 0.56)].sum() == 0


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


def test_a_pair_of_folders_is_compared_tensor_by_tensor(tiny, tmp_path):
    """An FP8 checkpoint and its BF16 sibling: the same names, found by name, whatever the shards."""
    bf16_config = {key: value for key, value in tiny.config.items() if key != "quantization_config"}
    bf16 = write_checkpoint(bf16_config, tmp_path / "bf16", max_shard_bytes=999_999)
    table = tensor_errors(tiny, original_from(bf16))
    assert set(table.index) == {name for name, spec in tiny.items() if spec.dtype == "F8_E4M3"}
    assert sorted(set(table.layer)) == list(range(13))
    name = "model.layers.4.mlp.experts.1.down_proj.weight"
    codes, scale = (tensor for _, tensor in tiny.read([name, f"{name}_scale_inv"]))
    (reference,) = (tensor for _, tensor in bf16.read([name]))
    assert table.sqnr_db[name] == pytest.approx(error_stats(reference, dequantize(codes, scale)).sqnr_db, rel=1e-9)
    with pytest.raises(GlmppError, match="has no tensor"):
        tensor_errors(tiny, original_from(Checkpoint([], {}, tmp_path)))


def test_an_fp8_weight_without_its_scale_is_named(tiny):
    lost = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    broken = Checkpoint([spec for spec in tiny.values() if spec.name != lost], tiny.config, tiny.directory)
    with pytest.raises(
        GlmppError, match=r"safetensors: FP8 tensor 'model\.layers\.0\.self_attn\.o_proj\.weight' has no scale"
    ):
        tensor_errors(broken, synthetic_original)


def test_error_by_magnitude_keeps_the_curves_apart():
    small = 10 ** (-4 * torch.rand(1200, 1200, generator=torch.Generator().manual_seed(4)))  # enough subnormal codes
    table = error_by_magnitude(uneven(1200) * small)
    normal = table[table.index > 2**-4]
    assert (normal["FP8 quantisation"] > 8 * normal["BF16 rounding"]).all()
    assert (normal["FP8 quantisation"] < 2**-4).all() and (table["BF16 rounding"] < 2**-8).all()
    assert table["FP8 quantisation"].iloc[0] > 0.1  # below the smallest normal code


def test_overlap_falls_with_the_context_and_is_one_for_the_original():
    wk = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    versions = {"same": wk, "fp8": dequantize(*quantize(wk)), "noise": torch.randn(64, 512) * 0.02}
    table = overlap_by_context(wk, versions, [300, 1200, 4000], k=256, heads=8, queries=16)
    assert (table["same"] == 1).all()
    assert (table["fp8"] > 0.9).all() and table["fp8"].is_monotonic_decreasing
    assert table["noise"][4000] < 0.5


@pytest.mark.vllm  # transformers comes with the vllm extra
def test_the_indexer_of_transformers_keeps_most_of_its_picks(config):
    pytest.importorskip("transformers", minversion="5.6")
    small = reduced_config(config, num_hidden_layers=4)
    table, logits, same = effect_in_transformers(small, tokens=256, k=64)
    assert len(table) == 4 and table.overlap[0] > 0.95 and table.overlap.min() > 0.7
    assert 0 < logits.relative_frobenius < 0.5 and 0.5 < same < 1


def test_committed_measurements_reach_their_targets():
    """Ratios from `make bench`, on the machine that the file names."""
    _, rows = measurements("dequant_cpu")
    times = rows.pivot(index="tensor", columns="peer", values="seconds_median")
    fresh, into = (times["vLLM scaled_dequantize"] / times[f"glmpp, {way}"] for way in ("fresh output", "into out="))
    assert fresh["[6144, 6144]"] >= 8 and into["[6144, 6144]"] >= 15
    assert (into.dropna() > 1).all() and (fresh.dropna() > 1).all()
    exact = rows[rows.peer.isin(["vLLM scaled_dequantize", "naive expression"]) & rows.seconds_median.notna()]
    assert exact.same_bits_as_glmpp.all()
    extra = rows[rows.peer == "glmpp, into out="]
    assert (extra.peak_extra_bytes < 0.1 * extra.output_bytes).all()
