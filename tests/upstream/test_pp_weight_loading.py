# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage loads the fused FP8 indexer projection of its own layers only.

Every pipeline stage iterates the whole checkpoint; the layers of other stages are
``PPMissingLayer`` placeholders without parameters. The indexer's ``wk`` arrives as
an FP8 ``weight`` and a ``weight_scale_inv``. ``_try_load_fp8_indexer_wk`` buffers
one until the other has arrived, dequantizes to BF16 and stores into shard 0 of
``wk_weights_proj``. It runs before the branches that ask
``is_pp_missing_parameter``, so it has to ask for itself:

* or else the pair of a missing layer ends in
  ``KeyError: 'layers.0.self_attn.indexer.wk_weights_proj.weight'``;
* before it buffers, or else a stage holds halves that it never stores;
* by prefixes that end in a dot, since ``layers.1`` is a prefix of ``layers.11``.

Real: ``load_weights``, the layer split, the placeholders, the weight loader of the
fused parameter. Stubs, on the CPU: the modules around it and the process groups.
"""

import contextlib
import functools
import gc
import importlib
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models import utils
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

NUM_LAYERS = 12  # so that there is a layer 11 beside layer 1
MTP_LAYER = NUM_LAYERS
BLOCK = 8  # 128 in the published checkpoints; loaders derive it from the shapes
HEAD_DIM, HIDDEN = 2 * BLOCK, 3 * BLOCK  # the rows and columns of wk: 2 x 3 scales
N_HEADS = 4

NORM = "input_layernorm.weight"
WK = "self_attn.indexer.wk.weight"
SCALE = "self_attn.indexer.wk.weight_scale_inv"
WEIGHTS_PROJ = "self_attn.indexer.weights_proj.weight"
FUSED = "self_attn.indexer.wk_weights_proj.weight"

# Attributes, beside the layers, that load_weights of one release or another reads.
ATTRIBUTES = {
    "config": SimpleNamespace(
        num_hidden_layers=NUM_LAYERS,
        num_nextn_predict_layers=1,
        n_routed_experts=0,
        n_shared_experts=0,
    ),
    "num_redundant_experts": 0,
    "use_mha": False,
    "is_fused_shared_expert_enabled": False,
}

# The layers of each stage, as in VLLM_PP_LAYER_PARTITION, and the rank of a stage.
SPLITS = [(12,), (6, 6), (4, 4, 4), (3, 3, 3, 3)]
STAGES = [(split, rank) for split in SPLITS for rank in range(len(split))]
STAGE_IDS = [f"PP{len(split)}-rank{rank}" for split, rank in STAGES]

# Orders of arrival, as sort keys; the sort is stable.
ORDERS = {
    "weight_before_scale": lambda layer, name: layer,
    "scale_before_weight": lambda layer, name: (layer, name != SCALE),
    "weights_proj_first": lambda layer, name: (layer, name != WEIGHTS_PROJ),
    "layers_reversed": lambda layer, name: -layer,
    "scale_after_next_layer": lambda layer, name: layer + 1.5 * (name == SCALE),
    "scales_after_all_layers": lambda layer, name: name == SCALE,
    "scales_before_all_layers": lambda layer, name: name != SCALE,
    "shuffled": lambda layer, name: random.Random(f"{layer} {name}").random(),
}


def _v32(module: str, name: str) -> list:
    """Later releases have a model for each vendor, with a load_weights of its own."""
    found = []
    for vendor in ("nvidia", "amd"):
        with contextlib.suppress(ImportError):
            path = f"vllm.models.deepseek_v32.{vendor}.{module}"
            cls = getattr(importlib.import_module(path), name)
            found.append(pytest.param(cls, id=f"{name}-{vendor}"))
    return found


CAUSAL_LMS = [DeepseekV2ForCausalLM, *_v32("model", "DeepseekV32ForCausalLM")]
MTPS = [DeepSeekMTP, *_v32("mtp", "DeepseekV32MTP")]


@functools.cache
def _checkpoint(fp8: bool = True) -> dict[tuple[int, str], torch.Tensor]:
    """All layers and the MTP layer; without `fp8` the same values, dequantized."""
    generator = torch.Generator().manual_seed(0)
    blocks = (HEAD_DIM // BLOCK, HIDDEN // BLOCK)
    tensors = {}
    for layer in range(NUM_LAYERS + 1):
        codes = torch.randint(256, (HEAD_DIM, HIDDEN), generator=generator)
        codes[codes & 0x7F == 0x7F] = 0  # no NaN
        norm = torch.randn(HIDDEN, generator=generator)
        weights_proj = torch.randn(N_HEADS, HIDDEN, generator=generator)
        tensors[layer, NORM] = norm.to(torch.bfloat16)
        tensors[layer, WK] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        tensors[layer, SCALE] = torch.rand(blocks, generator=generator)
        tensors[layer, WEIGHTS_PROJ] = weights_proj.to(torch.bfloat16)
        if not fp8:
            scale = tensors.pop((layer, SCALE))
            tensors[layer, WK] = _dequantize(tensors[layer, WK], scale)
    return tensors


def _dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """From first principles: value of the code times scale of its block, in FP32."""
    values = torch.tensor([_e4m3(code) for code in range(256)], dtype=torch.float32)
    product = values[weight.view(torch.uint8).long()]
    for row in range(0, HEAD_DIM, BLOCK):
        for column in range(0, HIDDEN, BLOCK):
            block = product[row : row + BLOCK, column : column + BLOCK]
            block *= scale[row // BLOCK, column // BLOCK]
    return product.to(torch.bfloat16)


def _e4m3(code: int) -> float:
    """1 bit of sign, 4 of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 0xF, code & 7
    significand = mantissa + (8 if exponent else 0)  # exponent 0: subnormal
    return (-1.0) ** sign * significand * 2.0 ** (max(exponent, 1) - 10)


def _expected(prefixes: dict[int, str]) -> dict[str, torch.Tensor]:
    """The parameters of the layers that are called `prefixes` in the model."""
    tensors, expected = _checkpoint(), {}
    for layer, prefix in prefixes.items():
        wk = _dequantize(tensors[layer, WK], tensors[layer, SCALE])
        expected[prefix + NORM] = tensors[layer, NORM]
        expected[prefix + FUSED] = torch.cat([wk, tensors[layer, WEIGHTS_PROJ]])
    return expected


class Arrivals:
    """Fresh tensors, as from a reader of shard files; knows which ones still live."""

    def __init__(self, order: str, own: set[int], fp8: bool) -> None:
        self.tensors, self.own = _checkpoint(fp8), own
        self.keys = sorted(self.tensors, key=lambda key: ORDERS[order](*key))
        self.foreign: dict[tuple[int, str], weakref.ref] = {}
        self.most_halves_alive = 0

    def __iter__(self):
        for layer, name in self.keys:
            fresh = [self.tensors[layer, name].clone()]
            if layer not in self.own:
                self.foreign[layer, name] = weakref.ref(fresh[0])
            # pop: a variable here would keep the tensor alive while this waits.
            yield f"model.layers.{layer}.{name}", fresh.pop()
            halves = [key for key in self.foreign_alive() if key[1] in (WK, SCALE)]
            self.most_halves_alive = max(self.most_halves_alive, len(halves))

    def foreign_alive(self) -> list[tuple[int, str]]:
        return [key for key, ref in self.foreign.items() if ref() is not None]


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    # vLLM caches missing layers by id(model); a later model can have the same id.
    getattr(utils, "_model_to_pp_missing_layer_names", {}).clear()
    # A parameter asks for its rank when it is made, with disable_tp as well.
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", group)
    with torch.device("cpu"):
        yield


def _bare(cls: type[nn.Module], **attributes) -> nn.Module:
    """A real class with its methods, without its __init__, which asks for a GPU."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _decoder_layer(prefix: str = "") -> nn.Module:
    fused = MergedColumnParallelLinear(
        HIDDEN,
        [HEAD_DIM, N_HEADS],
        bias=False,
        params_dtype=torch.bfloat16,
        disable_tp=True,
    )
    indexer = _bare(nn.Module, wk_weights_proj=fused)
    norm = nn.RMSNorm(HIDDEN, dtype=torch.bfloat16)
    self_attn = _bare(nn.Module, indexer=indexer)
    return _bare(nn.Module, input_layernorm=norm, self_attn=self_attn)


@pytest.fixture
def load_stage(monkeypatch):
    def load(causal_lm, split, rank, order, fp8=True):
        group = SimpleNamespace(rank_in_group=rank, world_size=len(split))
        monkeypatch.setattr(parallel_state, "_PP", group)
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
        _, _, layers = utils.make_layers(NUM_LAYERS, _decoder_layer, "model.layers")
        model = _bare(causal_lm.model_cls, layers=layers, **ATTRIBUTES)
        own = range(sum(split[:rank]), sum(split[: rank + 1]))
        prefixes = {layer: f"model.layers.{layer}." for layer in own}
        _load_and_check(_bare(causal_lm, model=model), prefixes, order, fp8)

    return load


def _load_and_check(model, prefixes: dict[int, str], order: str, fp8: bool) -> None:
    expected = _expected(prefixes)
    parameters = {name: p.data for name, p in model.named_parameters()}
    assert parameters.keys() == expected.keys()
    for parameter in parameters.values():
        parameter.fill_(float("nan"))  # expected nowhere
    arrivals = Arrivals(order, set(prefixes), fp8)

    loaded = model.load_weights(arrivals)

    def bits(tensor: torch.Tensor) -> list[int]:
        return tensor.view(torch.int16).tolist()

    wrong = [n for n in expected if bits(parameters[n]) != bits(expected[n])]
    assert wrong == []
    # Not more: names of missing layers are returned as well, by the other branches.
    assert {prefix + FUSED for prefix in prefixes.values()} <= loaded
    # What the loop has in hand when it asks for the next; a buffer holds far more.
    assert arrivals.most_halves_alive <= 2
    if arrivals.foreign_alive():
        gc.collect()
    assert arrivals.foreign_alive() == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("split", "rank"), STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("causal_lm", CAUSAL_LMS)
def test_stage_loads_its_own_fp8_indexers(causal_lm, split, rank, order, load_stage):
    load_stage(causal_lm, split, rank, order)


@pytest.mark.parametrize(("split", "rank"), STAGES, ids=STAGE_IDS)
@pytest.mark.parametrize("causal_lm", CAUSAL_LMS)
def test_stage_loads_its_own_bf16_indexers(causal_lm, split, rank, load_stage):
    """The control: the same stages and values where the helper has no part in it."""
    load_stage(causal_lm, split, rank, "weight_before_scale", fp8=False)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("causal_lm", CAUSAL_LMS)
def test_layer_1_is_not_taken_for_layer_11(causal_lm, rank, load_stage):
    """Rank 0 owns layer 1 and misses layer 11, rank 1 the reverse."""
    load_stage(causal_lm, (2, 10), rank, "shuffled")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mtp", MTPS)
def test_mtp_loads_its_own_fp8_indexer(mtp, order):
    """The draft model has no placeholders, but it calls the same helper."""
    layer = _bare(nn.Module, mtp_block=_decoder_layer())
    layers = nn.ModuleDict({str(MTP_LAYER): layer})
    place = {"mtp_start_layer_idx": MTP_LAYER, "num_mtp_layers": 1}
    model = _bare(mtp, model=_bare(nn.Module, layers=layers, **place), **ATTRIBUTES)
    prefixes = {MTP_LAYER: f"model.layers.{MTP_LAYER}.mtp_block."}
    _load_and_check(model, prefixes, order, fp8=True)
