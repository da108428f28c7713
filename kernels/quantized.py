"""The contract of quantised linear layers: a part of `interface.Kernels` that a back end may be without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class PackedWeight(NamedTuple):
    """A weight matrix in a back end's own layout. data: uint8, opaque; may be stored, and mapped read-only."""

    data: Tensor
    outputs: int
    inputs: int
    format: int
    """The back end's own number for what the codes are."""
    bits: int
    """Of a code: 4 or 8."""


class QuantizedLinears(Protocol):
    """Products with weights of 4 or 8 bits, summed in fp32. Activations are as they are, or, on a CPU, rounded to 15 bits per
    row and group of 32."""

    layout: str
    """Names the layout of `PackedWeight.data`: what was packed under the same name may be used."""

    def pack(self, bits: int, codes: Tensor, scales: Tensor, mins: Tensor | None) -> PackedWeight:
        """Lay a matrix out.

        codes: [out, in], uint8 below 16 (bits = 4) or int8 (bits = 8); scales, mins: [out, in / 32], fp16-exact;
        weight = scale * code + min, or without mins scale * code (8 bits) or scale * (code - 8) (4 bits).
        """
        ...

    def linear(self, packed: PackedWeight, bias: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """f(x [rows, in], out [rows, out]) -> out. bias: [out]. x and out in the model's dtype, or out in fp32. A row's
        result does not depend on the other rows. Raises ValueError if `packed` does not have the bytes that it says."""
        ...
