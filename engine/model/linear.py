"""Linear layers: y = x W^T + b over weights held in the way that `mode` names.

Owns what a projection is made from (`LinearWeight`: one or several stacked checkpoint matrices, read when asked for) and the
choice of implementation (`make_linear`). The decoder knows only the protocol `Linear`.

    bf16   the weights in the model's dtype; in bf16 packed by oneDNN where it can
    int8   codes of at most 8 bits: the file's, or rounded to a scale per 32 inputs (GGUF's Q8_0)
    int4   codes of 4 bits: the file's, or rounded to a scale and a minimum per 32 inputs (GGUF's Q4_1)
    auto   the codes that a GGUF stores, untouched; int8 for what it does not store as such; fp32 models stay fp32

A GGUF's own codes cost nothing beyond the file; rounding a finer checkpoint costs quality: see `docs/bench-weights.md`.
Quantised layers need a back end that can (`Kernels.quantized`), and multiplies the kind; the native one takes Q4_0, Q4_1, Q5_0,
Q5_1, Q8_0, Q4_K, Q5_K and Q6_K, and rounds activations to 8 bits, per row and group of 32.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from kvloom.engine.config import WeightMode
from kvloom.engine.device import CPU
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.packed_cache import PackedCache
from kvloom.engine.model.quantized import (
    GROUP,
    DenseEmbedding,
    PackedEmbedding,
    QuantizedLinear,
    StackedLinear,
    round_to_int4,
    round_to_int8,
)
from kvloom.engine.model.weights import EMBEDDING, WeightSource
from kvloom.kernels.interface import Kernels
from kvloom.kernels.quantized import KINDS, PackedWeight, QuantizedLinears, StoredWeight


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

    def kind(self) -> str | None:
        """How all of it is stored; None if its parts differ."""
        kinds = {self.source.kind(name) for name in self.names}
        return kinds.pop() if len(kinds) == 1 else None

    def runs(self) -> list[LinearWeight]:
        """Neighbouring parts of one kind, so that each run can be taken as it is stored; itself alone where rows of one would
        lie among those of another."""
        runs, begin = list[LinearWeight](), 0
        for _, grouped in itertools.groupby(self.names, self.source.kind):
            names = tuple(grouped)
            end = begin + sum(self.source.shape(name)[0] for name in names)
            rows = None if self._rows is None else self._rows[begin:end] - begin
            if rows is not None and (int(rows.min()) < 0 or int(rows.max()) >= end - begin):
                return [self]
            runs.append(LinearWeight(self.source, names, rows=rows, columns=self._columns, sensitive=self.sensitive))
            begin = end
        return runs if len(runs) > 1 else [self]

    def stored(self) -> StoredWeight | None:
        """The rows as stored, if all parts are stored in one kind, and no column leaves its block."""
        parts = [part for name in self.names if (part := self.source.quantized(name)) is not None]
        if len(parts) < len(self.names) or self.kind() is None:
            return None
        kind, blocks = parts[0].kind, parts[0].blocks if len(parts) == 1 else torch.cat([part.blocks for part in parts])
        if self._rows is not None:
            blocks = blocks[self._rows]
        if self._columns is not None:
            values = KINDS[kind].values
            columns = self._columns.view(-1, values)
            order = columns[:, 0] // values
            if not torch.equal(columns, order[:, None] * values + torch.arange(values)):
                return None
            blocks = blocks.view(self.shape[0], len(order), -1)[:, order].flatten(1)
        return StoredWeight(kind, blocks, self.shape)


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
    runs, quantized = weight.runs(), kernels.quantized
    packed = [_packed(run, mode, quantized, cache) for run in runs]
    biases = [None] * len(runs) if bias is None else bias.split([each.outputs for each in packed])
    made = [QuantizedLinear(quantized, each, of) for each, of in zip(packed, biases)]
    return made[0] if len(made) == 1 else StackedLinear(made)


def make_embedding(
    weight: LinearWeight,
    mode: WeightMode,
    dtype: torch.dtype,
    kernels: Kernels,
    cache: PackedCache | None = None,
    device: torch.device = CPU,
) -> DenseEmbedding | PackedEmbedding:
    """The embedding table: the file's codes where layers hold codes and the back end reads rows of them, else in `dtype`."""
    quantized = kernels.quantized
    reads = quantized is not None and quantizes(mode, dtype, kernels) and weight.kind() in quantized.kinds
    if reads and quantized is not None and quantized.rows is not None:
        packed = _packed(weight, "auto", quantized, cache)
        return PackedEmbedding(packed, quantized.rows(packed))
    found = None if cache is None else cache.tensor(EMBEDDING)
    if found is None:
        found = weight.dense(dtype)
        if cache is not None:
            cache.keep(EMBEDDING, found)
    return DenseEmbedding(found.to(device))


def _packed(weight: LinearWeight, mode: WeightMode, quantized: QuantizedLinears, cache: PackedCache | None) -> PackedWeight:
    name = " ".join(weight.names)
    if cache is not None and (found := cache.matrix(name)) is not None:
        return found
    packed = quantized.pack(_codes(weight, mode, quantized))
    if cache is not None:
        cache.keep(name, packed)
    return packed


def _codes(weight: LinearWeight, mode: WeightMode, quantized: QuantizedLinears) -> StoredWeight:
    """Stored codes as they are, unless they have more bits than asked for; else the dense matrix, rounded."""
    most, kind = 4 if mode == "int4" and not weight.sensitive else 8, weight.kind()
    if kind in quantized.kinds and KINDS[kind].bits <= most and (stored := weight.stored()) is not None:
        return stored
    return (round_to_int4 if most == 4 else round_to_int8)(weight.dense(torch.float32))


def _dense(weight: LinearWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    dense = weight.dense(dtype).to(device)
    packs = device.type == "cpu" and dtype == torch.bfloat16 and PackedLinear.works()
    return PackedLinear(dense, bias) if packs else DenseLinear(dense, bias)
