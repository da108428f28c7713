"""The back end's side of `interface.QuantizedLinears`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from kvloom.kernels.interface import PackedWeight

from .build import SOURCES

if TYPE_CHECKING:
    from .backend import NativeKernels


@functools.cache
def _layout() -> str:
    """Changes with the sources that lay weights out; the layout is the same on every machine."""
    sources = (SOURCES / "quant.h", SOURCES / "linear.cpp")
    return "native " + hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class NativeQuantized:
    """Packs codes for the library's integer dot products."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self.layout = _layout()

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
