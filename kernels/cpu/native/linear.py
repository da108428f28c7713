"""Linear layers with quantised weights: packing, the layer, and rows of a packed matrix.

Weights are GGUF's blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K, laid out anew bit for bit (csrc/quant.h): no
weight is rounded, and a packed matrix takes the bytes that it takes in the file, filled up to 16 outputs. Activations are
rounded to 8 bits on the fly, one scale per row and group of 32, and multiplied with integer dot products; sums across groups
are fp32. A result therefore differs from x @ dequantised(W).T by the rounding of x: each moves by at most half its group's
scale, max|x| / 254. What that costs is in docs/bench-weights.md. A row's result does not depend on the other rows of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.kernels.quantized import KINDS, PackedWeight, StoredWeight, check_stored

from .backend import NativeKernels
from .library import DTYPES

FORMATS = {"Q4_0": 0, "Q4_1": 1, "Q5_0": 2, "Q5_1": 3, "Q8_0": 4, "Q4_K": 5, "Q5_K": 6, "Q6_K": 7}
"""csrc/quant.h: Format."""


def pack(kernels: NativeKernels, stored: StoredWeight) -> PackedWeight:
    """See `QuantizedLinears.pack`."""
    check_stored(stored, frozenset(FORMATS))
    kind, blocks, (outputs, inputs) = stored
    data = torch.empty(kernels.library.linear_bytes(inputs, outputs, FORMATS[kind]), dtype=torch.uint8)
    blocks = blocks.contiguous()
    kernels.library.linear_pack(blocks.data_ptr(), data.data_ptr(), inputs, outputs, FORMATS[kind], kernels.threads)
    return PackedWeight(data, outputs, inputs, kind)


def check(kernels: NativeKernels, packed: PackedWeight) -> None:
    """Raise ValueError if a packed weight does not have the bytes that it says."""
    fits = packed.kind in FORMATS and packed.inputs > 0 and packed.inputs % KINDS[packed.kind].values == 0
    expected = kernels.library.linear_bytes(packed.inputs, packed.outputs, FORMATS[packed.kind]) if fits else -1
    if packed.data.numel() != expected or not packed.data.is_contiguous():
        raise ValueError(
            f"packed: {packed.data.numel()} bytes; {packed.outputs} x {packed.inputs} of {packed.kind} take {expected}"
        )


class PackedRows:
    """out[i] = row indices[i] of a packed matrix, dequantised: an embedding's. Safe to call from several threads."""

    def __init__(self, kernels: NativeKernels, packed: PackedWeight) -> None:
        check(kernels, packed)
        self.packed, self._run, self._threads = packed, kernels.library.linear_rows, kernels.threads

    def __call__(self, indices: Tensor, out: Tensor) -> Tensor:
        """indices: [rows] int64, of which those outside [0, outputs) give zeros; out: [rows, inputs], last stride 1."""
        packed = self.packed
        if indices.dtype != torch.int64 or indices.stride() != (1,) or out.shape != (len(indices), packed.inputs):
            raise ValueError(f"indices must be int64 [rows] and out [rows, {packed.inputs}]; got {indices}, {tuple(out.shape)}")
        if out.stride(1) != 1:
            raise ValueError(f"the last stride must be 1; got {out.stride()}")
        self._run(
            packed.data.data_ptr(), indices.data_ptr(), out.data_ptr(), out.stride(0), len(indices), packed.inputs,
            packed.outputs, FORMATS[packed.kind], DTYPES[out.dtype], self._threads,
        )  # fmt: skip
        return out


class QuantLinear:
    """out = x @ W.T (+ bias) (+ residual) with a packed weight. Safe to call from several threads."""

    def __init__(self, kernels: NativeKernels, packed: PackedWeight, bias: Tensor | None = None) -> None:
        if bias is not None and (bias.shape != (packed.outputs,) or not bias.is_contiguous() or bias.dtype not in DTYPES):
            raise ValueError(f"bias must be contiguous [{packed.outputs}]; got {tuple(bias.shape)}, {bias.dtype}")
        check(kernels, packed)
        self.packed = packed
        self.bias = bias
        self._run, self._format = kernels.library.linear, FORMATS[packed.kind]
        self._weight = (0 if bias is None else bias.data_ptr(), packed.data.data_ptr())
        self._bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        paths = kernels.library.paths
        self._how = (kernels.threads, paths.one_panel, paths.most_stored(packed.kind), paths.tiles)

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [rows, inputs]; out, residual: [rows, outputs]; each fp32, bf16 or fp16, last stride 1. out may be residual."""
        rows, inputs = x.shape
        packed = self.packed
        if inputs != packed.inputs or out.shape != (rows, packed.outputs):
            raise ValueError(f"weight is {packed.outputs} x {packed.inputs}; got x {tuple(x.shape)}, out {tuple(out.shape)}")
        x_row, x_last = x.stride()
        out_row, out_last = out.stride()
        if x_last != 1 or out_last != 1:
            raise ValueError(f"last strides must be 1; got x {x.stride()}, out {out.stride()}")
        extra, extra_row, extra_dtype = (0, 0, 0) if residual is None else _residual(residual, out)
        self._run(
            x.data_ptr(), x_row, out.data_ptr(), out_row, extra, extra_row, *self._weight, rows, inputs, packed.outputs,
            self._format, DTYPES[x.dtype], DTYPES[out.dtype], self._bias_dtype, extra_dtype, *self._how,
        )  # fmt: skip
        return out


def _residual(residual: Tensor, out: Tensor) -> tuple[int, int, int]:
    if residual.shape != out.shape or residual.stride(1) != 1:
        raise ValueError(f"residual must be {tuple(out.shape)}, last stride 1; got {tuple(residual.shape)}")
    return residual.data_ptr(), residual.stride(0), DTYPES[residual.dtype]
