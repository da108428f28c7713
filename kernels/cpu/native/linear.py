"""Linear layers with quantised weights: packing, and the layer.

Weights are int4 or int8 codes with one scale (and optionally one minimum) per output and group of 32 inputs, the block
formats of GGUF: Q4_0 (w = d * (q - 8)), Q4_1 (w = d * q + m), Q8_0 (w = d * q). Scales are kept in fp16, as GGUF keeps
them. Activations are rounded to 15 bits on the fly, one scale per row and group of 32, and multiplied with integer dot
products; sums across groups are fp32. A result therefore differs from x @ dequantised(W).T by the rounding of x: each x
moves by at most half its group's scale, max|x| / 32512. With 8 bits, which cost as much where the processor multiplies 16-bit
pairs (AVX2) and half where it has VNNI, every second greedy answer of the built-in model was another one than in bf16.
A row's result does not depend on the other rows of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.kernels.quantized import PackedWeight

from .backend import NativeKernels
from .library import DTYPES, Library

GROUP = 32
_Q4, _Q4_SYMMETRIC, _Q8 = range(3)  # csrc/quant.h: Format


def pack_int4(kernels: NativeKernels, codes: Tensor, scales: Tensor, mins: Tensor | None = None) -> PackedWeight:
    """w = scale * code + min, or scale * (code - 8) without mins.

    codes: uint8 in [0, 16), [outputs, inputs]; or two per byte, [outputs, inputs / 2], input 2 i in the low nibble
    scales, mins: [outputs, inputs / 32], rounded to fp16
    """
    inputs = scales.shape[1] * GROUP
    if codes.shape[1] * 2 == inputs:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(codes.shape[0], inputs)
    if codes.dtype is not torch.uint8 or int(codes.max()) > 15:
        raise ValueError(f"int4 codes must be uint8 below 16; got {codes.dtype} up to {int(codes.max())}")
    return _pack(kernels.library, codes, scales, mins, _Q4_SYMMETRIC if mins is None else _Q4)


def pack_int8(kernels: NativeKernels, codes: Tensor, scales: Tensor) -> PackedWeight:
    """w = scale * code. codes: int8 [outputs, inputs]; scales: [outputs, inputs / 32], or [outputs] for one per output."""
    if codes.dtype is not torch.int8:
        raise ValueError(f"int8 codes must be int8; got {codes.dtype}")
    if scales.dim() == 1:
        scales = scales[:, None].expand(-1, codes.shape[1] // GROUP)
    return _pack(kernels.library, (codes.to(torch.int16) + 128).to(torch.uint8), scales, None, _Q8)


class QuantLinear:
    """out = x @ W.T (+ bias) (+ residual) with a packed weight. Safe to call from several threads."""

    def __init__(self, kernels: NativeKernels, packed: PackedWeight, bias: Tensor | None = None) -> None:
        if bias is not None and (bias.shape != (packed.outputs,) or not bias.is_contiguous() or bias.dtype not in DTYPES):
            raise ValueError(f"bias must be contiguous [{packed.outputs}]; got {tuple(bias.shape)}, {bias.dtype}")
        expected = kernels.library.linear_bytes(packed.inputs, packed.outputs, packed.format)
        if packed.inputs % GROUP or packed.data.numel() != expected or not packed.data.is_contiguous():
            raise ValueError(
                f"packed weights have {packed.data.numel()} bytes; {packed.outputs} x {packed.inputs} need {expected}"
            )
        self.packed = packed
        self.bias = bias
        self._run = kernels.library.linear
        self._weight = (0 if bias is None else bias.data_ptr(), packed.data.data_ptr())
        self._bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        self._threads = kernels.threads

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
            packed.format, DTYPES[x.dtype], DTYPES[out.dtype], self._bias_dtype, extra_dtype, self._threads,
        )  # fmt: skip
        return out


def _residual(residual: Tensor, out: Tensor) -> tuple[int, int, int]:
    if residual.shape != out.shape or residual.stride(1) != 1:
        raise ValueError(f"residual must be {tuple(out.shape)}, last stride 1; got {tuple(residual.shape)}")
    return residual.data_ptr(), residual.stride(0), DTYPES[residual.dtype]


def _pack(library: Library, codes: Tensor, scales: Tensor, mins: Tensor | None, layout: int) -> PackedWeight:
    outputs, inputs = codes.shape
    for name, per_group in (("scales", scales), ("mins", mins)):
        if per_group is not None and (inputs % GROUP or per_group.shape != (outputs, inputs // GROUP)):
            raise ValueError(f"{name} must be [{outputs}, {inputs} / {GROUP}]; got {tuple(per_group.shape)}")
    codes, scales = codes.contiguous(), scales.float().contiguous()
    mins = None if mins is None else mins.float().contiguous()
    data = torch.empty(library.linear_bytes(inputs, outputs, layout), dtype=torch.uint8)
    library.linear_pack(
        codes.data_ptr(), scales.data_ptr(), 0 if mins is None else mins.data_ptr(), data.data_ptr(), inputs, outputs, layout
    )  # fmt: skip
    return PackedWeight(data, outputs, inputs, layout, 8 if layout == _Q8 else 4)
