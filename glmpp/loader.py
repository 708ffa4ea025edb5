"""One stage's load, and the helper of the bug before and after the fix.

The checkpoint stores the indexer's `wk` in FP8 with a `weight_scale_inv`, and `weights_proj` in BF16. vLLM fuses both
into one BF16 parameter, `wk_weights_proj`, so that one GEMM computes them. While loading, a helper therefore holds wk
and its scale back until both have arrived, dequantises, and stores the result as shard 0 of the fused parameter.
Every stage iterates the whole checkpoint, so the helper also meets the wk of layers that live elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import FP8, dequantize
from glmpp.errors import GlmppError
from glmpp.ledger import COLUMNS, LOADED, UNEXPECTED, Ledger
from glmpp.partition import OTHER_STAGE, OWN, SPECULATIVE, Stage
from glmpp.words import quoted

Pending = dict[str, dict[str, torch.Tensor]]


def load_fp8_indexer_wk_unguarded(
    name: str,
    tensor: torch.Tensor,
    pending: Pending,
    params: dict[str, torch.nn.Parameter],
    loaded: set[str],
    pp_missing_layer_names: Iterable[str],
) -> bool:
    """The helper as vLLM 0.20.2 to 0.22.1 have it: it never asks whether the layer lives on this stage."""
    part = indexer_wk_part(name, tensor)
    if part is None:
        return False
    layer = name.rsplit(".wk.", 1)[0]
    pending.setdefault(layer, {})[part] = tensor
    if len(pending[layer]) == 2:
        store_wk(layer, pending, params, loaded)
    return True


def load_fp8_indexer_wk(
    name: str,
    tensor: torch.Tensor,
    pending: Pending,
    params: dict[str, torch.nn.Parameter],
    loaded: set[str],
    pp_missing_layer_names: Iterable[str],
) -> bool:
    """The helper as vLLM PR 42944 fixes it: a layer that this stage misses is dropped before it is buffered.

    Args:
        name: tensor name as `load_weights` sees it, e.g. `layers.0.self_attn.indexer.wk.weight`.
        tensor: wk's float8_e4m3fn [128, hidden] or its scale grid, whichever has arrived.
        pending: tensors held back, by layer; owned by the caller, empty again once every pair is complete.
        params: the stage's parameters by name.
        loaded: names of loaded parameters; the fused name is added.
        pp_missing_layer_names: dot-terminated prefixes of the layers this stage has only placeholders for.

    Returns:
        True when the tensor is dealt with (stored, held back or dropped); False when it is none of the helper's.

    Raises:
        KeyError: the fused parameter does not exist. GlmppError: weight and scale do not fit.
    """
    part = indexer_wk_part(name, tensor)
    if part is None:
        return False
    # The fix: ask first, buffer after.
    if name.startswith(tuple(pp_missing_layer_names)):
        return True
    layer = name.rsplit(".wk.", 1)[0]
    pending.setdefault(layer, {})[part] = tensor
    if len(pending[layer]) == 2:
        store_wk(layer, pending, params, loaded)
    return True


def load_fp8_indexer_wk_late_skip(
    name: str,
    tensor: torch.Tensor,
    pending: Pending,
    params: dict[str, torch.nn.Parameter],
    loaded: set[str],
    pp_missing_layer_names: Iterable[str],
) -> bool:
    """A tempting wrong fix: the same question, asked after buffering. It loads, and keeps what it should drop."""
    part = indexer_wk_part(name, tensor)
    if part is None:
        return False
    layer = name.rsplit(".wk.", 1)[0]
    pending.setdefault(layer, {})[part] = tensor
    if name.startswith(tuple(pp_missing_layer_names)):
        return True
    if len(pending[layer]) == 2:
        store_wk(layer, pending, params, loaded)
    return True


def indexer_wk_part(name: str, tensor: torch.Tensor) -> str | None:
    """Which half of a block-FP8 wk this is: "weight", "scale", or None for any other tensor."""
    if ".indexer.wk." not in name:
        return None
    if name.endswith(".weight") and tensor.dtype == FP8:
        return "weight"
    return "scale" if name.endswith((".weight_scale_inv", ".weight_scale")) else None


def store_wk(layer: str, pending: Pending, params: dict[str, torch.nn.Parameter], loaded: set[str]) -> None:
    """Dequantise a complete pair into shard 0 of the fused parameter and forget the pair."""
    pair = pending.pop(layer)
    fused = f"{layer}.wk_weights_proj.weight"
    param = params[fused]
    param.weight_loader(param, dequantize(pair["weight"], pair["scale"]), 0)
    loaded.add(fused)


class WatchedBuffer(dict):
    """A buffer for a helper that remembers in `entered` every layer that was put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []

    def setdefault(self, layer: str, default: dict) -> dict:
        if layer not in self:
            self.entered.append(layer)
        return super().setdefault(layer, default)


def first_foreign_pair(names: Iterable[str], stage: Stage) -> str | None:
    """The fused parameter that an unguarded helper looks up first and does not find, under the checkpoint's names.

    It is that of the first wk whose two halves have both arrived and whose layer is another stage's; None if there is
    none. Nothing but the order of `names` decides it.
    """
    halves = set()
    for name in names:
        layer, found, _ = name.partition(".wk.")
        if found and layer.endswith(".indexer") and stage.owner(name) == OTHER_STAGE:
            if layer in halves:
                return f"{layer}.wk_weights_proj.weight"
            halves.add(layer)
    return None


# Checkpoint module -> (fused module of the vLLM model, shard). Source: `load_weights` of vLLM's deepseek_v2.
FUSED = {
    "self_attn.q_a_proj": ("self_attn.fused_qkv_a_proj", 0),
    "self_attn.kv_a_proj_with_mqa": ("self_attn.fused_qkv_a_proj", 1),
    "self_attn.indexer.wk": ("self_attn.indexer.wk_weights_proj", 0),
    "self_attn.indexer.weights_proj": ("self_attn.indexer.wk_weights_proj", 1),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
    "mlp.shared_experts.gate_proj": ("mlp.shared_experts.gate_up_proj", 0),
    "mlp.shared_experts.up_proj": ("mlp.shared_experts.gate_up_proj", 1),
}

FUSED_EXPERTS = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)}
_IN_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)\.(\w+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor goes: parameter, shard of a fused parameter, expert of a stacked one."""

    parameter: str
    shard: int = 0
    expert: int | None = None


def place(name: str) -> Place:
    """The parameter of vLLM's GLM-5 model that a checkpoint tensor is loaded into."""
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return Place(name)
    layer, module, kind = match.groups()
    if expert := _EXPERT.fullmatch(module):
        fused, shard = FUSED_EXPERTS[expert[2]]
        return Place(f"{layer}.mlp.experts.{fused}_{kind}", shard, int(expert[1]))
    fused, shard = FUSED.get(module, (module, 0))
    return Place(f"{layer}.{fused}.{kind}", shard)


def stage_parameters(checkpoint: Checkpoint, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """Empty parameters of a stage under vLLM's names, shapes and dtypes, on the CPU (meta without files).

    Each has a `weight_loader(param, tensor, shard, expert)` that writes the rows of its shard, as vLLM's have.
    """
    shards: dict[str, dict[int, int]] = {}
    experts: dict[str, int] = {}
    like: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for spec in checkpoint.values():
        if not stage.owns(spec.name):
            continue
        if ".indexer.wk.weight_scale" in spec.name:
            continue  # consumed by the helper, no parameter of its own
        where = place(spec.name)
        dtype, shape = spec.in_torch
        shards.setdefault(where.parameter, {})[where.shard] = shape[0]
        like[where.parameter] = (shape[1:], torch.bfloat16 if ".indexer.wk." in spec.name else dtype)
        if where.expert is not None:
            experts[where.parameter] = max(experts.get(where.parameter, 0), where.expert + 1)

    params = {}
    device = "meta" if checkpoint.directory is None else "cpu"
    for name, rows in shards.items():
        tail, dtype = like[name]
        lead = (experts[name],) if name in experts else ()
        param = torch.nn.Parameter(
            torch.empty(*lead, sum(rows.values()), *tail, dtype=dtype, device=device), requires_grad=False
        )
        starts = {shard: sum(rows[s] for s in rows if s < shard) for shard in rows}
        param.weight_loader = _row_writer(starts)
        param.elements_written = 0
        params[name] = param
    return params


def _row_writer(starts: dict[int, int]) -> Callable[..., None]:
    def write(param: torch.nn.Parameter, tensor: torch.Tensor, shard: int = 0, expert: int | None = None) -> None:
        target = param.data if expert is None else param.data[expert]
        rows = target[starts[shard] : starts[shard] + tensor.shape[0]]
        if rows.shape != tensor.shape:  # torch would spread a [n, 1] over [n, m]
            raise GlmppError(f"a tensor of shape {list(tensor.shape)} does not fit rows of shape {list(rows.shape)}")
        rows.copy_(tensor)
        param.elements_written += tensor.numel()

    return write


def load_stage(
    checkpoint: Checkpoint,
    stage: Stage,
    helper: Callable[..., bool] = load_fp8_indexer_wk,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    pending: Pending | None = None,
    params: dict[str, torch.nn.Parameter] | None = None,
) -> tuple[dict[str, torch.nn.Parameter], Ledger]:
    """Load one stage the way vLLM does: iterate the whole checkpoint, keep what the stage owns.

    Args:
        checkpoint: with files its bytes are read; without, meta tensors flow through the same code.
        helper: one of the three helpers of this file, or the reader's own.
        weights: (name, tensor) pairs in another order or from elsewhere; default `checkpoint.read()`.
        pending: the buffer to use; give the same one to two calls when a pair is split over them.
        params: parameters of an earlier call to go on with; default new ones.

    Returns:
        The stage's parameters and the ledger.

    Raises:
        KeyError: from a helper that looks up a layer the stage misses.
        GlmppError: weight and scale do not fit, or a shard cannot be read.
    """
    params = stage_parameters(checkpoint, stage) if params is None else params
    missing = stage.missing_prefixes()
    pending = {} if pending is None else pending
    loaded: set[str] = set()
    ledger = Ledger()
    for name, tensor in checkpoint.read() if weights is None else weights:
        column = stage.owner(name)
        ledger.tensors[name] = column if column in COLUMNS else UNEXPECTED
        if column == SPECULATIVE:
            continue
        if helper(name, tensor, pending, params, loaded, missing):
            if column == OWN:
                ledger.tensors[name] = LOADED
            continue
        if name.startswith(tuple(missing)):
            continue
        where = place(name)
        if where.parameter not in params:
            continue
        param = params[where.parameter]
        try:
            param.weight_loader(param, tensor, where.shard, where.expert)
        except GlmppError as error:
            raise GlmppError(f"{stage}: {quoted(name)}: {error}") from None
        loaded.add(where.parameter)
        ledger.tensors[name] = LOADED
    for layer, parts in pending.items():  # held back and never stored: not loaded after all
        for part in parts:
            halves = f"{layer}.wk.weight", f"{layer}.wk.weight_scale_inv"
            name, other = halves if part == "weight" else halves[::-1]
            if ledger.tensors.get(name) == LOADED:
                ledger.tensors[name] = UNEXPECTED
                ledger.unpaired[name] = other
    ledger.parameters = {name: (param.elements_written, param.numel()) for name, param in params.items()}
    return params, ledger
