"""Attention over paged KV: one task at a time, threads taking tasks from a shared counter.

A *single* task is one query row with the g query heads of one KV head, which share each pass over K and V. A *tile* task is
several rows of a prefill chunk: the (row, head) pairs are vector lanes, q and the output are held transposed, and K and V
are converted to fp32 once for all of them. Both keep a running softmax in base 2 (m: maximum, l: sum, acc: weighted values)
over blocks of 64 keys, and never hold more scores than one block's.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import prange

from kvloom.kernels.cpu.blocks import KEYS, add_values, clear, mask_tile, multiply, scores, weigh, weigh_tile
from kvloom.kernels.cpu.compiler import device, entry
from kvloom.kernels.cpu.paged import fill, locate
from kvloom.kernels.cpu.partition import (
    COUNT,
    HEAD,
    LIST,
    LISTED,
    PART,
    ROW,
    SPLIT_LEN,
    SPLITS,
    START,
    TABLE,
    TILE_LANES,
    TILE_ROWS,
    UNIT_FIELDS,
)
from kvloom.kernels.cpu.scalar import LN2, LOG2E, NEG_INF, exp2, fetch_add, get, get_long, put, read, size_of, store, write
from kvloom.kernels.cpu.vector import (
    LANES,
    fresh8x1,
    mac8x1,
)

ADDRESSES = 2 * KEYS  # fp32 elements that the row addresses of a block take

# What stays the same in every layer of a step: one int64 each.
SHAPE_FIELDS = 13
(UNITS, TASKS, TASK_COUNT, TASK_NEXT, DONE, PARTS, SCRATCH, SCRATCH_SIZE, THREADS, GROUP, DIM, WIDTH, BLOCK_SIZE) = range(
    SHAPE_FIELDS
)


def scratch_size(group: int, width: int) -> int:
    """fp32 elements of scratch per thread: row addresses, key or value block, scores, q, acc, and state of every lane."""
    lanes = max(group, TILE_LANES)
    return 4 * ADDRESSES + KEYS * width + KEYS * lanes + 2 * lanes * width + 4 * lanes


@device
def _run_single(shape, unit, begin, end, scratch, q, q_strides, k, k_strides, v, v_strides, logits, logit_strides, scale,
                kind):  # fmt: skip
    """Keys [begin, end) of a single unit. Leaves acc: [group, width], m and l: [group] at the end of scratch."""
    values = v != 0
    group, dim, width = get_long(shape, GROUP), get_long(shape, DIM), get_long(shape, WIDTH)
    block_size = get_long(shape, BLOCK_SIZE)
    row, head = get_long(unit, ROW), get_long(unit, HEAD)
    table, list_at, listed, start = get_long(unit, TABLE), get_long(unit, LIST), get_long(unit, LISTED), get_long(unit, START)
    k_at, v_at, next_k, next_v = scratch, scratch + 4 * ADDRESSES, scratch + 8 * ADDRESSES, scratch + 12 * ADDRESSES
    tile = scratch + 16 * ADDRESSES
    s = tile + 4 * KEYS * width
    query = s + 4 * KEYS * group
    acc = query + 4 * group * width
    m = acc + 4 * group * width
    total = m + 4 * group
    clear(query, group * width, 0.0)
    clear(acc, group * width, 0.0)
    clear(m, group, NEG_INF)
    clear(total, group, 0.0)
    for h in range(group):
        for c in range(dim):
            x = read(q, row * q_strides[0] + (head * group + h) * q_strides[1] + c, kind)
            put(query + 4 * h * width, c, x * scale * LOG2E)
    k += size_of(kind) * head * k_strides[1]
    v += size_of(kind) * head * v_strides[1]
    count = min(KEYS, end - begin)
    locate(k_at, v_at, k, k_strides, v, v_strides, block_size, table, list_at, listed, start, begin, begin + count, kind)
    for at in range(begin, end, KEYS):
        fill(tile, width, k_at, count, dim, kind, 0)
        scores(s, query, tile, group, width, count, v_at if values else 0, dim, kind)
        if logits != 0:
            for h in range(group):
                target = logits + 4 * (row * logit_strides[0] + (head * group + h) * logit_strides[1] + at)
                for j in range(count):
                    put(target, j, get(s + 4 * h * KEYS, j) * LN2)
        now, value_at = count, v_at
        count = min(KEYS, end - at - KEYS)
        k_at, v_at, next_k, next_v = next_k, next_v, k_at, v_at
        if count > 0:
            first = at + KEYS
            locate(
                k_at, v_at, k, k_strides, v, v_strides, block_size, table, list_at, listed, start, first, first + count, kind
            )
        if not values:
            continue
        for h in range(group):
            top, sum_, factor = weigh(s + 4 * h * KEYS, now, get(m, h), get(total, h))
            if factor != np.float32(1.0):
                multiply(acc + 4 * h * width, width, factor)
            put(m, h, top)
            put(total, h, sum_)
        fill(tile, width, value_at, now, dim, kind, k_at if count > 0 else 0)
        add_values(acc, s, tile, group, width, now)
    return acc


@device
def _run_tile(shape, unit, begin, end, scratch, q, q_strides, k, k_strides, v, v_strides, scale, kind):
    """Keys [begin, end) of a tile. Leaves acc: [width, TILE_LANES], m and l: [TILE_LANES] at the end of scratch."""
    group, dim, width = get_long(shape, GROUP), get_long(shape, DIM), get_long(shape, WIDTH)
    block_size = get_long(shape, BLOCK_SIZE)
    row, head, rows = get_long(unit, ROW), get_long(unit, HEAD), get_long(unit, TILE_ROWS)
    table, list_at, listed, start = get_long(unit, TABLE), get_long(unit, LIST), get_long(unit, LISTED), get_long(unit, START)
    lanes = rows * group
    seen = get_long(unit, COUNT) - rows + 1
    k_at, v_at = scratch, scratch + 4 * ADDRESSES
    tile = scratch + 16 * ADDRESSES
    s = tile + 4 * KEYS * width
    query = s + 4 * KEYS * TILE_LANES
    acc = query + 4 * TILE_LANES * width
    m = acc + 4 * TILE_LANES * width
    total = m + 4 * TILE_LANES
    factor = total + 4 * TILE_LANES
    clear(query, TILE_LANES * width, 0.0)
    clear(acc, TILE_LANES * width, 0.0)
    clear(m, TILE_LANES, NEG_INF)
    clear(total, TILE_LANES, 0.0)
    for r in range(lanes):
        source = (row + r // group) * q_strides[0] + (head * group + r % group) * q_strides[1]
        for c in range(dim):
            put(query, c * TILE_LANES + r, read(q, source + c, kind) * scale * LOG2E)
    k += size_of(kind) * head * k_strides[1]
    v += size_of(kind) * head * v_strides[1]
    for at in range(begin, end, KEYS):
        count = min(KEYS, end - at)
        locate(k_at, v_at, k, k_strides, v, v_strides, block_size, table, list_at, listed, start, at, at + count, kind)
        fill(tile, width, k_at, count, dim, kind, 0)
        for lane in range(0, TILE_LANES, LANES):
            for j in range(0, count, 8):  # past count: rows of an earlier block, ignored below
                fresh8x1(s + 4 * (j * TILE_LANES + lane), TILE_LANES, tile + 4 * j * width, width, 1, query + 4 * lane,
                       TILE_LANES, width)  # fmt: skip
        if at + count > seen:
            mask_tile(s, at, count, seen, group, lanes)
        weigh_tile(s, count, m, total, factor)
        for c in range(width):
            for r in range(TILE_LANES):
                put(acc, c * TILE_LANES + r, get(acc, c * TILE_LANES + r) * get(factor, r))
        fill(tile, width, v_at, count, dim, kind, 0)
        for lane in range(0, TILE_LANES, LANES):
            for c in range(0, width, 8):
                mac8x1(acc + 4 * (c * TILE_LANES + lane), TILE_LANES, tile + 4 * c, 1, width, s + 4 * lane, TILE_LANES, count)
    return acc


@device
def _merge_parts(parts, size, splits, lanes, width, lane_stride, column_stride):
    """Merge the states of all splits, in order, into the first."""
    m, total = 4 * lanes * width, 4 * lanes * (width + 1)
    for lane in range(lanes):
        top = NEG_INF
        for i in range(splits):
            top = max(top, get(parts + 4 * i * size + m, lane))
        shift = np.float32(0.0) if top == NEG_INF else top
        sum_ = np.float32(0.0)
        for i in range(splits):
            state = parts + 4 * i * size
            factor = exp2(get(state + m, lane) - shift)
            sum_ += get(state + total, lane) * factor
            target, source = parts + 4 * lane * lane_stride, state + 4 * lane * lane_stride
            if i == 0:
                for c in range(width):
                    put(target, c * column_stride, get(source, c * column_stride) * factor)
            else:
                for c in range(width):
                    at = c * column_stride
                    put(target, at, get(target, at) + get(source, at) * factor)
        put(parts + m, lane, top)
        put(parts + total, lane, sum_)


@device
def _emit(acc, lanes, width, dim, group, row, head, heads, lane_stride, column_stride, out, out_strides, lse, kind, stride):
    """Write normalised outputs and log-sum-exps. acc is followed by m and l, `stride` lanes each."""
    m = acc + 4 * stride * width
    total = m + 4 * stride
    for lane in range(lanes):
        sum_ = get(total, lane)
        inverse = np.float32(1.0) / sum_ if sum_ > np.float32(0.0) else np.float32(0.0)
        target_row, target_head = row + lane // group, head * group + lane % group
        at = target_row * out_strides[0] + target_head * out_strides[1]
        for c in range(dim):
            write(out, at + c, get(acc, lane * lane_stride + c * column_stride) * inverse, kind)
        if lse != 0:
            value = NEG_INF
            if sum_ > np.float32(0.0):
                value = get(m, lane) * LN2 + np.float32(np.log(sum_))
            put(lse, target_row * heads + target_head, value)


@device
def _work(
    shape, thread, heads, q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, logits, logit_strides, scale, kind
):
    """One thread: take tasks until none is left. Whoever finishes a unit's last split merges and writes it."""
    group, dim, width = get_long(shape, GROUP), get_long(shape, DIM), get_long(shape, WIDTH)
    scratch = get_long(shape, SCRATCH) + 4 * thread * get_long(shape, SCRATCH_SIZE)
    tasks, units = get_long(shape, TASKS), get_long(shape, UNITS)
    while True:
        task = fetch_add(get_long(shape, TASK_NEXT), 1)
        if task >= get_long(shape, TASK_COUNT):
            break
        number, split = get_long(tasks, 2 * task), get_long(tasks, 2 * task + 1)
        unit = units + 8 * UNIT_FIELDS * number
        splits, split_len = get_long(unit, SPLITS), get_long(unit, SPLIT_LEN)
        begin = split * split_len
        end = min(begin + split_len, get_long(unit, COUNT))
        rows = get_long(unit, TILE_ROWS)
        if rows > 0:
            lanes, stride, lane_stride, column_stride = rows * group, TILE_LANES, 1, TILE_LANES
            acc = _run_tile(shape, unit, begin, end, scratch, q, q_strides, k, k_strides, v, v_strides, scale, kind)
        else:
            lanes, stride, lane_stride, column_stride = group, group, width, 1
            wanted = logits if get_long(unit, ROW) < logit_strides[2] else 0
            acc = _run_single(shape, unit, begin, end, scratch, q, q_strides, k, k_strides, v, v_strides, wanted,
                              logit_strides, scale, kind)  # fmt: skip
        if v == 0:
            continue
        if splits > 1:
            size = stride * (width + 2)
            parts = get_long(shape, PARTS) + 4 * get_long(unit, PART)
            for i in range(size):
                put(parts + 4 * split * size, i, get(acc, i))
            if fetch_add(get_long(shape, DONE) + 8 * number, 1) != splits - 1:
                continue
            store(get_long(shape, DONE), number, np.int64(0))
            _merge_parts(parts, size, splits, stride, width, lane_stride, column_stride)
            acc = parts
        _emit(acc, lanes, width, dim, group, get_long(unit, ROW), get_long(unit, HEAD), heads, lane_stride, column_stride, out,
              out_strides, lse, kind, stride)  # fmt: skip


@entry(parallel=True)
def attend(shape, heads, q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, logits, logit_strides, scale, kind):
    """Run all tasks of a partition. Addresses and strides (in elements) as integers.

    q_strides, out_strides: (row, head); k_strides, v_strides: (block, head, token); logit_strides: (row, head, how many of
    the first rows, none of them in a tile, want logits). v, lse, logits: 0 if not wanted; without v there are only logits.
    kind: any value of the element type of q, K, V and out.
    """
    store(get_long(shape, TASK_NEXT), 0, np.int64(0))
    for thread in prange(get_long(shape, THREADS)):
        _work(shape, thread, heads, q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, logits, logit_strides,
              scale, kind)  # fmt: skip
