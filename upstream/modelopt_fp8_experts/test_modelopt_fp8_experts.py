# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Experts in an FP8 algorithm of ModelOpt that their method does not have are refused, or get another.

``ModelOptFp8MoEMethod`` holds one scale for each matrix of an expert. A scale for each
channel (``FP8_PER_CHANNEL_PER_TOKEN``) or block (``FP8_PB_WO``) is none, and loading
ends in ``RuntimeError: shape '[]' is invalid for input of size 512``.

Real: the config and its choice of a method. Stub: the method, which asks for a GPU.
"""

import contextlib

import pytest
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config


class Experts(RoutedExperts):
    def __init__(self):
        nn.Module.__init__(self)
        self.moe_config = None


@pytest.fixture
def gets_one_scale(monkeypatch):
    """Whether the experts of an algorithm get the method with one scale for each matrix."""

    def ask(algo):
        taken = []
        method = staticmethod(lambda **arguments: taken.append(arguments))
        monkeypatch.setattr(ModelOptFp8Config, "FusedMoEMethodCls", method)
        config = ModelOptFp8Config(algo, True, None, [])
        with contextlib.suppress(ValueError, NotImplementedError):  # to refuse is right
            config.get_quant_method(Experts(), "model.layers.0.mlp.experts")
        return len(taken) == 1

    return ask


@pytest.mark.parametrize("algo", ["FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"])
def test_more_scales_do_not_get_the_method_with_one(algo, gets_one_scale):
    assert not gets_one_scale(algo)


def test_one_scale_gets_it(gets_one_scale):
    """The control."""
    assert gets_one_scale("FP8")
