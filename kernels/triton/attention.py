"""Attention over paged KV, whole or through lists: one kernel for decode rows, chunks and scores, and one that merges splits.

A tile's positions come in columns: those of its list, then its tail. Blocks of columns are gathered through the block table
and added up with the usual running maximum; but maxima are rounded up to whole powers of two. So sums are rescaled exactly, and
what a row's splits give does not depend on who adds them up, one program or `merge`, as long as the order is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.numbers import INTERPRETED, rounded, wide

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
"""A maximum of nothing."""


@triton.jit
def power(exponent):
    """2 ** exponent of a whole number up to 0, exactly; 0 below -126."""
    return ((tl.maximum(exponent, -127.0) + 127.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b):
    """a @ b in fp32. The interpreter is silently wrong about bf16."""
    if INTERPRETED:
        return tl.dot(wide(a), wide(b), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def split_size(seen, SPLIT: tl.constexpr, SPLITS: tl.constexpr):
    """Positions of each of a tile's splits, by the number that its last row sees."""
    size = SPLIT + 0 * seen
    while size * SPLITS < seen:
        size *= 2
    return size


@triton.jit
def tile_of(unit, step, rows, first, last, heads, request, start, start_row, start_head, stop, offsets, lengths, list_row,
            list_head, KV_HEADS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """What a unit of work is: lane, KV head, first row, number of rows, request, start, offset, listed, and what its last row
    sees: nothing, if the head is left out. Units of a tile, `step` of them, follow each other."""
    lane, pair = unit % step, unit // step
    head, row = pair % KV_HEADS, pair // KV_HEADS
    if first is not None:
        row = tl.load(first + row)
    size = 1
    if TILE > 1:
        size = tl.minimum(TILE, tl.load(last + row) - row + 1)
    lister = head
    if heads is not None:
        lister = tl.load(heads + head)
    begin = tl.load(start + row * start_row + head * start_head)
    offset, listed = 0, 0
    if lengths is not None:
        at = row * list_row + tl.maximum(lister, 0) * list_head
        offset, listed = tl.load(offsets + at), tl.load(lengths + at)
    seen = listed + tl.load(stop + row + size - 1) - begin
    return lane, pair, head, row, size, tl.load(request + row), begin, offset, listed, seen, lister


@triton.jit
def steps_of(tiles, rows, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, KV_HEADS: tl.constexpr, TILE: tl.constexpr):
    """Units of work in all, and of each tile: 1 where a program does all of a tile's splits."""
    count = rows
    if tiles is not None:
        count = tl.load(tiles)
    step = tl.minimum(SPLITS, tl.maximum(1, PROGRAMS // tl.maximum(1, count * KV_HEADS * TILE)))
    return count * KV_HEADS * step, step


@triton.jit
def finish(sums, top, total, query, dims, row, head, there, out, out_row, out_head, lse, lse_row, words, at,
           counts, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Write what queries [M] of heads and rows [M] give: sums [M, D], top and total [M]. words, at, counts: of `Folded`."""
    inside = there[:, None] & (dims < DIM)[None, :]
    if counts is not None:
        count = tl.load(counts + row, mask=there, other=0)
        has = count > 0
        mine = has[:, None] & inside
        means = words + (tl.load(at + row, mask=has, other=0) + head // GROUP * DIM)[:, None] + dims[None, :]
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        key = tl.load(means, mask=mine, other=0.0) * share[:, None]
        value = tl.load(means + KV_HEADS * DIM, mask=mine, other=0.0) * share[:, None]
        logit = tl.sum(wide(query) * key, 1) * scale * LOG2E + tl.log2(tl.maximum(count, 1).to(tl.float32))
        logit = tl.where(has, logit, LOWEST)
        higher = tl.maximum(top, tl.ceil(logit))
        weight, kept = tl.where(has, tl.exp2(logit - higher), 0.0), power(top - higher)
        total = tl.where(has, total * kept + weight, total)
        sums = tl.where(has[:, None], sums * kept[:, None] + value * weight[:, None], sums)
        top = tl.where(has, higher, top)
    found = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + row[:, None].to(tl.int64) * out_row + head[:, None] * out_head + dims[None, :]
    tl.store(place, rounded(found, out.dtype.element_ty), mask=inside)
    if lse is not None:
        logs = tl.where(total == 0.0, -float("inf"), (top + tl.log2(tl.where(total == 0.0, 1.0, total))) / LOG2E)
        tl.store(lse + row.to(tl.int64) * lse_row + head, logs, mask=there)


@triton.jit
def attend(
    q, q_row, q_head, k, k_block, k_head, k_token, v, v_block, v_head, v_token, tables, tables_row, request, start, start_row,
    start_head, stop, positions, offsets, lengths, list_row, list_head, rows, tiles, first, last, heads, active, out, out_row,
    out_head, lse, lse_row, logits, logits_row, logits_head, logit_rows, width, sums_out, stats_out, totals, read, words, at,
    counts, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """One lane of a tile's splits for one KV head. Without `out`, products alone: then V is not read."""
    unit = tl.program_id(0)
    units, step = steps_of(tiles, rows, PROGRAMS, SPLITS, KV_HEADS, TILE)
    if unit >= units:
        return
    lane, pair, head, begins, size, of, begin, offset, listed, seen, lister = tile_of(
        unit, step, rows, first, last, heads, request, start, start_row, start_head, stop, offsets, lengths, list_row,
        list_head, KV_HEADS, TILE,
    )  # fmt: skip
    counted = totals + pair % COUNTERS * 5
    if out is not None and (lane == 0) & (head == 0) & (tl.load(stop + begins) > 0):
        tl.atomic_add(counted, size.to(tl.int64) if TILE > 1 else 1, sem="relaxed")
    if lister < 0:
        return
    if active is not None and tl.load(active + begins) < 0:
        return
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, query_head, there = begins + m // GROUP, head * GROUP + m % GROUP, m < size * GROUP
    sees = listed + tl.load(stop + row, mask=there, other=0) - begin
    if lane == 0:
        item: tl.constexpr = DIM * k.dtype.element_ty.primitive_bitwidth // 8
        if out is not None:
            total = tl.sum(tl.where(there & (m % GROUP == 0), sees, 0).to(tl.int64), 0)
            tl.atomic_add(counted + 1, total, sem="relaxed")
            tl.atomic_add(counted + 2, 2 * item * seen.to(tl.int64), sem="relaxed")
            if lengths is not None:
                tl.atomic_add(counted + 4, 2 * item * listed.to(tl.int64), sem="relaxed")
            if read is not None:
                tl.atomic_add(read + row, sees.to(tl.int64), mask=there & (m % GROUP == 0), sem="relaxed")
        else:
            tl.atomic_add(counted + 3, item * seen.to(tl.int64), sem="relaxed")
    far = row.to(tl.int64)
    inside = dims < DIM
    query = tl.load(
        q + (far * q_row + query_head * q_head)[:, None] + dims[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    span = split_size(seen, SPLIT, SPLITS)
    number = tl.cdiv(seen, span)
    alone = (step == 1) | (number <= 1)
    all_sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_total = tl.zeros([BLOCK_M], tl.float32)
    all_top = all_total + LOWEST
    for split in range(lane, number, step):
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = total + LOWEST
        for column in range(split * span, tl.minimum(seen, (split + 1) * span), BLOCK_N):
            columns = column + tl.arange(0, BLOCK_N)
            valid = columns < seen
            position = begin + columns - listed
            if lengths is not None:
                in_list = columns < listed
                position = tl.where(in_list, tl.load(positions + offset + columns, mask=in_list, other=0), position)
            block = tl.load(tables + of * tables_row + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
            slot = position % BLOCK_SIZE
            loaded = valid[:, None] & inside[None, :]
            key_at = block * k_block + slot * k_token + head.to(tl.int64) * k_head
            key = tl.load(k + key_at[:, None] + dims[None, :], mask=loaded, other=0.0)
            scores = product(query, tl.trans(key)) * scale
            visible = columns[None, :] < sees[:, None]
            if logits is not None:
                place = logits + (far * logits_row + query_head * logits_head)[:, None] + columns[None, :]
                tl.store(place, scores, mask=visible & (there & (row < logit_rows))[:, None] & (columns < width)[None, :])
            if out is not None:
                scores = tl.where(visible, scores * LOG2E, -float("inf"))
                higher = tl.maximum(top, tl.ceil(tl.max(scores, 1)))
                weights, kept = tl.exp2(scores - higher[:, None]), power(top - higher)
                total = total * kept + tl.sum(weights, 1)
                value_at = block * v_block + slot * v_token + head.to(tl.int64) * v_head
                value = tl.load(v + value_at[:, None] + dims[None, :], mask=loaded, other=0.0)
                sums = sums * kept[:, None] + product(rounded(weights, v.dtype.element_ty), value)
                top = higher
        if out is not None:
            if not alone:
                index = (pair * (TILE * GROUP) + m).to(tl.int64) * SPLITS + split
                tl.store(sums_out + index[:, None] * DIM + dims[None, :], sums, mask=there[:, None] & inside[None, :])
                tl.store(stats_out + 2 * index, top, mask=there)
                tl.store(stats_out + 2 * index + 1, total, mask=there)
            higher = tl.maximum(all_top, top)
            kept, weight = power(all_top - higher), power(top - higher)
            all_sums = all_sums * kept[:, None] + sums * weight[:, None]
            all_total = all_total * kept + total * weight
            all_top = higher
    if out is not None and alone & (lane == 0):
        finish(all_sums, all_top, all_total, query, dims, row, query_head, there, out, out_row, out_head, lse, lse_row, words,
               at, counts, scale, KV_HEADS, GROUP, DIM)  # fmt: skip


@triton.jit
def merge(
    q, q_row, q_head, request, start, start_row, start_head, stop, offsets, lengths, list_row, list_head, rows, tiles, first,
    last, heads, out, out_row, out_head, lse, lse_row, sums_in, stats_in, words, at, counts, scale, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A query's splits, in order, where they were left in scratch."""
    units, step = steps_of(tiles, rows, PROGRAMS, SPLITS, KV_HEADS, TILE)
    query = tl.program_id(0)
    pair, inner = query // (TILE * GROUP), query % (TILE * GROUP)
    if (step == 1) | (pair * step >= units):
        return
    _, _, head, begins, size, _, _, _, _, seen, lister = tile_of(
        pair * step, step, rows, first, last, heads, request, start, start_row, start_head, stop, offsets, lengths, list_row,
        list_head, KV_HEADS, TILE,
    )  # fmt: skip
    span = split_size(seen, SPLIT, SPLITS)
    number = tl.cdiv(seen, span)
    if (lister < 0) | (number <= 1) | (inner >= size * GROUP):
        return
    dims, one = tl.arange(0, BLOCK_D), tl.arange(0, 1)
    inside = (dims < DIM)[None, :]
    row, query_head = begins + inner // GROUP + one, head * GROUP + inner % GROUP + one
    index = query.to(tl.int64) * SPLITS + one
    top = tl.zeros([1], tl.float32) + LOWEST
    for split in range(number):
        top = tl.maximum(top, tl.load(stats_in + 2 * (index + split)))
    sums, total = tl.zeros([1, BLOCK_D], tl.float32), tl.zeros([1], tl.float32)
    for split in range(0, number, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # loads that need not wait for each other
            there = (split + i + one) < number
            entry = index + split + i
            weight = power(tl.load(stats_in + 2 * entry, mask=there, other=LOWEST) - top)
            total += tl.load(stats_in + 2 * entry + 1, mask=there, other=0.0) * weight
            part = tl.load(sums_in + entry[:, None] * DIM + dims[None, :], mask=there[:, None] & inside, other=0.0)
            sums += part * weight[:, None]
    value = tl.load(q + (row.to(tl.int64) * q_row + query_head * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)
    finish(sums, top, total, value, dims, row, query_head, row >= 0, out, out_row, out_head, lse, lse_row, words, at, counts,
           scale, KV_HEADS, GROUP, DIM)  # fmt: skip


@triton.jit
def fold(
    k, k_block, k_head, k_token, v, v_block, v_head, v_token, tables, tables_row, request, first, last, words, at, origin,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a row's keys or values of a head to its sums, block by block, in fp64."""
    row, head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.load(at + row)
    if place < 0:
        return
    begin, end, dims = tl.load(first + row), tl.load(last + row), tl.arange(0, BLOCK_D)
    inside = dims < DIM
    record = words + place + (which * KV_HEADS + head) * DIM + dims
    total = tl.load(record, mask=inside & (begin > origin), other=0.0).to(tl.float64)
    inner = tl.arange(0, BLOCK_N)
    for block in range(begin // BLOCK_SIZE, tl.cdiv(end, BLOCK_SIZE)):
        position = block * BLOCK_SIZE + inner
        there = ((inner < BLOCK_SIZE) & (position >= begin) & (position < end))[:, None] & inside[None, :]
        found = tl.load(tables + tl.load(request + row) * tables_row + block).to(tl.int64)
        if which == 0:
            lies = k + found * k_block + head.to(tl.int64) * k_head + inner * k_token
        else:
            lies = v + found * v_block + head.to(tl.int64) * v_head + inner * v_token
        part = tl.load(lies[:, None] + dims[None, :], mask=there, other=0.0)
        total += tl.sum(wide(part), 0).to(tl.float64)
    tl.store(record, total.to(tl.float32), mask=inside)
