"""Linear layers: y = x W^T + b over weights held in the way that `mode` names.

Owns what a projection is made from (`LinearWeight`: one or several stacked checkpoint matrices, read when asked for) and the
choice of implementation (`make_linear`). The decoder knows only the protocol `Linear`.

    bf16   the weights in the model's dtype; in bf16 packed by oneDNN where it can
    int8   codes of 8 bits with a scale per 32 inputs (GGUF's Q8_0)
    int4   codes of 4 bits with a scale and a minimum per 32 inputs (GGUF's Q4_1, or Q4_0)
    auto   the codes that a GGUF stores, untouched; int8 for what it does not store as such; fp32 models stay fp32

A GGUF's own codes cost nothing beyond the file; rounding a finer checkpoint costs quality: see `docs/bench-weights.md`.
Quantised layers need a back end that can (`Kernels.quantized`); the native one rounds activations to 15 bits, per row and group
of 32.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvloom.engine.config import WeightMode
from kvloom.engine.device import CPU
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.packed_cache import PackedCache
from kvloom.engine.model.quantized import GROUP, Codes, QuantizedLinear, round_to_int4, round_to_int8, unpack
from kvloom.engine.model.weights import QuantizedRows, WeightSource
from kvloom.kernels.interface import Kernels
from kvloom.kernels.quantized import PackedWeight, QuantizedLinears


class Linear(Protocol):
    """A projection. `in_features`, `out_features`: columns of x and of the result."""

    in_features: int
    out_features: int
    nbytes: int
    """Bytes of weights that one call reads."""
    form: str
    """How they are held: int4, int8, or a dtype."""
    capturable: bool
    """Whether a call is one of the back end's own, so that a graph can hold it."""

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

    def __init__(
        self,
        source: WeightSource,
        names: tuple[str, ...],
        made: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        sensitive: bool = False,
    ) -> None:
        """rows, columns: permutations of the stacked matrix, int64; None leaves it as it is.
        sensitive: rounded to 8 bits at the least (the head: its error goes straight into the logits)."""
        self.source, self.names, self._made, self.sensitive = source, names, made, sensitive
        self._rows, self._columns = rows, columns
        self.rows = tuple(source.shape(name)[0] for name in names)
        self.shape = (sum(self.rows), source.shape(names[0])[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, contiguous."""
        if self._made is not None and self._made.dtype == dtype:
            return self._made
        weight = torch.empty(self.shape, dtype=dtype)
        for name, part in zip(self.names, weight.split(self.rows)):
            self.source.read_into(name, part)
        weight = weight if self._rows is None else weight[self._rows]
        return weight if self._columns is None else weight[:, self._columns]

    def quantized(self) -> QuantizedRows | None:
        """The rows as stored, if all parts are stored in the same kind, and no column leaves its group of 32."""
        parts = [part for name in self.names if (part := self.source.quantized(name)) is not None]
        if len(parts) < len(self.names) or len({part.kind for part in parts}) > 1:
            return None
        blocks = parts[0].blocks if len(parts) == 1 else torch.cat([part.blocks for part in parts])
        if self._rows is not None:
            blocks = blocks[self._rows]
        if self._columns is not None:
            columns = self._columns.view(-1, GROUP)
            groups = columns[:, 0] // GROUP
            if not torch.equal(columns, groups[:, None] * GROUP + torch.arange(GROUP)):
                return None
            blocks = blocks.view(self.shape[0], self.shape[1] // GROUP, -1)[:, groups].flatten(1)
        return QuantizedRows(parts[0].kind, blocks, self.shape)


class DenseLinear:
    """`Linear` on a plain matrix. weight: [out, in]; bias: [out] in the same dtype, or None."""

    capturable = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.nbytes, self.form = weight.nbytes, str(weight.dtype).removeprefix("torch.")

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None or out.dtype != x.dtype:
            y = torch.nn.functional.linear(x, self.weight, self.bias)
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class PackedLinear:
    """`Linear` in bf16 on a matrix that oneDNN has laid out for its own kernels: about twice as fast at few rows."""

    capturable = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in] bf16, not kept."""
        self.out_features, self.in_features = weight.shape
        self.nbytes, self.form = weight.nbytes, "bfloat16"
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    @staticmethod
    def works() -> bool:
        """Whether this build of torch packs bf16 on this processor."""
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y if out is None or out.dtype == y.dtype else out.copy_(y)


def quantizes(mode: WeightMode, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Whether linear layers of that mode hold codes."""
    return mode != "bf16" and not (mode == "auto" and (kernels.quantized is None or dtype == torch.float32))


def make_linear(
    weight: LinearWeight,
    bias: Tensor | None,
    mode: WeightMode,
    dtype: torch.dtype,
    kernels: Kernels,
    cache: PackedCache | None = None,
    device: torch.device = CPU,
) -> Linear:
    """The projection in the given mode; bias: [out] in `dtype`, on the device; cache: where its packed form may be, and goes if
    it is not; device: where the projection is computed.

    Raises ConfigError for a mode that is not available.
    """
    if not quantizes(mode, dtype, kernels) or weight.shape[1] % GROUP:
        return _dense(weight, bias, dtype, device)
    if kernels.quantized is None:
        raise ConfigError(
            f"weights={mode} needs a back end that multiplies codes (native, triton), but {kernels.name} runs here; use "
            "weights=bf16 or auto"
        )
    return QuantizedLinear(kernels.quantized, _packed(weight, mode, kernels.quantized, cache), bias)


def _packed(weight: LinearWeight, mode: WeightMode, quantized: QuantizedLinears, cache: PackedCache | None) -> PackedWeight:
    name = " ".join(weight.names)
    if cache is not None and (found := cache.matrix(name)) is not None:
        return found
    codes = _codes(weight, mode)
    packed = quantized.pack(codes.bits, codes.codes, codes.scales, codes.mins)
    if cache is not None:
        cache.keep(name, packed)
    return packed


def _codes(weight: LinearWeight, mode: WeightMode) -> Codes:
    """Stored codes as they are, unless they have more bits than asked for; else the dense matrix, rounded."""
    rows = weight.quantized()
    stored = None if rows is None else unpack(rows)
    if stored is not None and (mode == "auto" or stored.bits <= (8 if mode == "int8" or weight.sensitive else 4)):
        return stored
    dense = weight.dense(torch.float32)
    return round_to_int4(dense) if mode == "int4" and not weight.sensitive else round_to_int8(dense)


def _dense(weight: LinearWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    dense = weight.dense(dtype).to(device)
    packs = device.type == "cpu" and dtype == torch.bfloat16 and PackedLinear.works()
    return PackedLinear(dense, bias) if packs else DenseLinear(dense, bias)
