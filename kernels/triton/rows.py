"""Operations on rows, each for itself: stores, rotations, norms and the gated activation.

A program has one row, or a few heads or columns of one: a row's bits depend on no other row. Arithmetic in fp32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import fp32, index, same_dtype, strides
from kvloom.kernels.interface import PagedKV
from kvloom.kernels.triton.numbers import power_of_2, read, rounded, wide

HEADS = 8
"""Heads to a program."""

COLUMNS = 1024
"""Columns of a gated activation to a program."""


@triton.jit
def _store(k, v, cache_k, cache_v, slots, k_row, k_head, v_row, v_head, ck_block, ck_head, ck_slot, cv_block, cv_head, cv_slot,
           heads, dim, block_size, DIM: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
        there = (head < heads) & (column < dim)
        key = tl.load(k + row * k_row + head * k_head + column, mask=there)
        value = tl.load(v + row * v_row + head * v_head + column, mask=there)
        tl.store(cache_k + block * ck_block + head * ck_head + offset * ck_slot + column, key, mask=there)
        tl.store(cache_v + block * cv_block + head * cv_head + offset * cv_slot + column, value, mask=there)


def store(k: Tensor, v: Tensor, kv: PagedKV, slots: Tensor) -> None:
    """Write rows into slots; see `interface.Kernels.store`."""
    same_dtype(k, v, kv.k, kv.v)
    index(slots, torch.int64)
    rows, heads, dim = k.shape
    if rows and heads:
        _store[rows, triton.cdiv(heads, HEADS)](
            k, v, kv.k, kv.v, slots, *strides(k)[:2], *strides(v)[:2], *strides(kv.k)[:3], *strides(kv.v)[:3], heads, dim,
            kv.k.shape[2], DIM=power_of_2(dim), HEADS=HEADS,
        )  # fmt: skip


@triton.jit
def sin_cos(turns):
    """Of an angle in turns, fp64: quarters are taken off in fp64, and the rest, at most 1/8, goes through the fp32 polynomials
    of Cephes. The library's functions would drag their way for large angles along."""
    quarters = tl.floor(turns * 4.0 + 0.5)
    x, quarter = ((turns - quarters * 0.25) * 6.283185307179586).to(tl.float32), quarters.to(tl.int64) & 3
    square = x * x
    sin = x + x * square * ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1)
    cos = 1.0 - 0.5 * square
    cos += square * square * ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2)
    odd, lower, left = quarter % 2 == 1, quarter >= 2, (quarter == 1) | (quarter == 2)
    found, other = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where(lower, -found, found), tl.where(left, -other, other)


@triton.jit
def _rotate(k, delta, inv_freq, out, k_row, k_head, out_row, out_head, heads, dim, half, HALF: tl.constexpr,
            REST: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    turns = tl.load(delta + row).to(tl.float64) * tl.load(inv_freq + pair, mask=pair < half, other=0.0).to(tl.float64)
    sin, cos = sin_cos(turns * 0.15915494309189535)
    cos, sin = cos[None, :], sin[None, :]
    head, first = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], pair[None, :]
    source, target = k + row * k_row + head * k_head, out + row * out_row + head * out_head
    there = (head < heads) & (first < half)
    a = read(source + first, there)
    b = read(source + half + first, there)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.debug_barrier()  # out may be k
    tl.store(target + first, rounded(a * cos - b * sin, dtype), mask=there)
    tl.store(target + half + first, rounded(b * cos + a * sin, dtype), mask=there)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        there = (head < heads) & (column < dim)
        tl.store(target + column, tl.load(source + column, mask=there), mask=there)


def rotate(k: Tensor, delta: Tensor, inv_freq: Tensor, out: Tensor) -> Tensor:
    """Shift rotary positions; see `interface.Kernels.rotate`. Whole turns are taken off in fp64."""
    same_dtype(k, out)
    index(delta, torch.int32)
    fp32(inv_freq)
    (rows, heads, dim), half = k.shape, inv_freq.shape[0]
    if rows and heads:
        _rotate[rows, triton.cdiv(heads, HEADS)](
            k, delta, inv_freq, out, *strides(k)[:2], *strides(out)[:2], heads, dim, half, HALF=power_of_2(half),
            REST=_rest(dim, half), HEADS=HEADS,
        )  # fmt: skip
    return out


def _rest(dim: int, half: int) -> int:
    """Room for what is not turned: a power of two, or 0."""
    return power_of_2(dim - 2 * half) if dim > 2 * half else 0


@triton.jit
def _rotate_store(
    qkv, cos, sin, positions, cache_k, cache_v, slots, q, q_norm, k_norm, qkv_row, angle_row, ck_block, ck_head, ck_slot,
    cv_block, cv_head, cv_slot, q_row, q_head, q_heads, kv_heads, dim, half, block_size, eps, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads of a row's queries, keys and values, which lie one behind the other."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    is_q, is_k = head < q_heads, (head >= q_heads) & (head < q_heads + kv_heads)
    is_v = (head >= q_heads + kv_heads) & (head < q_heads + 2 * kv_heads)
    pair = tl.arange(0, HALF)[None, :]
    paired, source = pair < half, qkv + row * qkv_row + head * dim
    there = (is_q | is_k | is_v) & paired
    a = read(source + pair, there)
    b = read(source + half + pair, there)
    if Q_NORM or K_NORM:
        squares = tl.sum(a * a + b * b, axis=1)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        resting = column < dim
        rest = read(source + column, (is_q | is_k | is_v) & resting)
        if Q_NORM or K_NORM:
            squares += tl.sum(rest * rest, axis=1)
    if Q_NORM or K_NORM:
        root = tl.rsqrt(squares / dim + eps)[:, None]
    if Q_NORM:
        a = tl.where(is_q, a * root * read(q_norm + pair, paired), a)
        b = tl.where(is_q, b * root * read(q_norm + half + pair, paired), b)
        if REST > 0:
            rest = tl.where(is_q, rest * root * read(q_norm + column, resting), rest)
    if K_NORM:
        a = tl.where(is_k, a * root * read(k_norm + pair, paired), a)
        b = tl.where(is_k, b * root * read(k_norm + half + pair, paired), b)
        if REST > 0:
            rest = tl.where(is_k, rest * root * read(k_norm + column, resting), rest)
    angle = tl.load(positions + row) * angle_row
    c = tl.load(cos + angle + pair, mask=paired, other=0.0)
    s = tl.load(sin + angle + pair, mask=paired, other=0.0)
    dtype: tl.constexpr = q.dtype.element_ty
    first = rounded(tl.where(is_v, a, a * c - b * s), dtype)
    second = rounded(tl.where(is_v, b, b * c + a * s), dtype)
    slot = tl.load(slots + row)
    block, offset = slot // block_size, slot % block_size
    key = cache_k + block * ck_block + (head - q_heads) * ck_head + offset * ck_slot
    value = cache_v + block * cv_block + (head - q_heads - kv_heads) * cv_head + offset * cv_slot
    target = tl.where(is_q, q + row * q_row + head * q_head, tl.where(is_k, key, value))
    written = is_q | ((is_k | is_v) & (slot >= 0))
    tl.store(target + pair, first, mask=written & paired)
    tl.store(target + half + pair, second, mask=written & paired)
    if REST > 0:
        tl.store(target + column, rounded(rest, dtype), mask=written & resting)


def rotate_store(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: PagedKV, slots: Tensor, q: Tensor,
                 q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
    """Split, normalise, rotate, store; see `interface.Kernels.rotate_store`."""
    same_dtype(qkv, q, kv.k, kv.v)
    index(positions, torch.int64)
    index(slots, torch.int64)
    fp32(cos)
    fp32(sin)
    (rows, q_heads, dim), kv_heads, half = q.shape, kv.k.shape[1], cos.shape[1]
    if rows:
        _rotate_store[rows, triton.cdiv(q_heads + 2 * kv_heads, HEADS)](
            qkv, cos, sin, positions, kv.k, kv.v, slots, q, q_norm, k_norm, strides(qkv)[0], cos.stride(0),
            *strides(kv.k)[:3], *strides(kv.v)[:3], *strides(q)[:2], q_heads, kv_heads, dim, half, kv.k.shape[2], eps,
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, HALF=power_of_2(half), REST=_rest(dim, half), HEADS=HEADS,
        )  # fmt: skip
    return q


@triton.jit
def _add_rms_norm(x, delta, weight, out, x_row, delta_row, out_row, hidden, eps, ADD: tl.constexpr, HIDDEN: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, HIDDEN)
    there = column < hidden
    values = read(x + row * x_row + column, there)
    if ADD:
        values += read(delta + row * delta_row + column, there)
        kept = rounded(values, x.dtype.element_ty)
        tl.store(x + row * x_row + column, kept, mask=there)
        values = wide(kept)
    root = tl.rsqrt(tl.sum(values * values, axis=0) / hidden + eps)
    scaled = values * root * read(weight + column, there)
    tl.store(out + row * out_row + column, rounded(scaled, out.dtype.element_ty), mask=there)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Residual addition and RMS norm; see `interface.Kernels.add_rms_norm`."""
    if x.dtype is not torch.float32:
        same_dtype(x, out)
    if delta is not None:
        same_dtype(delta, out)
    rows, hidden = x.shape
    width = power_of_2(hidden)
    if rows:
        _add_rms_norm[rows,](
            x, delta, weight, out, strides(x)[0], 0 if delta is None else strides(delta)[0], strides(out)[0], hidden, eps,
            ADD=delta is not None, HIDDEN=width, num_warps=warps(width),
        )  # fmt: skip
    return out


def warps(width: int) -> int:
    """For a program with that many columns: about eight to a thread."""
    return min(16, max(1, width // 256))


@triton.jit
def _silu_mul(gate_up, out, in_row, out_row, intermediate, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < intermediate
    gate = read(gate_up + row * in_row + column, there)
    up = read(gate_up + row * in_row + intermediate + column, there)
    tl.store(out + row * out_row + column, rounded(gate / (1.0 + tl.exp(-gate)) * up, out.dtype.element_ty), mask=there)


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """Gated activation; see `interface.Kernels.silu_mul`."""
    same_dtype(gate_up, out)
    rows, intermediate = out.shape
    if rows:
        _silu_mul[rows, triton.cdiv(intermediate, COLUMNS)](
            gate_up, out, strides(gate_up)[0], strides(out)[0], intermediate, COLUMNS=COLUMNS
        )
    return out
