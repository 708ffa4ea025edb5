"""The tensors that a dry run hands over: all of the checkpoint's, without their data, in the place of files."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from math import prod

import torch

from glmpp.formats.tensor import TensorSpec


class DummyWeights:
    """A checkpoint's tensors by name, dtype and shape.

    Attributes:
        specs: name, torch's dtype and shape, in the order in which they are handed over.
        nbytes: tensor -> bytes.
    """

    def __init__(self, tensors: list[tuple[str, str, list[int]]]):
        """Args: tensors: name, safetensors dtype and stored shape of each."""
        self.specs = [(name, *TensorSpec(name, dtype, tuple(shape)).in_torch) for name, dtype, shape in tensors]
        self.nbytes = {name: dtype.itemsize * prod(shape) for name, dtype, shape in self.specs}

    def become(self, other: DummyWeights) -> None:
        """Take another's tensors, for all who hold this one or its sizes."""
        self.specs = other.specs
        self.nbytes.clear()
        self.nbytes.update(other.nbytes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, _, shape in self.specs}

    def hand_over(self, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, on the meta device, or with ones for data on the CPU.

        They are made by the thousand, past the recorder and the device context, which each would cost ten times as much.
        """
        for start in range(0, len(self.specs), 1000):
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                some = self.specs[start : start + 1000]
                made = deque((name, _empty(dtype, shape, device)) for name, dtype, shape in some)
            while made:
                yield made.popleft()


def _empty(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    ones = torch.ones((), dtype=torch.float32, device="cpu")
    packed = dtype is getattr(torch, "float4_e2m1fn_x2", None)  # torch has no conversion to it
    return (ones.to(torch.uint8).view(dtype) if packed else ones.to(dtype)).expand(shape)


def answer_for_headers(tensors: list[tuple[str, str, list[int]]]) -> None:
    """Let vLLM find a checkpoint's names and dtypes where it would read them from the headers of files that are not here.

    It asks for them when a config leaves the dtype open, and for the layers that GPTQ and AWQ have left alone.
    """
    headers = {name: {"dtype": dtype, "shape": shape} for name, dtype, shape in tensors}
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and hasattr(module, "get_safetensors_params_metadata"):
            module.get_safetensors_params_metadata = lambda *args, **kwargs: headers
