"""What several kernels need of numbers, where a GPU and Triton's interpreter part ways."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

knobs.language.default_fp_fusion = True  # what Triton does now, and will not do unasked from 3.10 on

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Whether kernels defined now run in the interpreter (TRITON_INTERPRET=1), on CPU tensors."""


def power_of_2(count: int) -> int:
    """The next one, at least 1."""
    return triton.next_power_of_2(max(1, count))


def aligned(tensor: Tensor) -> bool:
    """Whether its rows begin and end at multiples of 16 elements of 4 bytes, so that a thread may read four at once."""
    inner = (*tensor.stride()[:-1], tensor.shape[-1])
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in inner)


@triton.jit
def multiple(stride, ALIGNED: tl.constexpr):
    """A stride that Triton was not told of, and, where rows are `aligned`, knows to be a multiple of 16."""
    if ALIGNED:
        return stride // 16 * 16
    return stride


@triton.jit
def wide(x):
    """x in fp32; the interpreter's own way from bf16 takes milliseconds."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def read(pointer, there):
    """What lies there in fp32, 0 elsewhere."""
    return tl.where(there, wide(tl.load(pointer, mask=there)), 0.0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, fp32, in another dtype, rounded to nearest, ties to even: the interpreter cuts bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, (bits >> 16) | 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def ordered(x):
    """fp32 as uint32 in the same order, -0 as 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
