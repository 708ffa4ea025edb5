"""What dequantisation loses, and what the loss does to the indexer.

Three errors are kept apart: that of FP8 quantisation (the original is known), that of rounding the product to BF16, and
both together. They differ by an order of magnitude and have different causes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize, spread
from glmpp.errors import GlmppError
from glmpp.formats.tensor import TensorSpec
from glmpp.lab.forward import transformers_model
from glmpp.progress import progress_bar
from glmpp.words import quoted


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

    Raises:
        GlmppError: different shapes, or a NaN in either (an error of NaN would hide all others).
    """
    if original.shape != restored.shape:
        raise GlmppError(f"cannot compare shapes {list(original.shape)} and {list(restored.shape)}")
    reference = original.double()
    error = restored.double() - reference
    norm, size = error.norm().item(), reference.norm().item()
    if math.isnan(norm) or math.isnan(size):
        raise GlmppError(f"{int(restored.isnan().sum())} restored and {int(original.isnan().sum())} original values are NaN")
    relative = norm / size if size else (0.0 if norm == 0 else math.inf)
    index = torch.unravel_index(error.abs().argmax(), error.shape)
    sqnr = math.inf if relative == 0 else -20 * math.log10(relative)
    return ErrorStats(relative, sqnr, error.abs().max().item(), tuple(int(i) for i in index))


def fp8_step(original: torch.Tensor, scale_inv: torch.Tensor, block_size: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """Distance between neighbouring float8_e4m3fn values around each element, in the units of the weight.

    2^(e - 3) times the scale, e the exponent of |original / scale|, at least -6 (subnormal codes are evenly spaced).
    """
    scale = spread(scale_inv, original.shape, block_size)
    fraction, exponent = torch.frexp(original.float().abs() / scale)  # fraction in [0.5, 1): exponent is one too high
    return torch.ldexp(scale, torch.where(fraction == 0, -6, exponent - 1).clamp(min=-6) - 3)


def step_histogram(
    original: torch.Tensor,
    restored: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    bins: int = 40,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Histogram of the error in units of the FP8 step, over [-1, 1]; what lies outside is counted in the end bins.

    Returns:
        (edges [bins + 1], share of the elements [bins]). Rounding to nearest stays within half a step.
    """
    errors = (restored.float() - original.float()) / fp8_step(original, scale_inv, block_size)
    counts, edges = torch.histogram(errors.flatten().clamp(-1, 1), bins, range=(-1.0, 1.0))
    return edges, counts / counts.sum()


def round_trip(original: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, dict[str, tuple]]:
    """Store `original` (float32) in block FP8 and restore it to BF16: the scales, and before and after of each error."""
    codes, scale = quantize(original, block_size)
    product = dequantize(codes, scale, block_size, dtype=torch.float32)
    restored = dequantize(codes, scale, block_size)
    return scale, {
        "FP8 quantisation": (original, product),
        "BF16 rounding": (product, restored),
        "both": (original, restored),
    }


def three_errors(original: torch.Tensor, block_size: tuple[int, int] = (128, 128)) -> dict[str, ErrorStats]:
    """The three errors of storing `original` (float32) in block FP8 and restoring it to BF16.

    Returns:
        "FP8 quantisation": original against the float32 product; "BF16 rounding": that product against its BF16;
        "both": original against BF16.
    """
    return {name: error_stats(*pair) for name, pair in round_trip(original, block_size)[1].items()}


def tensor_errors(fp8: Checkpoint, original: Callable[[TensorSpec], torch.Tensor]) -> pd.DataFrame:
    """Error of every FP8 tensor of a checkpoint against its original, one tensor in memory at a time.

    Args:
        fp8: with files.
        original: the unquantised values of a tensor, e.g. `synthetic_original`, or `original_from(bf16_checkpoint)`.

    Returns:
        One row per FP8 weight: layer (-1 outside the layers), squared error and squared norm (float64, so that rows can be
        added up to layers and stages), SQNR in dB.

    Raises:
        GlmppError: an FP8 weight without its scale, or scales that do not fit.
    """
    block = tuple((fp8.config.get("quantization_config") or {}).get("weight_block_size") or (128, 128))
    rows = []
    for spec in progress_bar([s for s in fp8.values() if s.dtype == "F8_E4M3"], "comparing"):
        scale = next((name for name in (f"{spec.name}_scale_inv", f"{spec.name}_scale") if name in fp8), None)
        if scale is None:
            raise GlmppError(f"{spec.file}: FP8 tensor {quoted(spec.name)} has no scale in the checkpoint")
        pair = dict(fp8.read([spec.name, scale]))
        reference = original(spec).double()
        error = dequantize(pair[spec.name], pair[scale], block).double() - reference
        layer = re.search(r"layers?\.(\d+)\.", spec.name)
        sums = (tensor.square().sum().item() for tensor in (error, reference))
        rows.append((spec.name, int(layer[1]) if layer else -1, *sums))
    table = pd.DataFrame(rows, columns=["tensor", "layer", "error_sq", "norm_sq"]).set_index("tensor")
    table["sqnr_db"] = 10 * np.log10(table.norm_sq / table.error_sq)
    return table


def original_from(checkpoint: Checkpoint) -> Callable[[TensorSpec], torch.Tensor]:
    """`original` for `tensor_errors` from an unquantised checkpoint that has the same tensor names."""

    def read(spec: TensorSpec) -> torch.Tensor:
        if spec.name not in checkpoint:
            raise GlmppError(f"{checkpoint.directory}: has no tensor {quoted(spec.name)} to compare with")
        return next(tensor for _, tensor in checkpoint.read([spec.name]))

    return read


def error_by_magnitude(original: torch.Tensor, block_size: tuple[int, int] = (128, 128), bins: int = 36) -> pd.DataFrame:
    """RMS relative error of the three kinds, for elements grouped by |value| / scale (1 is one FP8 unit, 448 the largest).

    Returns:
        Index: middle of the bin on a log2 scale; columns as in `three_errors`; bins with fewer than 50 elements left out.
    """
    scale, pairs = round_trip(original, block_size)
    size = (original.abs() / spread(scale, original.shape, block_size)).flatten()
    edges = np.logspace(-12, math.log2(448.1), bins + 1, base=2)
    middles = pd.cut(size.numpy(), edges, labels=np.sqrt(edges[:-1] * edges[1:]))
    # 0 / 0 where a product is zero: nothing is lost by rounding it
    errors = {name: ((after - before) / before).flatten().nan_to_num(0) for name, (before, after) in pairs.items()}
    groups = pd.DataFrame({name: error.square().numpy() for name, error in errors.items()}).groupby(middles, observed=True)
    table = np.sqrt(groups.mean()[groups.size() >= 50])
    return table.set_axis(table.index.astype(float))


def _floor_blocks(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The block size inferred as shape // grid: on a ragged edge the grid is stretched over too small blocks."""
    rows, cols = (size // parts for size, parts in zip(codes.shape, scale.shape))
    at_row = (torch.arange(codes.shape[0]) // rows).clamp(max=scale.shape[0] - 1)
    at_col = (torch.arange(codes.shape[1]) // cols).clamp(max=scale.shape[1] - 1)
    return codes.float() * scale[at_row][:, at_col]


def _exponent_as_number(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """E8M0 stores the exponent of a power of two, biased by 127; here the stored byte is taken for the scale."""
    byte = torch.ceil(torch.log2(scale)) + 127
    return codes.float() * spread(byte, codes.shape, block)


WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]] = {
    "scale ignored": lambda codes, scale, block: codes.float(),
    "divided instead of multiplied": lambda codes, scale, block: codes.float() / spread(scale, codes.shape, block),
    "block size by floor division": _floor_blocks,
    "grid transposed": lambda codes, scale, block: codes.float() * spread(scale.T, codes.shape, block),
    "E8M0 exponent read as a number": _exponent_as_number,
}


def gallery(original: torch.Tensor, block_size: tuple[int, int] = (128, 128)) -> dict[str, tuple[torch.Tensor, ErrorStats]]:
    """The right dequantisation of a square matrix and the wrong ones: float32 values and their errors, by name.

    Args:
        original: [n, n]; n not a multiple of the block, so that floor division goes wrong.
    """
    codes, scale = quantize(original, block_size)
    results = {"right": dequantize(codes, scale, block_size, dtype=torch.float32)}
    results |= {name: wrong(codes, scale, block_size) for name, wrong in WRONG.items()}
    return {name: (values, error_stats(original, values)) for name, values in results.items()}


def indexer_scores(
    keys_from: torch.Tensor, wk: torch.Tensor, queries: torch.Tensor, head_weights: torch.Tensor
) -> torch.Tensor:
    """Scores by which the indexer picks tokens: sum over heads of weight * relu(q . k), k = LayerNorm(hidden @ wk.T).

    Args:
        keys_from: hidden states of the context, float32 [tokens, hidden].
        wk: [head_dim, hidden], any float dtype.
        queries: float32 [queries, heads, head_dim]. head_weights: float32 [queries, heads].

    Returns:
        float32 [queries, tokens]. RoPE and the affine part of k_norm are left out: they are the same for every wk.
    """
    keys = torch.nn.functional.layer_norm(keys_from @ wk.float().T, wk.shape[:1], eps=1e-6)
    return torch.einsum("qh,qhk->qk", head_weights, torch.relu(queries @ keys.T))


def topk_overlap(scores: torch.Tensor, other: torch.Tensor, k: int) -> float:
    """Share of the k best tokens of each row that are among the k best of the other's, averaged over rows."""
    if not 0 < k <= scores.shape[-1]:
        raise GlmppError(f"cannot take the {k} best of {scores.shape[-1]} tokens")
    return _common(scores.topk(k).indices, other.topk(k).indices, scores.shape[-1])


def _common(picked: torch.Tensor, other: torch.Tensor, tokens: int) -> float:
    """Share of the tokens picked in each row that are picked in the other's, too."""
    chosen = torch.zeros(len(picked), tokens, dtype=torch.bool).scatter_(1, picked.long(), True)
    return chosen.gather(1, other.long()).float().mean().item()


def overlap_by_context(
    wk: torch.Tensor,
    others: dict[str, torch.Tensor],
    contexts: list[int],
    k: int,
    heads: int = 32,
    queries: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Top-k overlap of several versions of wk with the original, for contexts of several lengths.

    Hidden states, queries and head weights are N(0, 1), the same for every version.

    Args:
        wk: the original, float32 [head_dim, hidden]. others: name -> restored wk of the same shape.

    Returns:
        Index: context in tokens; one column per version, the overlap in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(max(contexts), wk.shape[1], generator=generator)
    query = torch.randn(queries, heads, wk.shape[0], generator=generator)
    weights = torch.randn(queries, heads, generator=generator)
    reference = indexer_scores(hidden, wk, query, weights)
    table = pd.DataFrame(index=pd.Index(contexts, name="context"))
    for name, other in others.items():
        scores = indexer_scores(hidden, other, query, weights)
        table[name] = [topk_overlap(reference[:, :tokens], scores[:, :tokens], k) for tokens in contexts]
    return table


def effect_in_transformers(
    config: dict, tokens: int = 1024, k: int = 128, seed: int = 0
) -> tuple[pd.DataFrame, ErrorStats, float]:
    """Restored instead of original wk in transformers' own `GlmMoeDsaForCausalLM`, random weights, float32, on the CPU.

    Args:
        config: a GLM-5 config of a size that fits (see `reduced_config`); its quantisation is ignored.
        tokens: length of the random prompt. k: `index_topk`, tokens that the indexer picks.

    Returns:
        (per layer, the overlap of the picked tokens, over queries that have more than k to choose from: past layer 0 the
        hidden states differ too; error of the logits; share of positions whose most likely token is the same).

    Raises:
        GlmppError: transformers is missing or too old for the model.
    """
    torch.manual_seed(seed)
    model = transformers_model(config, index_topk=k)
    prompt = torch.randint(config["vocab_size"], (1, tokens))
    indexers = [layer.self_attn.indexer for layer in model.model.layers]

    picked: list[torch.Tensor] = []
    for indexer in indexers:
        indexer.register_forward_hook(lambda *args: picked.append(args[2][0]))
    with torch.no_grad():
        logits = model(prompt, use_cache=False).logits[0]
        for indexer in indexers:
            indexer.wk.weight.data = dequantize(*quantize(indexer.wk.weight.data)).float()
        changed = model(prompt, use_cache=False).logits[0]
    # The first k tokens of the prompt have no more than k to choose from.
    overlap = [_common(one[k:], other[k:], tokens) for one, other in zip(picked, picked[len(indexers) :])]
    table = pd.DataFrame({"overlap": overlap}).rename_axis("layer")
    same = (logits.argmax(-1) == changed.argmax(-1)).float().mean().item()
    return table, error_stats(logits, changed), same
