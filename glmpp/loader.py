"""One stage's load: the helper of the bug before and after the fix, and the ledger of what happened to every tensor.

The checkpoint stores the indexer's `wk` in FP8 with a `weight_scale_inv`, and `weights_proj` in BF16. vLLM fuses both
into one BF16 parameter, `wk_weights_proj`, so that one GEMM computes them. While loading, a helper therefore holds wk
and its scale back until both have arrived, dequantises, and stores the result as shard 0 of the fused parameter.
Every stage iterates the whole checkpoint, so the helper also meets the wk of layers that live elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmpp.checkpoint import Checkpoint
from glmpp.dequant import FP8, dequantize
from glmpp.errors import GlmppError
from glmpp.partition import OTHER_STAGE, OWN, SPECULATIVE, Stage

Pending = dict[str, dict[str, torch.Tensor]]
NO_PADDING: Mapping[str, int] = MappingProxyType({})

# --- the helper, before and after ---------------------------------------------------------------------------------


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
        if found and layer.endswith(".indexer") and stage.column(name) == OTHER_STAGE:
            if layer in halves:
                return f"{layer}.wk_weights_proj.weight"
            halves.add(layer)
    return None


# --- the ledger ---------------------------------------------------------------------------------------------------

LOADED, UNEXPECTED, NOT_REACHED = "loaded", "unexpected", "not reached"
IGNORED = "ignored by the model"
COLUMNS = (LOADED, OTHER_STAGE, SPECULATIVE, IGNORED, UNEXPECTED, NOT_REACHED)


@dataclass
class Ledger:
    """What happened to every tensor of the checkpoint and to every parameter of the stage.

    Attributes:
        tensors: checkpoint tensor -> one of COLUMNS. "ignored by the model": its own mapping of names drops it.
            "unexpected": handed over, neither stored nor known to be somebody else's. "not reached": the load died
            before it (a load that ends well has none).
        parameters: parameter -> (elements written, elements it has).
        unpaired: tensor that came -> its other half, FP8 weight or scale, that never did.
        padding: parameter -> elements of it that no checkpoint fills.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    unpaired: dict[str, str] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Tensors per column; the columns add up to the checkpoint."""
        found = Counter(self.tensors.values())
        return {column: found[column] for column in COLUMNS}

    @property
    def left_at_init(self) -> list[str]:
        """Parameters of which not every element was written, padding apart."""
        padding = self.padding
        return [name for name, (written, size) in self.parameters.items() if written < size - padding.get(name, 0)]

    @property
    def written_twice(self) -> list[str]:
        return [name for name, (written, size) in self.parameters.items() if written > size]

    def in_column(self, column: str) -> list[str]:
        return [name for name, found in self.tensors.items() if found == column]

    def check(self, checkpoint: Checkpoint, stage: Stage, may_stay_at_init: Iterable[str] = ()) -> None:
        """Close the books: every tensor in one column, loaded == owned, nothing left at init, nothing written twice.

        Args:
            may_stay_at_init: parameters that the caller can account for, e.g. kv-cache scales.

        Raises:
            GlmppError: with the first tensor or parameter that does not balance.
        """
        for came, missing in self.unpaired.items():
            raise GlmppError(f"{stage}: {came!r} came and {missing!r} never did, so neither is loaded")
        if self.tensors.keys() != checkpoint.keys():
            stray = sorted(self.tensors.keys() ^ checkpoint.keys())
            raise GlmppError(f"{stage}: {len(stray)} tensors are in the checkpoint or the ledger only, e.g. {stray[0]!r}")
        for name, column in self.tensors.items():
            expected = {OWN: LOADED}.get(stage.column(name), stage.column(name))
            if column != expected:
                raise GlmppError(f"{stage}: tensor {name!r} is {column!r}, expected {expected!r}")
        if left := sorted(set(self.left_at_init) - set(may_stay_at_init)):
            raise GlmppError(f"{stage}: {len(left)} parameters are left at init, e.g. {left[0]!r}")
        if self.written_twice:
            raise GlmppError(f"{stage}: parameter {self.written_twice[0]!r} was written more than once")


class WriteRecorder(TorchDispatchMode):
    """While active, sees every in-place write into a model's parameters, whichever loader makes it.

    vLLM keeps no such record: its `load_weights` returns names that were *looked at*. Views, `.data` and slices share
    their parameter's storage, so the storage tells which parameter an operator writes.

    Attributes:
        written: parameter -> elements written so far, a region that is written again counted again.
        order: names handed over so far, when the weights pass through `hand_over`.
        stored: those during whose turn a parameter was written.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.written = dict.fromkeys(self.names.values(), 0)
        self.order: list[str] = []
        self.stored: set[str] = set()

    def hand_over(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.order.append(name)
            yield name, tensor

    def left_at_init(self, padding: Mapping[str, int] = NO_PADDING) -> list[str]:
        """Parameters of which not every element was written; one that was replaced as a whole counts as written.

        Args:
            padding: parameter -> elements that no checkpoint fills.
        """
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if self.names.get(_storage(p)) == name}
        return [name for name, size in sizes.items() if self.written[name] < size - padding.get(name, 0)]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper for that costs several times the method itself

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = _WRITES.get(func)
        if writes is None:
            arguments = func._schema.arguments
            writes = tuple(at for at, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
            _WRITES[func] = writes
        for at in writes:
            value = args[at] if at < len(args) else (kwargs or {}).get(func._schema.arguments[at].name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                name = self.names.get(_storage(tensor)) if isinstance(tensor, torch.Tensor) else None
                if name is not None:
                    self.written[name] += tensor.numel()
                    self.stored.update(self.order[-1:])
        return func(*args, **(kwargs or {}))


class WriteLog:
    """The same question at a tenth of the price, for real loads: which parameters were written, by address.

    While active, the Python methods that weight loaders write with are wrapped (`copy_`, `fill_`, `zero_`, `index_copy_`,
    `t[i] = x`); each call appends an address and a count, and the sums are made afterwards. `WriteRecorder` sees every
    operator, at a microsecond for each of a dozen per tensor: a third of a second against a twentieth, for a stage of
    17,000 tensors. On meta tensors there are no addresses: there only the recorder works.
    """

    METHODS = ("copy_", "fill_", "zero_", "index_copy_")

    def __init__(self, model: torch.nn.Module):
        self.params = {name: p for name, p in model.named_parameters() if p.numel()}
        self.starts = {name: p.data_ptr() for name, p in self.params.items()}
        self.model = model
        self.calls: list[int] = []  # address, elements, address, elements, …

    def __enter__(self) -> WriteLog:
        log = self.calls.extend
        self.originals = {name: getattr(torch._C.TensorBase, name) for name in (*self.METHODS, "__setitem__")}

        def wrapped(original):
            def method(tensor, *args, **kwargs):
                log((tensor.data_ptr(), tensor.numel()))
                return original(tensor, *args, **kwargs)

            return method

        for name in self.METHODS:
            setattr(torch.Tensor, name, wrapped(self.originals[name]))

        def set_item(tensor, index, value):
            target = tensor[index]
            if target.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                target = tensor  # advanced indexing makes a copy: where it writes is not known
            log((target.data_ptr(), target.numel()))
            return self.originals["__setitem__"](tensor, index, value)

        torch.Tensor.__setitem__ = set_item
        return self

    def __exit__(self, *_) -> None:
        for name in self.originals:
            delattr(torch.Tensor, name)  # the method of the base class shows again

    def left_at_init(self, padding: Mapping[str, int] = NO_PADDING) -> list[str]:
        """Parameters that were not written, or not wholly. One that was replaced as a whole counts as written.

        Args:
            padding: parameter -> elements that no checkpoint fills, of stacked experts the same number in each.
        """
        order = sorted(self.starts, key=self.starts.__getitem__)
        bounds = np.array([self.starts[name] for name in order] + [np.iinfo(np.int64).max])
        calls = np.array(self.calls, dtype=np.int64).reshape(-1, 2)
        calls = calls[np.lexsort((calls[:, 1], calls[:, 0]))]
        new = np.ones(len(calls), dtype=bool)  # the same region written twice is one region
        new[1:] = (calls[1:] != calls[:-1]).any(axis=1)
        calls = calls[new]
        cuts = np.searchsorted(calls[:, 0], bounds)
        now, left = dict(self.model.named_parameters()), set()
        for name, start, first, last in zip(order, bounds, cuts, cuts[1:]):
            param, regions = self.params[name], calls[first:last] - (start, 0)
            replaced = name not in now or now[name].data_ptr() != start
            if not replaced and not _wholly(param, regions[regions[:, 0] < param.nbytes], padding.get(name, 0)):
                left.add(name)
        return [name for name in self.params if name in left]


def _wholly(param: torch.nn.Parameter, regions: np.ndarray, padding: int) -> bool:
    """Whether regions, rows of (byte offset, elements), fill a parameter apart from its padding."""
    written = regions[:, 1].sum()
    if written >= param.numel() or param.dim() < 3 or not padding:
        return bool(written >= param.numel() - padding)
    expert = regions[:, 0] // (param.stride(0) * param.element_size())
    each = np.bincount(expert, weights=regions[:, 1], minlength=param.shape[0])
    return bool(each.min() >= (param.numel() - padding) / param.shape[0])


_WRITES: dict[torch._ops.OpOverload, tuple[int, ...]] = {}  # operator -> positions of the arguments it writes


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --- one stage, loaded by the kit ---------------------------------------------------------------------------------

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


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, to compare what two loaders stored."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)  # a scalar has no dimension to view as bytes
    return hashlib.sha256(head + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


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
        column = stage.column(name)
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
            raise GlmppError(f"{stage}: {name!r}: {error}") from None
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
