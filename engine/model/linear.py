"""Linear layers: y = x W^T + b over weights held in the way that `mode` names.

Owns what a projection is made from (`LinearWeight`: one or several stacked checkpoint matrices, read when asked for) and the
choice of implementation (`make_linear`). The decoder knows only the protocol `Linear`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvloom.engine.config import WeightMode
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.weights import QuantizedRows, WeightSource


class Linear(Protocol):
    """A projection. `in_features`, `out_features`: columns of x and of the result."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [rows, in_features] in the model's dtype. Returns [rows, out_features].

        out: written and returned; in the model's dtype, or fp32 (logits). None allocates in the model's dtype.
        """
        ...


class LinearWeight:
    """The matrices that make up one projection, stacked along their rows: q, k and v, or gate and up, or a single one.

    Nothing is read before `dense` or `quantized` is called, so that a mode reads only the form it wants, one projection at
    a time. made: the dense matrix, when the caller holds it already (tied embeddings).
    """

    def __init__(self, source: WeightSource, names: tuple[str, ...], made: Tensor | None = None) -> None:
        self.source, self.names, self._made = source, names, made
        self.rows = tuple(source.shape(name)[0] for name in names)
        self.shape = (sum(self.rows), source.shape(names[0])[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, contiguous."""
        if self._made is not None and self._made.dtype == dtype:
            return self._made
        weight = torch.empty(self.shape, dtype=dtype)
        for name, part in zip(self.names, weight.split(self.rows)):
            self.source.read_into(name, part)
        return weight

    def quantized(self) -> QuantizedRows | None:
        """The rows as stored, if all parts are stored in the same kind."""
        parts = [part for name in self.names if (part := self.source.quantized(name)) is not None]
        if len(parts) < len(self.names) or len({part.kind for part in parts}) > 1:
            return None
        return parts[0] if len(parts) == 1 else QuantizedRows(parts[0].kind, torch.cat([p.blocks for p in parts]), self.shape)


class DenseLinear:
    """`Linear` on a plain matrix. weight: [out, in]; bias: [out] in the same dtype, or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None or out.dtype != x.dtype:
            y = torch.nn.functional.linear(x, self.weight, self.bias)
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


def make_linear(weight: LinearWeight, bias: Tensor | None, mode: WeightMode, dtype: torch.dtype) -> Linear:
    """The projection in the given mode; bias: [out] in `dtype`. Raises ConfigError for a mode that is not available."""
    if mode in ("auto", "bf16"):
        return DenseLinear(weight.dense(dtype), bias)
    raise ConfigError(f"weights mode {mode!r} is not available here; allowed: auto, bf16")
