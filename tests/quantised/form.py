"""What is said of a way of quantising: the tensors and the config that its tool writes, and where vLLM refuses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import CANNOT_BUILD
from quantised.models import Model

VLLM = vllm_version()
OLD, NEW = ("0.22.1", "0.23.0"), ("0.33.0",)  # what is expected was seen on these releases, and read in their code

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> dtype, shape


@dataclass(frozen=True)
class Format:
    """A way of quantising, as it is published.

    Attributes:
        method: what vLLM calls the method that reads it, in QUANTIZATION_METHODS.
        source: what the names, shapes and the config were taken from.
        linear: the tensors of a linear layer [out, in].
        config: `quantization_config`, of the model at hand.
        cache: tensors of an attention module, for the scales of its KV cache.
        keeps: whether a linear layer of this name stays in BF16, besides router and lm_head.
        models: of MODELS.
    """

    method: str
    source: str
    linear: Callable[[int, int], Tensors]
    config: Callable[[Model], dict]
    cache: Tensors = field(default_factory=dict)
    keeps: Callable[[str], bool] = lambda name: False
    models: tuple[str, ...] = ("dense", "moe")


@dataclass(frozen=True)
class Refusal:
    """Cases that do not load, and what vLLM says: a part of "exception: message". Empty fields mean all."""

    words: str
    forms: tuple[str, ...]
    models: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    verdict: str = CANNOT_BUILD

    def covers(self, form: str, model: str, gpu: str) -> bool:
        asked = ((form, self.forms), (model, self.models), (gpu, self.gpus), (VLLM, self.releases))
        return all(value in values or not values for value, values in asked)


def grid(out: int, size: int, rows: int, columns: int) -> tuple[int, int]:
    return math.ceil(out / rows), math.ceil(size / columns)


def kept(model: Model) -> list[str]:
    return list(model.kept)
