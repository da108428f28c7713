"""Quantised linear layers and embeddings: a GGUF's blocks as they are, or blocks that a finer matrix is rounded to.

The back end lays blocks out in its own way and multiplies; see `kernels.quantized`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.kernels.quantized import KINDS, Multiply, PackedWeight, QuantizedLinears, StoredWeight

GROUP = 32
"""Inputs that share a scale in what is rounded here."""


def dense(stored: StoredWeight) -> Tensor:
    """The values, [out, in] fp32."""
    from gguf.constants import GGMLQuantizationType

    from kvloom.engine.model.dequantize import dequantize

    return dequantize(stored.blocks, GGMLQuantizationType[stored.kind], torch.empty(stored.shape))


def round_to_int8(weight: Tensor) -> StoredWeight:
    """Round to nearest as GGUF's Q8_0. weight: [out, in]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = (groups / _nonzero(scales)).round_().clamp_(-127, 127).to(torch.int8)
    return _blocks("Q8_0", weight, scales, codes)


def round_to_int4(weight: Tensor) -> StoredWeight:
    """Round to nearest between each group's extremes, as GGUF's Q4_1. weight: [out, in]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    mins = groups.amin(-1, keepdim=True).half()
    scales = ((groups.amax(-1, keepdim=True) - mins.float()) / 15).half()
    codes = ((groups - mins.float()) / _nonzero(scales)).round_().clamp_(0, 15).to(torch.uint8)
    low, high = codes.split(GROUP // 2, -1)
    return _blocks("Q4_1", weight, scales, mins, low | high << 4)


def _blocks(kind: str, weight: Tensor, *parts: Tensor) -> StoredWeight:
    """parts: [out, groups, ...] of each block, in order."""
    blocks = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1).flatten(1)
    return StoredWeight(kind, blocks, (weight.shape[0], weight.shape[1]))


def _nonzero(scales: Tensor) -> Tensor:
    """A group of equal values has scale 0: any divisor gives codes that do not matter."""
    return torch.where(scales == 0, 1.0, scales.float())


class QuantizedLinear:
    """`Linear` on packed codes, multiplied by a back end (`kernels.quantized`)."""

    capturable = True

    def __init__(self, quantized: QuantizedLinears, packed: PackedWeight, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features, self.nbytes = packed.outputs, packed.inputs, packed.data.nbytes
        self.kind, self.form = packed.kind, f"int{KINDS[packed.kind].bits}"
        self._multiply: Multiply = quantized.linear(packed, bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], self.out_features)
        return self._multiply(x, out)


class StackedLinear:
    """`Linear` of several with the same inputs, their outputs beside each other: parts that are stored in different kinds."""

    capturable = True

    def __init__(self, parts: Sequence[QuantizedLinear]) -> None:
        self.parts, self.in_features = parts, parts[0].in_features
        self._widths = [part.out_features for part in parts]
        self.out_features, self.nbytes = sum(self._widths), sum(part.nbytes for part in parts)
        self.form = " and ".join(sorted({part.form for part in parts}))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], self.out_features)
        for part, columns in zip(self.parts, out.split(self._widths, 1)):
            part(x, columns)
        return out


class DenseEmbedding:
    """Rows of a plain matrix: [vocab, hidden] in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.device = weight, weight.device

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """tokens: [rows] int64; out: [rows, hidden] fp32, written and returned."""
        if self.weight.dtype == out.dtype:
            return torch.index_select(self.weight, 0, tokens, out=out)
        return out.copy_(torch.index_select(self.weight, 0, tokens))


class PackedEmbedding:
    """Rows of packed codes: the numbers of the dense matrix, in the bytes of the file; a tied head multiplies the same ones."""

    def __init__(self, packed: PackedWeight, rows: Multiply) -> None:
        self.packed, self.device, self._rows = packed, packed.data.device, rows

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """tokens: [rows] int64; out: [rows, hidden] fp32, written and returned."""
        return self._rows(tokens, out)
