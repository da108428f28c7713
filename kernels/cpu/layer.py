"""Row-wise operations of a layer: norm, activation, rotation, storing. Entries split rows over threads when it pays.

All arithmetic in fp32, rounded once. Addresses and element strides as integers, as in `attention`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kvloom.kernels.cpu.compiler import device, entry
from kvloom.kernels.cpu.scalar import FP32, LOG2E, NEG_INF, exp2, get, get_int, get_long, load, put, read, size_of, store, write


@device
def _norm_rows(x, delta, weight, eps, out, begin, end, hidden, x_kind, kind, weight_kind):
    for row in range(begin, end):
        base = row * hidden
        if delta != 0:
            for c in range(hidden):
                write(x, base + c, read(x, base + c, x_kind) + read(delta, base + c, kind), x_kind)
        squares = np.float32(0.0)
        for c in range(hidden):
            value = read(x, base + c, x_kind)
            squares += value * value
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(hidden) + eps)
        for c in range(hidden):
            write(out, base + c, read(x, base + c, x_kind) * inverse * read(weight, c, weight_kind), kind)


@entry(parallel=True)
def add_rms_norm(threads, x, delta, weight, eps, out, rows, hidden, x_kind, kind, weight_kind):
    """`Kernels.add_rms_norm` on contiguous rows; delta 0 for none. x_kind: of x; kind: of delta and out."""
    if threads == 1:
        _norm_rows(x, delta, weight, eps, out, 0, rows, hidden, x_kind, kind, weight_kind)
    else:
        for t in prange(threads):
            _norm_rows(x, delta, weight, eps, out, rows * t // threads, rows * (t + 1) // threads, hidden, x_kind, kind,
                       weight_kind)  # fmt: skip


@device
def _silu_rows(gate_up, out, begin, end, width, kind):
    for row in range(begin, end):
        gate, up, target = row * 2 * width, row * 2 * width + width, row * width
        for c in range(width):
            x = read(gate_up, gate + c, kind)
            sigmoid = np.float32(1.0) / (np.float32(1.0) + exp2(min(-x * LOG2E, np.float32(126.0))))
            write(out, target + c, x * sigmoid * read(gate_up, up + c, kind), kind)


@entry(parallel=True)
def silu_mul(threads, gate_up, out, rows, width, kind):
    """`Kernels.silu_mul` on contiguous rows."""
    if threads == 1:
        _silu_rows(gate_up, out, 0, rows, width, kind)
    else:
        for t in prange(threads):
            _silu_rows(gate_up, out, rows * t // threads, rows * (t + 1) // threads, width, kind)


@device
def _turn(source, target, half, dim, cos, sin, factor, norm, kind, weight_kind):
    """Scale by factor (and by norm weights), then turn pairs (i, i + half); the rest of the head passes through."""
    for i in range(half):
        a, b = read(source, i, kind) * factor, read(source, i + half, kind) * factor
        if norm != 0:
            a *= read(norm, i, weight_kind)
            b *= read(norm, i + half, weight_kind)
        c, s = get(cos, i), get(sin, i)
        write(target, i, a * c - b * s, kind)
        write(target, i + half, b * c + a * s, kind)
    for i in range(2 * half, dim):
        a = read(source, i, kind) * factor
        if norm != 0:
            a *= read(norm, i, weight_kind)
        write(target, i, a, kind)


@device
def _norm_factor(source, dim, norm, eps, kind):
    if norm == 0:
        return np.float32(1.0)
    squares = np.float32(0.0)
    for c in range(dim):
        value = read(source, c, kind)
        squares += value * value
    return np.float32(1.0) / np.sqrt(squares / np.float32(dim) + eps)


@device
def _copy(source, target, count, kind):
    for c in range(count):
        store(target, c, load(source, c, kind))


@device
def _slot_at(slot, block_size, strides):
    """Element offset of a slot. strides: (block, head, token)."""
    return slot // block_size * strides[0] + slot % block_size * strides[2]


@device
def _rotate_store_rows(qkv, cos, sin, positions, k, k_strides, v, v_strides, block_size, slots, q, norms, eps, begin, end,
                       shape, kind, norm_kind):  # fmt: skip
    q_heads, kv_heads, dim, half, qkv_stride = shape
    size = size_of(kind)
    for row in range(begin, end):
        source = qkv + size * row * qkv_stride
        position, slot = get_long(positions, row), get_long(slots, row)
        c, s = cos + 4 * position * half, sin + 4 * position * half
        for h in range(q_heads):
            target = q + size * (row * q_heads + h) * dim
            factor = _norm_factor(source, dim, norms[0], eps, kind)
            _turn(source, target, half, dim, c, s, factor, norms[0], kind, norm_kind)
            source += size * dim
        if slot < 0:
            continue
        k_at, v_at = _slot_at(slot, block_size, k_strides), _slot_at(slot, block_size, v_strides)
        for h in range(kv_heads):
            factor = _norm_factor(source, dim, norms[1], eps, kind)
            _turn(source, k + size * (k_at + h * k_strides[1]), half, dim, c, s, factor, norms[1], kind, norm_kind)
            _copy(source + size * kv_heads * dim, v + size * (v_at + h * v_strides[1]), dim, kind)
            source += size * dim


@entry(parallel=True)
def rotate_store(threads, qkv, cos, sin, positions, k, k_strides, v, v_strides, block_size, slots, q, norms, eps, rows, shape,
                 kind, norm_kind):  # fmt: skip
    """`Kernels.rotate_store`. norms: addresses of (q, k) weights or 0.

    shape: (q_heads, kv_heads, head_dim, rotary / 2, elements from one row of qkv to the next)
    """
    if threads == 1:
        _rotate_store_rows(qkv, cos, sin, positions, k, k_strides, v, v_strides, block_size, slots, q, norms, eps, 0, rows,
                           shape, kind, norm_kind)  # fmt: skip
    else:
        for t in prange(threads):
            _rotate_store_rows(qkv, cos, sin, positions, k, k_strides, v, v_strides, block_size, slots, q, norms, eps,
                               rows * t // threads, rows * (t + 1) // threads, shape, kind, norm_kind)  # fmt: skip


@entry()
def store_rows(source_k, source_v, source_strides, k, k_strides, v, v_strides, block_size, slots, rows, heads, dim, kind):
    """`Kernels.store`. source_strides: (k row, k head, v row, v head)."""
    size = size_of(kind)
    for row in range(rows):
        slot = get_long(slots, row)
        if slot < 0:
            continue
        k_at, v_at = _slot_at(slot, block_size, k_strides), _slot_at(slot, block_size, v_strides)
        for h in range(heads):
            _copy(source_k + size * (row * source_strides[0] + h * source_strides[1]), k + size * (k_at + h * k_strides[1]),
                  dim, kind)  # fmt: skip
            _copy(source_v + size * (row * source_strides[2] + h * source_strides[3]), v + size * (v_at + h * v_strides[1]),
                  dim, kind)  # fmt: skip


@device
def _shift_rows(k, delta, inv_freq, out, table, begin, end, heads, dim, half, kind):
    """table: scratch, [rotary] fp32 for cosines and sines; rows with the delta of the row before reuse them."""
    known, before = False, np.int64(0)
    for row in range(begin, end):
        turn = get_int(delta, row)
        if not known or turn != before:
            for i in range(half):
                angle = np.float64(turn) * np.float64(get(inv_freq, i))
                put(table, i, np.cos(angle))
                put(table, half + i, np.sin(angle))
            known, before = True, turn
        for h in range(heads):
            at = size_of(kind) * (row * heads + h) * dim
            _turn(k + at, out + at, half, dim, table, table + 4 * half, np.float32(1.0), 0, kind, FP32)


@entry(parallel=True)
def rotate(threads, k, delta, inv_freq, out, table, rows, heads, dim, half, kind):
    """`Kernels.rotate` on contiguous k and out, which may be one tensor. table: [threads, 2 * half] fp32 scratch."""
    if threads == 1:
        _shift_rows(k, delta, inv_freq, out, table, 0, rows, heads, dim, half, kind)
    else:
        for t in prange(threads):
            _shift_rows(k, delta, inv_freq, out, table + 8 * half * t, rows * t // threads, rows * (t + 1) // threads, heads,
                        dim, half, kind)  # fmt: skip


@entry()
def merge(out_a, lse_a, out_b, lse_b, states, dim, kind):
    """`Kernels.merge` on contiguous states."""
    for i in range(states):
        a, b = get(lse_a, i), get(lse_b, i)
        top = max(a, b)
        if top == NEG_INF:
            continue
        weight_a, weight_b = np.float32(np.exp(a - top)), np.float32(np.exp(b - top))
        total = weight_a + weight_b
        for c in range(i * dim, (i + 1) * dim):
            value = (weight_a * read(out_a, c, kind) + weight_b * read(out_b, c, kind)) / total
            write(out_a, c, value, kind)
        put(lse_a, i, top + np.float32(np.log(total)))
