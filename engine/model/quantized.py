"""Quantised linear layers: from a GGUF's stored blocks, or by rounding a finer matrix, to what a back end multiplies.

Codes are 4 or 8 bits, with one fp16 scale (and for Q4_1 one fp16 minimum) per output and group of 32 inputs. Stored codes are
taken as they are. The back end packs them and multiplies; see `kernels.interface.QuantizedLinears`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.engine.model.weights import QuantizedRows
from kvloom.kernels.quantized import PackedWeight, QuantizedLinears

GROUP = 32


class Codes(NamedTuple):
    """A matrix of codes. value = scale * code + min, or without mins scale * code (8 bits) or scale * (code - 8) (4 bits)."""

    bits: int
    codes: Tensor
    """[out, in]: uint8 below 16 for 4 bits, int8 for 8"""
    scales: Tensor
    """[out, in / 32] fp32"""
    mins: Tensor | None

    def dense(self) -> Tensor:
        """The values, [out, in] fp32."""
        offset = 8 if self.bits == 4 and self.mins is None else 0
        groups = (self.codes.to(torch.float32) - offset).unflatten(1, (-1, GROUP)) * self.scales[..., None]
        return (groups if self.mins is None else groups + self.mins[..., None]).flatten(1)


def unpack(rows: QuantizedRows) -> Codes:
    """The codes in a GGUF's blocks; see `QuantizedRows` for their layout."""
    blocks = rows.blocks.view(rows.shape[0], rows.shape[1] // GROUP, -1)

    def half(at: int) -> Tensor:
        return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float()

    if rows.kind == "Q8_0":
        return Codes(8, blocks[..., 2:].contiguous().view(torch.int8).flatten(1), half(0), None)
    first = 4 if rows.kind == "Q4_1" else 2
    packed = blocks[..., first:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)
    return Codes(4, codes, half(0), half(2) if rows.kind == "Q4_1" else None)


def round_to_int8(weight: Tensor) -> Codes:
    """Round to nearest as GGUF's Q8_0. weight: [out, in]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = (groups / _nonzero(scales)).round_().clamp_(-127, 127)
    return Codes(8, codes.to(torch.int8).flatten(1), scales.squeeze(-1), None)


def round_to_int4(weight: Tensor) -> Codes:
    """Round to nearest between each group's extremes, as GGUF's Q4_1. weight: [out, in]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    mins = groups.amin(-1, keepdim=True).half().float()
    scales = ((groups.amax(-1, keepdim=True) - mins) / 15).half().float()
    codes = ((groups - mins) / _nonzero(scales)).round_().clamp_(0, 15)
    return Codes(4, codes.to(torch.uint8).flatten(1), scales.squeeze(-1), mins.squeeze(-1))


def _nonzero(scales: Tensor) -> Tensor:
    """A group of equal values has scale 0: any divisor gives codes that do not matter."""
    return torch.where(scales == 0, 1.0, scales)


class QuantizedLinear:
    """`Linear` on packed codes, multiplied by a back end (`kernels.quantized`)."""

    capturable = True

    def __init__(self, quantized: QuantizedLinears, packed: PackedWeight, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features, self.nbytes = packed.outputs, packed.inputs, packed.data.nbytes
        self.form = f"int{packed.bits}"
        self._multiply: Callable[[Tensor, Tensor], Tensor] = quantized.linear(packed, bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], self.out_features)
        return self._multiply(x, out)
