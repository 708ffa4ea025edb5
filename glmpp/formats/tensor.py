"""One tensor of a checkpoint: its name, and what safetensors and torch call its type."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from glmpp.errors import GlmppError
from glmpp.words import quoted

if TYPE_CHECKING:  # it takes seconds, and names and sizes need none of it
    import torch

# safetensors' dtype name -> bits of an element, torch's name for it. https://github.com/huggingface/safetensors, `Dtype`
# in tensor.rs of 0.8.0.
_DTYPES = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),  # an element of torch's holds two
    "F6_E2M3": (6, "no type"),  # nor has the next one any in torch
    "F6_E3M2": (6, "no type"),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}


def bits(dtype: str) -> int | None:
    """Bits of an element of a safetensors dtype; None if there is none of that name."""
    return _DTYPES[dtype][0] if dtype in _DTYPES else None


@lru_cache(1 << 16)
def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size on disk of a tensor."""
    return math.prod(shape) * bits(dtype) // 8


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """torch's type for each safetensors dtype that the installed torch has one for."""
    import torch

    return {name: getattr(torch, kind) for name, (_, kind) in _DTYPES.items() if hasattr(torch, kind)}


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint: its name, safetensors dtype, stored shape, and the shard that holds it (None: no file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str | None = None

    @property
    def in_torch(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """torch's dtype and shape for it. Raises GlmppError if torch has no type for it."""
        kind, shape = torch_dtypes().get(self.dtype), self.shape
        if self.dtype == "F4":  # stored with a shape in elements; torch counts pairs along the last dimension
            kind = kind if shape and shape[-1] % 2 == 0 else None
            shape = (*shape[:-1], shape[-1] // 2) if kind else shape
        if kind is None:
            import torch

            raise GlmppError(
                f"{f'{self.file}: ' if self.file else ''}tensor {quoted(self.name)}: torch {torch.__version__} has no type "
                f"for {self.dtype} of shape {list(shape)}"
            )
        return kind, shape

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.in_torch[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return stored_bytes(self.dtype, self.shape)

    @property
    def is_scale(self) -> bool:
        return self.name.endswith((".weight_scale_inv", ".weight_scale"))

    def meta(self) -> torch.Tensor:
        """The tensor without its data, on the meta device."""
        import torch

        dtype, shape = self.in_torch
        return torch.empty(shape, dtype=dtype, device="meta")
