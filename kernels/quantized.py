"""The contract of quantised linear layers: a part of `interface.Kernels` that a back end may be without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Kind(NamedTuple):
    """A format of quantised weights, as GGUF files hold it (ggml's block_q*): blocks of values beside each other in a row."""

    bits: int
    """Of a code."""
    values: int
    """Of a block."""
    nbytes: int
    """Of a block."""

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` values."""
        return inputs // self.values * self.nbytes


KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 32, 18),
    "Q4_1": Kind(4, 32, 20),
    "Q5_0": Kind(5, 32, 22),
    "Q5_1": Kind(5, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q4_K": Kind(4, 256, 144),
    "Q5_K": Kind(5, 256, 176),
    "Q6_K": Kind(6, 256, 210),
}
"""What back ends may multiply as stored: `QuantizedLinears.kinds`."""


class StoredWeight(NamedTuple):
    """A matrix in blocks of a GGUF's format."""

    kind: str
    """A name of `KINDS`."""
    blocks: Tensor
    """[outputs, bytes of a row] uint8"""
    shape: tuple[int, int]
    """outputs, inputs"""


class PackedWeight(NamedTuple):
    """A weight matrix in a back end's own layout. data: uint8, opaque; may be stored, and mapped read-only."""

    data: Tensor
    outputs: int
    inputs: int
    kind: str
    """Of the codes: a name of `KINDS`."""


Multiply = Callable[[Tensor, Tensor], Tensor]
"""f(x, out) -> out."""


class QuantizedLinears(Protocol):
    """Products with quantised weights, summed in fp32. Activations are as they are, or, on a CPU, rounded to 8 bits per row and
    group of 32."""

    layout: str
    """Names the layout of `PackedWeight.data`: what was packed under the same name may be used."""
    kinds: frozenset[str]
    """What `pack` takes."""

    def pack(self, stored: StoredWeight) -> PackedWeight:
        """Lay a matrix out; no number in it changes. Raises ValueError for another kind, or blocks of another shape or dtype
        than the weight says."""
        ...

    def linear(self, packed: PackedWeight, bias: Tensor | None) -> Multiply:
        """f(x [rows, in], out [rows, out]) -> out. bias: [out]. x and out in the model's dtype, or out in fp32. A row's
        result does not depend on the other rows. Raises ValueError if `packed` does not have the bytes that it says."""
        ...

    @property
    def rows(self) -> Callable[[PackedWeight], Multiply] | None:
        """rows(packed) is f(indices [rows] int64, out [rows, in]) -> out: rows of the matrix, dequantised. Raises ValueError if
        `packed` does not have the bytes that it says. None where a back end reads no rows."""
        ...


def check_stored(stored: StoredWeight, kinds: frozenset[str]) -> None:
    """Raise ValueError for what `QuantizedLinears.pack` does not take."""
    kind, blocks, (outputs, inputs) = stored
    if kind not in kinds:
        raise ValueError(f"the kind of weights is {kind!r}; allowed: {', '.join(sorted(kinds))}")
    values, size = KINDS[kind].values, KINDS[kind].row_bytes(inputs)
    if inputs % values or blocks.dtype is not torch.uint8 or blocks.shape != (outputs, size):
        raise ValueError(
            f"{outputs} x {inputs} of {kind} (whole blocks of {values}) are uint8 [{outputs}, {size}]; got {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
