# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Experts in W4A16 with a scale for each channel get a kernel that has such scales.

``CompressedTensorsWNA16MoEMethod`` asserts that all kernels but Marlin are given
groups, and ``select_wna16_moe_backend``, which chooses before, does not ask. Where
Humming comes first, as on SM 9.0, per-channel experts end in an ``AssertionError``
without a message, although Marlin, the next in line, would take them.

Real: the method's ``__init__`` and the choice. Stubs, on the CPU: the order of
preference and what the kernels say of the device.
"""

from types import SimpleNamespace

import pytest
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)

HUMMING, MARLIN = WNA16MoEBackend.HUMMING, WNA16MoEBackend.MARLIN
CHANNEL = QuantizationArgs(num_bits=4, type="int", strategy="channel")
GROUP = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)


@pytest.fixture
def build(monkeypatch):
    """The method of experts, where the kernels come in an order of preference."""

    def backend(weights, order, asked="auto"):
        monkeypatch.setattr(int_wna16, "_get_priority_backends", lambda: order)
        parallel = SimpleNamespace(use_batched_activation_format=False)
        config = SimpleNamespace(moe_backend=asked, moe_parallel_config=parallel)
        method = wna16.CompressedTensorsWNA16MoEMethod(weights, None, config)
        return method.wna16_backend

    class Kernel:
        @staticmethod
        def is_supported_config(*_):
            return True, None

    monkeypatch.setattr(int_wna16, "backend_to_kernel_cls", lambda backend: [Kernel])
    for module in (int_wna16, wna16):
        name = "check_moe_marlin_supports_config"
        monkeypatch.setattr(module, name, lambda *_, **__: True)
    monkeypatch.setattr(wna16, "get_marlin_input_dtype", lambda *_: None)
    return backend


@pytest.mark.parametrize("order", [[HUMMING, MARLIN], [MARLIN, HUMMING]])
def test_channels_go_to_the_kernel_that_has_them(order, build):
    assert build(CHANNEL, order) is MARLIN


@pytest.mark.parametrize("order", [[HUMMING, MARLIN], [MARLIN, HUMMING]])
def test_groups_go_to_the_first_kernel(order, build):
    """The control."""
    assert build(GROUP, order) is order[0]


def test_kernel_that_was_asked_for_is_taken(build):
    assert build(GROUP, [MARLIN, HUMMING], "humming") is HUMMING
    assert build(CHANNEL, [HUMMING, MARLIN], "marlin") is MARLIN
