"""Deterministic top-k by radix selection: find the k-th largest value digit by digit, then collect in column order.

Every fp32 is mapped to a uint32 that sorts the same way; four passes over 8 bits narrow down the k-th largest. What is
larger is taken, and of what is equal the lowest columns, as many as are missing: ties go to the lower column, and columns
come out ascending without a sort. One linear pass per digit, whatever k is.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kvloom.kernels.cpu.compiler import device, entry
from kvloom.kernels.cpu.scalar import bits, get, get_int, store


@device
def _order(value):
    """fp32 to an integer in [0, 2**32) of the same order; -0 and 0 are equal."""
    b = np.int64(bits(value))
    if b == 0x80000000:
        b = np.int64(0)
    return (0xFFFFFFFF - b) if b & 0x80000000 else (b | 0x80000000)


@device
def _threshold(scores, length, k):
    """(ordered value of the k-th largest, how many equal ones belong to the top k)."""
    histogram = np.zeros(256, np.int64)
    prefix, missing = np.int64(0), np.int64(k)
    for shift in (24, 16, 8, 0):
        histogram[:] = 0
        for i in range(length):
            value = _order(get(scores, i))
            if value >> (shift + 8) == prefix:
                histogram[(value >> shift) & 255] += 1
        digit = 255
        while histogram[digit] < missing:
            missing -= histogram[digit]
            digit -= 1
        prefix = (prefix << 8) | digit
    return prefix, missing


@device
def _select_row(scores, length, k, offset, columns):
    take = min(k, length)
    found = np.int64(0)
    if take == length:
        for i in range(length):
            store(columns, i, np.int32(i + offset))
        found = take
    elif take > 0:
        threshold, ties = _threshold(scores, length, take)
        for i in range(length):
            value = _order(get(scores, i))
            if value > threshold or (value == threshold and ties > 0):
                ties -= value == threshold
                store(columns, found, np.int32(i + offset))
                found += 1
    for i in range(found, k):
        store(columns, i, np.int32(-1))
    return found


@entry(parallel=True)
def select(scores, stride, lengths, k, offset, columns, columns_stride, counts, rows):
    """`Kernels.select`. Strides between rows in elements; offset: [rows] int32, or 0; columns, counts: int32."""
    for row in prange(rows):
        moved = get_int(offset, row) if offset != 0 else 0
        target = columns + 4 * row * columns_stride
        found = _select_row(scores + 4 * row * stride, get_int(lengths, row), k, moved, target)
        store(counts, row, np.int32(found))
