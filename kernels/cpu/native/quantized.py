"""The back end's side of `interface.QuantizedLinears`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from kvloom.kernels.quantized import PackedWeight

if TYPE_CHECKING:
    from .backend import NativeKernels


LAYOUT = "native 1"
"""Of packed weights, as csrc/quant.h describes it; the same on every machine. Another one needs another name: a test holds this
one to the bytes that it stands for."""


class NativeQuantized:
    """Packs codes for the library's integer dot products."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self.layout = LAYOUT

    def pack(self, bits: int, codes: Tensor, scales: Tensor, mins: Tensor | None) -> PackedWeight:
        """See the contract."""
        from .linear import pack_int4, pack_int8

        if bits not in (4, 8):
            raise ValueError(f"bits is {bits}; allowed: 4, 8")
        if bits == 8 and mins is not None:
            raise ValueError("8-bit codes with mins are not supported; fold the mins into signed codes")
        kernels = self._kernels
        return pack_int4(kernels, codes, scales, mins) if bits == 4 else pack_int8(kernels, codes, scales)

    def linear(self, packed: PackedWeight, bias: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """See the contract."""
        from .linear import QuantLinear

        return QuantLinear(self._kernels, packed, bias)
