"""The back end's side of `interface.QuantizedLinears`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvloom.kernels.quantized import KINDS, Multiply, PackedWeight, StoredWeight

if TYPE_CHECKING:
    from .backend import NativeKernels


LAYOUT = "native 2"
"""Of packed weights, as csrc/quant.h describes it; the same on every machine. Another one needs another name: a test holds this
one to the bytes that it stands for."""


class NativeQuantized:
    """Packs codes for the library's integer dot products."""

    kinds = frozenset(KINDS)

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self.layout = LAYOUT

    def pack(self, stored: StoredWeight) -> PackedWeight:
        """See the contract."""
        from .linear import pack

        return pack(self._kernels, stored)

    def linear(self, packed: PackedWeight, bias: Tensor | None) -> Multiply:
        """See the contract."""
        from .linear import QuantLinear

        return QuantLinear(self._kernels, packed, bias)

    def rows(self, packed: PackedWeight) -> Multiply:
        """See the contract."""
        from .linear import PackedRows

        return PackedRows(self._kernels, packed)
