"""Linear layers with weights of 4 or 8 bits, and activations as they are.

A group is 32 inputs with one scale, and perhaps one minimum, per output. Codes are whole numbers of at most 8 bits, exact in
every dtype of activations: so tensor cores multiply codes, and a group's sum is scaled in fp32. No weight is rounded.

A row's bits depend on no other row: groups are cut into splits by the weight's shape alone, and splits added in order. Of few
rows, each split is another program's and sums go through scratch; of many, one program computes all. Tiles have one size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import FLOATS, strides
from kvloom.kernels.quantized import Multiply, PackedWeight, StoredWeight, check_stored
from kvloom.kernels.triton.numbers import INTERPRETED, read, rounded

GROUP = 32
"""Inputs with one scale."""
ROWS = 32
"""Rows to a program."""
PANEL = 64
"""Outputs to a program: rows of codes are padded to a multiple."""
FEW = 64
"""Most rows whose splits are computed by programs of their own."""
PROGRAMS = 512
"""Programs that keep a device busy."""
LEAST = 8
"""Fewest groups of a split."""
Q4, Q4_SYMMETRIC, Q8 = range(3)
"""Formats: codes 0 to 15 with a minimum; codes 0 to 15 that stand for -8 to 7; signed bytes."""
FORMATS = {"Q4_1": Q4, "Q4_0": Q4_SYMMETRIC, "Q8_0": Q8}
"""Of GGUF's kinds."""


@triton.jit
def _product(x, codes):
    """x [rows, n] @ codes [outputs, n].T in fp32. The interpreter is silently wrong about bf16."""
    if INTERPRETED:
        return tl.dot(x, tl.trans(codes.to(tl.float32)), input_precision="ieee")
    return tl.dot(x, tl.trans(codes.to(x.dtype)), input_precision="ieee")


@triton.jit
def _inputs(x, there, at):
    if INTERPRETED:
        return read(x + at[None, :], there[:, None])
    return tl.load(x + at[None, :], mask=there[:, None], other=0.0)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, x_row, codes, scales, mins, bias, out, out_row, partial, rows, outputs, padded, groups, EIGHT: tl.constexpr,
    SPLITS: tl.constexpr, SPREAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of outputs. codes: [groups, padded, bytes]; of 4 bits, byte i has input i of a group below and 16 + i above."""
    HALF: tl.constexpr = GROUP // 2
    BYTES: tl.constexpr = GROUP if EIGHT else HALF
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane, there, half, inner = tl.program_id(2), row < rows, tl.arange(0, HALF), tl.arange(0, BYTES)
    source = x + (row.to(tl.int64) * x_row)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    span = tl.cdiv(groups, SPLITS)
    for split in range(lane, SPLITS, SPREAD):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for group in range(split * span, tl.minimum(groups, (split + 1) * span)):
            per_output = (group * padded + output).to(tl.int64)
            code = tl.load(codes + (per_output * BYTES)[:, None] + inner[None, :])
            scale = tl.load(scales + per_output).to(tl.float32)
            if EIGHT:
                product = _product(_inputs(source, there, group * GROUP + inner), code)
            else:
                low, high = (code & 15).to(tl.int8), (code >> 4).to(tl.int8)
                if mins is None:
                    low, high = low - 8, high - 8
                first = _inputs(source, there, group * GROUP + half)
                second = _inputs(source, there, group * GROUP + HALF + half)
                product = _product(first, low) + _product(second, high)
            sums += product * scale[None, :]
            if mins is not None:
                of_row = tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1)
                sums += of_row[:, None] * tl.load(mins + per_output).to(tl.float32)[None, :]
        if SPREAD > 1:
            place = partial + ((split * rows + row).to(tl.int64) * padded)[:, None] + output[None, :]
            tl.store(place, sums, mask=there[:, None])
        total += sums
    if SPREAD == 1:
        _finish(total, bias, out, out_row, row, output, there, outputs)


@triton.jit
def _finish(total, bias, out, out_row, row, output, there, outputs):
    inside = output < outputs
    if bias is not None:
        total += read(bias + output, inside)[None, :]
    place = out + (row.to(tl.int64) * out_row)[:, None] + output[None, :]
    tl.store(place, rounded(total, out.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_splits(partial, bias, out, out_row, rows, outputs, padded, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A row's splits, in order."""
    row, output = tl.program_id(1) + tl.arange(0, 1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + ((split * rows + row).to(tl.int64) * padded)[:, None] + output[None, :])
    _finish(total, bias, out, out_row, row, output, row < rows, outputs)


class TritonQuantized:
    """`quantized.QuantizedLinears` on one device and one stream."""

    layout = "triton 1"
    kinds = frozenset(FORMATS)
    rows = None

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.scratch = torch.empty(0, device=device)

    def pack(self, stored: StoredWeight) -> PackedWeight:
        """See the contract. Codes, then scales, then minima, by groups of inputs and then by outputs."""
        check_stored(stored, self.kinds)
        kind, blocks, (outputs, inputs) = stored
        groups, factors = inputs // GROUP, 2 if kind == "Q4_1" else 1
        by_group = blocks.view(outputs, groups, -1)
        parts = [by_group[..., 2 * factors :], *(by_group[..., 2 * i : 2 * i + 2] for i in range(factors))]
        room = -outputs % PANEL
        data = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, room)).transpose(0, 1).flatten() for part in parts]
        return PackedWeight(torch.cat(data), outputs, inputs, kind)

    def linear(self, packed: PackedWeight, bias: Tensor | None) -> Multiply:
        """See the contract. Moves what is not on the device there, and makes scratch, which only grows."""
        weight = Weight(packed, bias, self)
        if len(self.scratch) < (size := weight.splits * FEW * weight.padded):
            self.scratch = torch.empty(size, device=self.device)
        return weight


class Weight:
    """A packed weight on the device, to be multiplied with."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None, back_end: TritonQuantized) -> None:
        self.outputs, self.inputs, self._back_end = packed.outputs, packed.inputs, back_end
        self.format = FORMATS[packed.kind]
        self.padded, self.groups = -(-self.outputs // PANEL) * PANEL, self.inputs // GROUP
        if bias is not None and (bias.shape != (self.outputs,) or not bias.is_contiguous() or bias.dtype not in FLOATS):
            raise ValueError(f"bias must be contiguous [{self.outputs}]; got {tuple(bias.shape)}, {bias.dtype}")
        cells, of_codes = self.groups * self.padded, GROUP if self.format == Q8 else GROUP // 2
        sizes = [cells * of_codes, cells * 2, cells * 2 * (self.format == Q4)]
        if self.inputs % GROUP or packed.data.numel() != sum(sizes) or not packed.data.is_contiguous():
            raise ValueError(
                f"packed weights have {packed.data.numel()} bytes; {self.outputs} x {self.inputs} need {sum(sizes)}"
            )
        codes, scales, mins = packed.data.to(back_end.device).split(sizes)
        self.codes, self.scales = codes.view(torch.int8) if self.format == Q8 else codes, scales.view(torch.float16)
        self.mins = mins.view(torch.float16) if self.format == Q4 else None
        self.bias = None if bias is None else bias.to(back_end.device)
        self.splits = max(1, min(PROGRAMS * PANEL // self.padded, self.groups // LEAST))

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """x: [rows, inputs]; out: [rows, outputs]; each fp32, bf16 or fp16, last stride 1."""
        rows, inputs = x.shape
        if inputs != self.inputs or out.shape != (rows, self.outputs):
            raise ValueError(f"weight is {self.outputs} x {self.inputs}; got x {tuple(x.shape)}, out {tuple(out.shape)}")
        if x.dtype not in FLOATS or out.dtype not in FLOATS:
            raise TypeError(f"x and out must be fp32, bf16 or fp16; got {x.dtype} and {out.dtype}")
        x_row, out_row = strides(x)[0], strides(out)[0]
        spread = self.splits if rows <= FEW else 1
        panels, partial = self.padded // PANEL, self._back_end.scratch
        if rows == 0 or self.outputs == 0:
            return out
        linear[panels, triton.cdiv(rows, ROWS), spread](
            x, x_row, self.codes, self.scales, self.mins, self.bias, out, out_row, partial, rows, self.outputs, self.padded,
            self.groups, EIGHT=self.format == Q8, SPLITS=self.splits, SPREAD=spread, GROUP=GROUP, BLOCK_M=ROWS, BLOCK_N=PANEL,
            num_warps=4 if self.format == Q8 else 2, num_stages=4, maxnreg=128 if self.format == Q8 else None,
        )  # fmt: skip
        if spread > 1:
            add_splits[panels, rows](partial, self.bias, out, out_row, rows, self.outputs, self.padded, SPLITS=self.splits,
                                     BLOCK_N=PANEL, num_warps=1)  # fmt: skip
        return out
