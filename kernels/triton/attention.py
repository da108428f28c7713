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
STATS: tl.constexpr = tl.constexpr(4)
"""Numbers behind a query's sums in scratch: the maximum, the total, and two that keep the next sums aligned."""

COUNTS = ["rows", "tables_row", "start_row", "start_head", "list_row", "list_head", "lse_row", "logits_row", "logits_head",
          "logit_rows", "width", "least", "splits", "skip"]  # fmt: skip
"""Numbers of which Triton need not know whether they are 1 or multiples of 16: no variant is compiled for it."""
INDICES = ["tables", "request", "start", "stop", "positions", "offsets", "lengths", "tiles", "first", "last", "heads", "active",
           "read", "words", "at", "counts"]  # fmt: skip
"""Tensors of which it need not know whether they begin at multiples of 16 bytes."""


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
def split_size(seen, least, splits, CHUNK: tl.constexpr):
    """Positions of each of a tile's splits: `least` of a chunk, else by the number that the row sees."""
    size = least + 0 * seen
    if not CHUNK:
        while size * splits < seen:
            size *= 2
    return size


@triton.jit
def tile_of(unit, step, skip, request, start, start_row, start_head, stop, offsets, lengths, list_row, list_head, first, last,
            heads, KV_HEADS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """What a unit of work is: lane, tile and KV head in one number, KV head, first row, number of rows, request, start, offset,
    listed, what its last row sees, and whose list the head reads. Units of a tile, `step` of them, follow each other."""
    lane, pair = unit % step, unit // step
    head, row, size = pair % KV_HEADS, skip + pair // KV_HEADS // PARTS, 1
    if first is not None:
        row = tl.load(first + row)
    if last is not None:
        end = tl.load(last + row) + 1
        row += pair // KV_HEADS % PARTS * TILE
        size = tl.minimum(TILE, tl.maximum(end - row, 0))
        row = tl.minimum(row, end - 1)
    lister = head
    if heads is not None:
        lister = tl.load(heads + head)
    begin = tl.load(start + row * start_row + head * start_head)
    offset, listed = 0, 0
    if lengths is not None:
        at = row * list_row + tl.maximum(lister, 0) * list_head
        offset, listed = tl.load(offsets + at), tl.load(lengths + at)
    seen = listed + tl.load(stop + row + tl.maximum(size - 1, 0)) - begin
    return lane, pair, head, row, size, tl.load(request + row), begin, offset, listed, seen, lister


@triton.jit
def steps_of(tiles, rows, skip, splits, PROGRAMS: tl.constexpr, FEWEST: tl.constexpr, KV_HEADS: tl.constexpr,
             PARTS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Units of work in all, and of each tile: of a chunk one for each split, else 1 where a program does all of a row's splits,
    or at least FEWEST."""
    count = rows
    if tiles is not None:
        count = tl.load(tiles)
    pairs = tl.maximum(count - skip, 0) * PARTS * KV_HEADS
    if CHUNK:
        return pairs * splits, splits
    step = PROGRAMS // tl.maximum(1, pairs)
    step = tl.where(step < FEWEST, 1, tl.minimum(splits, step))
    return pairs * step, step


@triton.jit
def add_folded(sums, top, total, query, dims, inside, row, head, words, at, counts, scale, there, KV_HEADS: tl.constexpr,
               GROUP: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """One more position of rows, where there is one: see `interface.Folded`."""
    count = tl.load(counts + row, mask=there, other=0)
    has = count > 0
    mine = has[:, None] & inside
    means = words + (tl.load(at + row, mask=has, other=0) + head // GROUP * DIM)[:, None] + dims[None, :]
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    key = tl.load(means, mask=mine, other=0.0) * share[:, None]
    logit = tl.sum(wide(query) * key, 1) * scale * LOG2E + tl.log2(tl.maximum(count, 1).to(tl.float32))
    higher = tl.maximum(top, tl.ceil(tl.where(has, logit, LOWEST)))
    weight, kept = tl.where(has, tl.exp2(logit - higher), 0.0), power(top - higher)
    total = tl.where(has, total * kept + weight, total)
    value = tl.load(means + KV_HEADS * DIM, mask=mine, other=0.0) * share[:, None]
    sums = tl.where(has[:, None], sums * kept[:, None] + value * weight[:, None], sums)
    return sums, tl.where(has, higher, top), total


@triton.jit
def finish(sums, top, total, query, dims, row, head, there, out, out_row, out_head, lse, lse_row, words, at,
           counts, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Write what queries [M] of heads and rows [M] give: sums [M, D], top and total [M]. words, at, counts: of `Folded`."""
    inside = there[:, None] & (dims < DIM)[None, :]
    if counts is not None:
        sums, top, total = add_folded(sums, top, total, query, dims, inside, row, head, words, at, counts, scale, there,
                                      KV_HEADS, GROUP, DIM)  # fmt: skip
    found = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + row[:, None].to(tl.int64) * out_row + head[:, None] * out_head + dims[None, :]
    tl.store(place, rounded(found, out.dtype.element_ty), mask=inside)
    if lse is not None:
        logs = tl.where(total == 0.0, -float("inf"), (top + tl.log2(tl.where(total == 0.0, 1.0, total))) / LOG2E)
        tl.store(lse + row.to(tl.int64) * lse_row + head, logs, mask=there)


@triton.jit
def count_up(counted, read, row, own, sees, seen, listed, ITEM: tl.constexpr, OUT: tl.constexpr, LISTS: tl.constexpr):
    """Add to `Counters` what a tile reads for one KV head; own: [M] bool, the first query of each row."""
    if OUT:
        tl.atomic_add(counted + 1, tl.sum(tl.where(own, sees, 0).to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(counted + 2, 2 * ITEM * seen.to(tl.int64), sem="relaxed")
        if LISTS:
            tl.atomic_add(counted + 4, 2 * ITEM * listed.to(tl.int64), sem="relaxed")
        if read is not None:
            tl.atomic_add(read + row, sees.to(tl.int64), mask=own, sem="relaxed")
    else:
        tl.atomic_add(counted + 3, ITEM * seen.to(tl.int64), sem="relaxed")


@triton.jit
def add_columns(
    first, end, query, dims, inside, sees, seen, begin, listed, chosen, table, keys, k_block, k_token, values, v_block, v_token,
    places, logged, width, scale, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums [M, D], maximum and total [M] of columns [first, end). keys and values begin at the KV head, chosen at the list,
    places [M] where logits go of those queries that are `logged`. Without values, logits alone."""
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = total + LOWEST
    for column in range(first, end, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        valid = columns < seen
        position = begin + columns - listed
        if chosen is not None:
            in_list = columns < listed
            position = tl.where(in_list, tl.load(chosen + columns, mask=in_list, other=0), position)
        block = tl.load(table + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        slot = position % BLOCK_SIZE
        loaded = valid[:, None] & inside[None, :]
        key = tl.load(keys + (block * k_block + slot * k_token)[:, None] + dims[None, :], mask=loaded, other=0.0)
        scores = product(query, tl.trans(key)) * scale
        visible = columns[None, :] < sees[:, None]
        if places is not None:
            tl.store(places[:, None] + columns[None, :], scores, mask=visible & logged[:, None] & (columns < width)[None, :])
        if values is not None:
            scores = tl.where(visible, scores * LOG2E, -float("inf"))
            higher = tl.maximum(top, tl.ceil(tl.max(scores, 1)))
            weights, kept = tl.exp2(scores - higher[:, None]), power(top - higher)
            total = total * kept + tl.sum(weights, 1)
            value = tl.load(values + (block * v_block + slot * v_token)[:, None] + dims[None, :], mask=loaded, other=0.0)
            sums = sums * kept[:, None] + product(rounded(weights, value.dtype), value)
            top = higher
    return sums, top, total


@triton.jit
def put(partial, index, dims, inside, there, sums, top, total, DIM: tl.constexpr):
    """Leave partial results of queries [M] in scratch, in the entries `index`."""
    entry = partial + index * (DIM + STATS)
    tl.store(entry[:, None] + dims[None, :], sums, mask=there[:, None] & inside[None, :])
    tl.store(entry + DIM, top, mask=there)
    tl.store(entry + DIM + 1, total, mask=there)


@triton.jit
def add_splits(
    lane, number, step, span, alone, partial, index, there, query, dims, inside, sees, seen, begin, listed, chosen, table, keys,
    k_block, k_token, values, v_block, v_token, places, logged, width, scale, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same of every `step`-th split from `lane` on, one after the other; each by itself is left in scratch, too, unless a
    program does them `alone`."""
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = total + LOWEST
    for split in range(lane, number, step):
        own_sums, own_top, own_total = add_columns(
            split * span, tl.minimum(seen, (split + 1) * span), query, dims, inside, sees, seen, begin, listed, chosen, table,
            keys, k_block, k_token, values, v_block, v_token, places, logged, width, scale, BLOCK_SIZE, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        if values is not None:
            if not alone:
                put(partial, index + split, dims, inside, there, own_sums, own_top, own_total, DIM)
            higher = tl.maximum(top, own_top)
            kept, weight = power(top - higher), power(own_top - higher)
            sums = sums * kept[:, None] + own_sums * weight[:, None]
            total = total * kept + own_total * weight
            top = higher
    return sums, top, total


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def attend(
    q, q_row, q_head, k, k_block, k_head, k_token, v, v_block, v_head, v_token, tables, tables_row, request, start, start_row,
    start_head, stop, positions, offsets, lengths, list_row, list_head, rows, tiles, skip, first, last, heads, active, out,
    out_row, out_head, lse, lse_row, logits, logits_row, logits_head, logit_rows, width, partial, totals, read, words, at,
    counts, scale, least, splits, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, PROGRAMS: tl.constexpr, FEWEST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """A split of a tile, or a lane of a row's splits, for one KV head. Without `out`, products alone: then V is not read."""
    CHUNK: tl.constexpr = last is not None
    unit = tl.program_id(0)
    units, step = steps_of(tiles, rows, skip, splits, PROGRAMS, FEWEST, KV_HEADS, PARTS, CHUNK)
    if unit >= units:
        return
    lane, pair, head, begins, size, of, begin, offset, listed, seen, lister = tile_of(
        unit, step, skip, request, start, start_row, start_head, stop, offsets, lengths, list_row, list_head, first, last,
        heads, KV_HEADS, TILE, PARTS,
    )  # fmt: skip
    counted = totals + pair % COUNTERS * 5
    if out is not None and (lane == 0) & (head == 0):
        tl.atomic_add(counted, size.to(tl.int64) if CHUNK else (tl.load(stop + begins) > 0).to(tl.int64), sem="relaxed")
    span = split_size(seen, least, splits, CHUNK)
    number = tl.cdiv(seen, span)
    if (lister < 0) | (size == 0) | (lane >= tl.maximum(number, 1)):
        return
    if active is not None and tl.load(active + begins) < 0:
        return
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, query_head, there = begins + m // GROUP, head * GROUP + m % GROUP, m < size * GROUP
    sees, inside = listed + tl.load(stop + row, mask=there, other=0) - begin, dims < DIM
    if lane == 0:
        item: tl.constexpr = DIM * k.dtype.element_ty.primitive_bitwidth // 8
        count_up(counted, read, row, there & (m % GROUP == 0), sees, seen, listed, item, out is not None,
                 lengths is not None)  # fmt: skip
    far = row.to(tl.int64)
    query = tl.load(
        q + (far * q_row + query_head * q_head)[:, None] + dims[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    chosen, places, logged, values = None, None, None, None
    if lengths is not None:
        chosen = positions + offset
    if logits is not None:
        places, logged = logits + far * logits_row + query_head * logits_head, there & (row < logit_rows)
    if out is not None:
        values = v + head.to(tl.int64) * v_head
    table, keys = tables + of * tables_row, k + head.to(tl.int64) * k_head
    index = (pair * (TILE * GROUP) + m).to(tl.int64) * splits
    if CHUNK:
        sums, top, total = add_columns(
            lane * span, tl.minimum(seen, (lane + 1) * span), query, dims, inside, sees, seen, begin, listed, chosen, table,
            keys, k_block, k_token, values, v_block, v_token, places, logged, width, scale, BLOCK_SIZE, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        alone = (number <= 1) & (counts is None)  # one more position would take too many registers
        if out is not None and not alone:
            put(partial, index + lane, dims, inside, there, sums, top, total, DIM)
    else:
        alone = (step == 1) | (number <= 1)
        sums, top, total = add_splits(
            lane, number, step, span, alone, partial, index, there, query, dims, inside, sees, seen, begin, listed, chosen,
            table, keys, k_block, k_token, values, v_block, v_token, places, logged, width, scale, DIM, BLOCK_SIZE, BLOCK_M,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if out is not None and alone & (lane == 0):
        finish(sums, top, total, query, dims, row, query_head, there, out, out_row, out_head, lse, lse_row, words, at, counts,
               scale, KV_HEADS, GROUP, DIM)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def merge(
    q, q_row, q_head, request, start, start_row, start_head, stop, offsets, lengths, list_row, list_head, rows, tiles, skip,
    first, last, heads, out, out_row, out_head, lse, lse_row, partial, words, at, counts, scale, least, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr, FEWEST: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A query's splits, in order, where they were left in scratch."""
    units, step = steps_of(tiles, rows, skip, splits, PROGRAMS, FEWEST, KV_HEADS, PARTS, last is not None)
    query = tl.program_id(0)
    pair, inner = query // (TILE * GROUP), query % (TILE * GROUP)
    if pair * step >= units:
        return
    if last is None and step == 1:
        return
    _, _, head, begins, size, _, _, _, _, seen, lister = tile_of(
        pair * step, step, skip, request, start, start_row, start_head, stop, offsets, lengths, list_row, list_head, first,
        last, heads, KV_HEADS, TILE, PARTS,
    )  # fmt: skip
    number = tl.cdiv(seen, split_size(seen, least, splits, last is not None))
    if last is not None and counts is not None:
        number = tl.maximum(number, 1)
    elif number <= 1:
        return
    if (lister < 0) | (inner >= size * GROUP):
        return
    dims, one = tl.arange(0, BLOCK_D), tl.arange(0, 1)
    inside = (dims < DIM)[None, :]
    row, query_head = begins + inner // GROUP + one, head * GROUP + inner % GROUP + one
    entries = partial + (query.to(tl.int64) * splits + one) * (DIM + STATS)
    top = tl.zeros([1], tl.float32) + LOWEST
    for split in range(number):
        top = tl.maximum(top, tl.load(entries + split * (DIM + STATS) + DIM))
    sums, total = tl.zeros([1, BLOCK_D], tl.float32), tl.zeros([1], tl.float32)
    for split in range(0, number, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # loads that need not wait for each other
            there = (split + i + one) < number
            entry = entries + (split + i) * (DIM + STATS)
            weight = power(tl.load(entry + DIM, mask=there, other=LOWEST) - top)
            total += tl.load(entry + DIM + 1, mask=there, other=0.0) * weight
            part = tl.load(entry[:, None] + dims[None, :], mask=there[:, None] & inside, other=0.0)
            sums += part * weight[:, None]
    value = tl.load(q + (row.to(tl.int64) * q_row + query_head * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)
    finish(sums, top, total, value, dims, row, query_head, row >= 0, out, out_row, out_head, lse, lse_row, words, at, counts,
           scale, KV_HEADS, GROUP, DIM)  # fmt: skip
