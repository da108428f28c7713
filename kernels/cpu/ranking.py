"""From raw logits to a ranking per group of query heads: softmax per head, heads combined, running maximum over columns."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kvloom.kernels.cpu.compiler import device, entry
from kvloom.kernels.cpu.scalar import LOG2E, NEG_INF, exp2, get, get_int, put
from kvloom.kernels.cpu.vector import LANES, peak


@device
def _weigh(x, count, weights):
    """weights = exp(x - maximum); returns the inverse of their sum, 0 if nothing is finite."""
    whole = count // LANES * LANES
    top = peak(x, whole)
    for i in range(whole, count):
        top = max(top, get(x, i))
    shift = np.float32(0.0) if top == NEG_INF else top
    total = np.float32(0.0)
    for i in range(count):
        weight = exp2((get(x, i) - shift) * LOG2E)
        put(weights, i, weight)
        total += weight
    return np.float32(0.0) if total == np.float32(0.0) else np.float32(1.0) / total


@device
def _combine(weights, inverse, count, first_head, maximum, ranks):
    """ranks = sum or maximum with what is there already, which the first head replaces."""
    for i in range(count):
        share = get(weights, i) * inverse
        if first_head:
            put(ranks, i, share)
        elif maximum:
            put(ranks, i, max(get(ranks, i), share))
        else:
            put(ranks, i, get(ranks, i) + share)


@device
def _dilate(x, count, window):
    """x[i] = maximum of x[i, i + window) for the first `count`, by doubling: 1, 2, 4, .. columns, then two that overlap."""
    span = 1
    while 2 * span <= window:
        for i in range(count + window - 2 * span):
            put(x, i, max(get(x, i), get(x, i + span)))
        span *= 2
    if span < window:
        for i in range(count):
            put(x, i, max(get(x, i), get(x, i + window - span)))


@device
def _pool_group(x, head_stride, heads, count, window, maximum, out):
    half = window // 2
    weights = np.empty(count, np.float32)
    ranks = np.zeros(count + 2 * half, np.float32)  # shares are never below the zeros at both ends
    for h in range(heads):
        inverse = _weigh(x + 4 * h * head_stride, count, weights.ctypes.data)
        _combine(weights.ctypes.data, inverse, count, h == 0, maximum, ranks.ctypes.data + 4 * half)
    if window > 1:
        _dilate(ranks.ctypes.data, count, window)
    for i in range(count):
        put(out, i, ranks[i])


@entry(parallel=True)
def pool(logits, strides, first, last, out, out_strides, rows, q_heads, groups, window, maximum):
    """`Kernels.pool`. strides: (row, head) and (row, group) in elements; maximum: combine heads by it, not by their sum."""
    heads = q_heads // groups
    for i in prange(rows * groups):
        row, group = i // groups, i % groups
        begin, end = get_int(first, row), get_int(last, row)
        if begin < end:
            x = logits + 4 * (row * strides[0] + group * heads * strides[1] + begin)
            target = out + 4 * (row * out_strides[0] + group * out_strides[1])
            _pool_group(x, strides[1], heads, end - begin, window, maximum, target)
