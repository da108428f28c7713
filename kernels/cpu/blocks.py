"""One block of keys: scores of query rows against it, the running softmax in base 2, and values weighed by it.

Everything in fp32 and by address. A block has up to KEYS rows; s holds its scores, then its weights: [heads, KEYS] for a single
row, [KEYS, TILE_LANES] for a tile. m: maximum, total: sum, factor: what the past must be multiplied by.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from kvloom.kernels.cpu.compiler import device
from kvloom.kernels.cpu.paged import ask
from kvloom.kernels.cpu.partition import TILE_LANES
from kvloom.kernels.cpu.scalar import NEG_INF, exp2, get, put
from kvloom.kernels.cpu.vector import (
    LANES,
    dot1,
    dot2,
    dot3,
    dot4,
    mac1x1,
    mac1x4,
    mac2x1,
    mac2x4,
    mac3x4,
    mac4x1,
    mac4x4,
    mac8x1,
    peak,
)

KEYS = 64  # keys per block of the running softmax


@device
def scores(s, q, tile, group, width, count, ahead, dim, kind):
    """s: [group, KEYS] = q: [group, width] times tile: [count, width]. ahead: rows to ask for meanwhile, or 0."""
    for j in range(count):
        if ahead != 0:
            ask(ahead, j, dim, kind)
        key = tile + 4 * j * width
        h = 0
        while h < group:
            left = group - h
            at, query = s + 4 * (h * KEYS + j), q + 4 * h * width
            if left >= 4:
                dot4(at, KEYS, query, width, key, width)
                h += 4
            elif left == 3:
                dot3(at, KEYS, query, width, key, width)
                h += 3
            elif left == 2:
                dot2(at, KEYS, query, width, key, width)
                h += 2
            else:
                dot1(at, KEYS, query, width, key, width)
                h += 1


@device
def _add_wide(acc, s, tile, group, width, count):
    """Four vectors of columns of acc: [group, width] += s: [group, KEYS] times tile: [count, width]."""
    h = 0
    while h < group:
        left = group - h
        at, weight = acc + 4 * h * width, s + 4 * h * KEYS
        if left >= 4:
            mac4x4(at, width, weight, KEYS, 1, tile, width, count)
            h += 4
        elif left == 3:
            mac3x4(at, width, weight, KEYS, 1, tile, width, count)
            h += 3
        elif left == 2:
            mac2x4(at, width, weight, KEYS, 1, tile, width, count)
            h += 2
        else:
            mac1x4(at, width, weight, KEYS, 1, tile, width, count)
            h += 1


@device
def _add_narrow(acc, s, tile, group, width, count):
    """The same for one vector of columns."""
    h = 0
    while h < group:
        left = group - h
        at, weight = acc + 4 * h * width, s + 4 * h * KEYS
        if left >= 8:
            mac8x1(at, width, weight, KEYS, 1, tile, width, count)
            h += 8
        elif left >= 4:
            mac4x1(at, width, weight, KEYS, 1, tile, width, count)
            h += 4
        elif left >= 2:
            mac2x1(at, width, weight, KEYS, 1, tile, width, count)
            h += 2
        else:
            mac1x1(at, width, weight, KEYS, 1, tile, width, count)
            h += 1


@device
def add_values(acc, s, tile, group, width, count):
    """acc: [group, width] += s: [group, KEYS] times tile: [count, width]."""
    c = 0
    while width - c >= 4 * LANES:
        _add_wide(acc + 4 * c, s, tile + 4 * c, group, width, count)
        c += 4 * LANES
    while c < width:
        _add_narrow(acc + 4 * c, s, tile + 4 * c, group, width, count)
        c += LANES


@device
def weigh(s, count, maximum, total):
    """Turn one head's scores into weights; returns the new maximum, the new sum and the factor for what was before."""
    padded = -(-count // LANES) * LANES  # at most KEYS
    clear(s + 4 * count, padded - count, NEG_INF)
    top = max(maximum, peak(s, padded))
    shift = np.float32(0.0) if top == NEG_INF else top
    factor = exp2(maximum - shift)
    added = np.float32(0.0)
    for j in range(count):
        weight = exp2(get(s, j) - shift)
        put(s, j, weight)
        added += weight
    return top, total * factor + added, factor


@device
def multiply(address, count, factor):
    for c in range(count):
        put(address, c, get(address, c) * factor)


@device
def clear(address, count, value):
    for c in range(count):
        put(address, c, value)


@device
def weigh_tile(s, count, m, total, factor):
    """The same for all lanes at once. s: [count, TILE_LANES]; m, total, factor: [TILE_LANES]."""
    for r in range(TILE_LANES):
        put(factor, r, get(m, r))
    for j in range(count):
        for r in range(TILE_LANES):
            put(m, r, max(get(m, r), get(s, j * TILE_LANES + r)))
    for r in range(TILE_LANES):
        before, top = get(factor, r), get(m, r)
        change = exp2(before - (np.float32(0.0) if top == NEG_INF else top))
        put(factor, r, change)
        put(total, r, get(total, r) * change)
    for j in range(count):
        for r in range(TILE_LANES):
            top = get(m, r)
            weight = exp2(get(s, j * TILE_LANES + r) - (np.float32(0.0) if top == NEG_INF else top))
            put(s, j * TILE_LANES + r, weight)
            put(total, r, get(total, r) + weight)


@device
def mask_tile(s, at, count, seen, group, lanes):
    """Hide the keys that come after a lane's own row. seen: keys that the tile's first row sees."""
    for j in range(count):
        hidden = min(max((at + j - seen + 1) * group, 0), lanes)  # rows that end at or before key at + j
        for r in range(hidden):
            put(s, j * TILE_LANES + r, NEG_INF)
