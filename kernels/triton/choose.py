"""From logits to lists: pooled shares, top-k, and which lists are made anew.

Every row goes its own way, by tiles of fixed width from its own first column: its bits depend on no other row, and rows that
are off or have nothing to choose from cost an early exit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import fp32, index, strides
from kvloom.kernels.interface import PoolHow, Renewal
from kvloom.kernels.reference import check_pool, check_renewal
from kvloom.kernels.triton.numbers import ordered, power_of_2, read

TILE = 1024
"""Columns that a program looks at together."""

WIDE = 32 * TILE
"""Most of a ranking's keys that a program holds in registers."""


@triton.jit
def _sum_up(logits, first, last, active, peaks, row_stride, head_stride, heads, ACTIVE: tl.constexpr, TILE: tl.constexpr):
    """The largest logit of a head's candidates (in base 2; 0 if all are -inf) and 1 / the sum of their weights (1 then)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(first + row), tl.load(last + row)
    if ACTIVE:
        end = tl.where(tl.load(active + row) < 0, begin, end)
    if begin < end:
        source, lane = logits + row * row_stride + head * head_stride, tl.arange(0, TILE)
        top = tl.full([TILE], -float("inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for at in range(begin, end, TILE):
            x = tl.load(source + at + lane, mask=at + lane < end, other=-float("inf")) * 1.4426950408889634
            higher = tl.maximum(top, x)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(top - base) + tl.exp2(x - base)
            top = higher
        peak = tl.max(top, axis=0)
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        weight = tl.sum(total * tl.exp2(top - peak), axis=0)
        tl.store(peaks + (row * heads + head) * 2, peak)
        tl.store(peaks + (row * heads + head) * 2 + 1, 1.0 / tl.maximum(weight, 1.0))  # that of the largest alone is 1


@triton.jit
def _pool(logits, first, last, active, peaks, out, row_stride, head_stride, out_row, out_group, heads, group,
          ACTIVE: tl.constexpr, SUM: tl.constexpr, WINDOW: tl.constexpr, DOUBLINGS: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """A tile of a group's ranking: TILE - WINDOW + 1 columns, of which the halves of windows at both ends are seen only."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1) * group
    begin, end = tl.load(first + row), tl.load(last + row)
    if ACTIVE:
        end = tl.where(tl.load(active + row) < 0, begin, end)
    lane, width = tl.arange(0, TILE), TILE - WINDOW + 1
    target = tl.program_id(0) * width
    if target < end - begin:
        column = begin + target - WINDOW // 2 + lane
        there = (column >= begin) & (column < end)
        found = tl.zeros([TILE], tl.float32)
        for one in range(group):
            x = tl.load(logits + row * row_stride + (head + one) * head_stride + column, mask=there, other=-float("inf"))
            peak = tl.load(peaks + (row * heads + head + one) * 2)
            share = tl.exp2(x * 1.4426950408889634 - peak) * tl.load(peaks + (row * heads + head + one) * 2 + 1)
            found = found + share if SUM else tl.maximum(found, share)
        for doubling in tl.static_range(DOUBLINGS):  # then a lane knows the largest of as many from its own on
            found = tl.maximum(found, tl.gather(found, tl.minimum(lane + (1 << doubling), TILE - 1), 0))
        if WINDOW > 1:
            found = tl.maximum(found, tl.gather(found, tl.minimum(lane + (WINDOW - (1 << DOUBLINGS)), TILE - 1), 0))
        kept = (lane < width) & (target + lane < end - begin)
        tl.store(out + row * out_row + tl.program_id(1) * out_group + target + lane, found, mask=kept)


def pool(logits: Tensor, first: Tensor, last: Tensor, groups: int, *, how: PoolHow, window: int, out: Tensor,
         active: Tensor | None = None) -> Tensor:  # fmt: skip
    """From logits to rankings; see `interface.Kernels.pool`. Peaks of heads pass through fresh memory, which a captured graph
    keeps as its own."""
    check_pool(logits, groups, how, window)
    rows, heads, _ = logits.shape
    for tensor in (first, last, *(() if active is None else (active,))):
        index(tensor, torch.int32)
    fp32(logits)
    fp32(out)
    if not (first.shape == last.shape == (rows,) and out.shape[:2] == (rows, groups)):
        raise ValueError(f"logits are {tuple(logits.shape)} in {groups} groups, but first is {tuple(first.shape)}, last "
                         f"{tuple(last.shape)} and out {tuple(out.shape)}; they must have one row each")  # fmt: skip
    if rows == 0 or out.shape[2] == 0:
        return out
    peaks = torch.empty(rows, heads, 2, dtype=torch.float32, device=out.device)
    common = (logits, first, last, active, peaks)
    _sum_up[rows, heads](*common, *strides(logits)[:2], heads, ACTIVE=active is not None, TILE=4 * TILE, num_warps=8)
    tile = max(TILE, power_of_2(2 * window))
    _pool[triton.cdiv(out.shape[2], tile - window + 1), groups, rows](
        *common, out, *strides(logits)[:2], *strides(out)[:2], heads, heads // groups, ACTIVE=active is not None,
        SUM=how == "sum", WINDOW=window, DOUBLINGS=window.bit_length() - 1, TILE=tile,
    )  # fmt: skip
    return out


@triton.jit
def _keys(source, column, length):
    """Keys of columns, 0 past the last."""
    return tl.where(column < length, ordered(tl.load(source + column, mask=column < length, other=0.0)), 0)


@triton.jit
def _bound(source, length, wanted, HELD: tl.constexpr, WIDE: tl.constexpr):
    """A key, and how many of its equals belong to the `wanted` largest keys, as do all larger ones: halves what lies between a
    key that enough are above and one that too few are above, and is done when a cut has just as many. HELD: a row's keys stay
    where they are compared."""
    lane, low, high = tl.arange(0, WIDE), tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    ties = wanted
    if HELD:
        held = _keys(source, lane, length)
    while low < high:
        middle = low + ((high - low) >> 1) + 1
        if HELD:
            count = tl.sum((held >= middle).to(tl.int32), axis=0)
        else:
            counts = tl.zeros([WIDE], tl.int32)
            for begin in range(0, length, WIDE):
                counts += (_keys(source, begin + lane, length) >= middle).to(tl.int32)
            count = tl.sum(counts, axis=0)
        ties = tl.where(count == wanted, 0, tl.where(count < wanted, wanted - count, ties))
        low = tl.where(count == wanted, middle - 1, tl.where(count > wanted, middle, low))
        high = tl.where(count > wanted, high, middle - 1)
    return low, ties


@triton.jit
def _select(scores, lengths, offset, at, columns, counts, row_stride, head_stride, out_row, out_head, heads, k,
            OFFSET: tl.constexpr, AT: tl.constexpr, COUNTS: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    """One ranking: finds the key of its last column, then writes columns in order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, lane, added = tl.load(lengths + row), tl.arange(0, TILE), 0
    if OFFSET:
        added = tl.load(offset + row)
    target, on = columns + row * out_row + head * out_head, True
    if AT:
        place = tl.load(at + row)
        target, on = columns + place + head * out_head, place >= 0
    if on:
        source, wanted = scores + row * row_stride + head * head_stride, tl.minimum(k, length)
        if length > k:
            bound, ties = _bound(source, length, wanted, HELD, WIDE)
            written, equals = 0, 0
            for begin in range(0, length, TILE):
                column = begin + lane
                key = _keys(source, column, length)
                equal = (key == bound) & (column < length)
                rank = equals + tl.cumsum(equal.to(tl.int32), axis=0)
                chosen = (key > bound) | (equal & (rank <= ties))
                position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(target + position, (column + added).to(tl.int32), mask=chosen)
                written += tl.sum(chosen.to(tl.int32), axis=0)
                equals += tl.sum(equal.to(tl.int32), axis=0)
        else:
            for begin in range(0, k, TILE):
                column = begin + lane
                tl.store(target + column, tl.where(column < length, column + added, -1).to(tl.int32), mask=column < k)
        if COUNTS:
            tl.store(counts + row * heads + head, wanted)


def select(scores: Tensor, lengths: Tensor, k: int, *, offset: Tensor | None = None,
           out: tuple[Tensor, Tensor | None] | None = None,
           at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Top-k with ties to the lower column; see `interface.Kernels.select`. NaN is not ordered meaningfully."""
    fp32(scores)
    rows, heads = scores.shape[0], 1 if scores.ndim == 2 else scores.shape[1]
    shape = scores.shape[:-1]
    columns, counts = out or (lengths.new_empty(*shape, k), lengths.new_empty(shape))
    for tensor in (lengths, offset, counts, at):
        if tensor is not None:
            index(tensor, torch.int32)
    wanted = (*shape, k) if at is None else (*shape[1:], k)
    if columns.dtype is not torch.int32 or columns.shape != wanted or (counts is not None and counts.shape != shape):
        raise ValueError(f"out must be int32 {list(wanted)} and {list(shape)}; got {columns.dtype} {tuple(columns.shape)} "
                         f"and {None if counts is None else tuple(counts.shape)}")  # fmt: skip
    steps = (*((0,) if at is not None else ()), *strides(columns)[:-1], *((0,) if scores.ndim == 2 else ()))
    wide = max(TILE, power_of_2(scores.shape[-1]))
    held, wide = wide <= WIDE, wide if wide <= WIDE else WIDE // 2
    if rows and heads:
        _select[rows, heads](
            scores, lengths, offset, at, columns, counts, scores.stride(0), 0 if scores.ndim == 2 else scores.stride(1), *steps,
            heads, k, OFFSET=offset is not None, AT=at is not None, COUNTS=counts is not None, HELD=held,
            WIDE=wide, TILE=min(wide, 4 * TILE), num_warps=max(4, wide // 1024),
        )  # fmt: skip
    return columns, counts


@triton.jit
def _renew(q, words, floats, at, stop, due, cos, sin, active, start, lengths, counts, q_row, q_head, cos_row, sin_row, heads,
           dim, half, lists, tail_at, query_at, width, recent, most, threshold, COMPARE: tl.constexpr, DENSE: tl.constexpr,
           TURN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, LISTS: tl.constexpr):  # fmt: skip
    """One row, whose query is three pieces: both halves of its pairs, and what is not turned."""
    row = tl.program_id(0).to(tl.int64)
    where, known, wanted = tl.load(at + row), tl.load(stop + row), tl.load(due + row)
    where = tl.maximum(where, 0)  # padding looks at a record that is not its own
    tail = tl.load(words + where + tail_at)
    have = tail < known
    anew = (wanted == 1) | (have == 0) | (known.to(tl.int64) - tail - recent > most)
    if COMPARE != "none":
        head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        there = (head < heads) & (pair < half)
        source, record = q + row * q_row + head * q_head, floats + where + query_at
        a, b = read(source + pair, there), read(source + half + pair, there)
        column = 2 * half + tl.arange(0, REST)[None, :]
        resting = (head < heads) & (column < dim)
        rest = read(source + column, resting)
        if TURN:
            c = tl.load(cos + row * cos_row + pair, mask=pair < half, other=0.0)
            s = tl.load(sin + row * sin_row + pair, mask=pair < half, other=0.0)
            first, second = a * c + b * s, b * c - a * s
        else:
            first, second = a, b
        if COMPARE == "mean":
            first, second = tl.sum(first, axis=0)[None, :] / heads, tl.sum(second, axis=0)[None, :] / heads
            rest, there, resting = tl.sum(rest, axis=0)[None, :] / heads, pair < half, column < dim
        else:
            record += head * dim
        kept = tl.load(record + pair, mask=there, other=0.0).to(tl.float64)
        product, own, old = first * kept, first.to(tl.float64) * first, kept * kept
        kept = tl.load(record + half + pair, mask=there, other=0.0).to(tl.float64)
        product, own, old = product + second * kept, own + second.to(tl.float64) * second, old + kept * kept
        kept = tl.load(record + column, mask=resting, other=0.0).to(tl.float64)
        products = tl.sum(product, axis=1) + tl.sum(rest * kept, axis=1)
        owns = tl.sum(own, axis=1) + tl.sum(rest.to(tl.float64) * rest, axis=1)
        olds = tl.sum(old, axis=1) + tl.sum(kept * kept, axis=1)
        if COMPARE == "flat":
            products, owns, olds = tl.sum(products, axis=0), tl.sum(owns, axis=0), tl.sum(olds, axis=0)
        cosine = products / tl.maximum(tl.sqrt(owns) * tl.sqrt(olds), 1e-38)
        if COMPARE == "min":
            cosine = tl.where(tl.arange(0, HEADS) < heads, cosine, 2.0)
        if COMPARE != "flat":
            cosine = tl.min(cosine, axis=0)
        anew = anew | ((wanted == 2) & (cosine < threshold))
    real = tl.load(at + row) >= 0
    anew = anew & real
    tl.debug_barrier()  # all have read the record
    if anew:
        tail_now = known - recent
        tl.store(words + where + tail_at, tail_now)
        if COMPARE != "none":
            tl.store(record + pair, first, mask=there)
            tl.store(record + half + pair, second, mask=there)
            tl.store(record + column, rest, mask=resting)
    else:
        tail_now = tail
    no_list = (anew & DENSE) | (real == 0)
    tl.store(active + row, tl.where(anew, where, -1))
    tl.store(start + row, tl.where(no_list, 0, tail_now))
    each = tl.arange(0, LISTS)
    tl.store(lengths + row * lists + each, tl.where(no_list, 0, width + tl.zeros([LISTS], tl.int32)), mask=each < lists)
    tl.atomic_add(counts + tl.where(anew, 0, 2), real.to(tl.int64))
    tl.atomic_add(counts + 1, (anew & have).to(tl.int64))


def renew(q: Tensor, words: Tensor, at: Tensor, stop: Tensor, due: Tensor, how: Renewal,
          angles: tuple[Tensor, Tensor] | None, active: Tensor, start: Tensor, lengths: Tensor,
          counts: Tensor) -> None:  # fmt: skip
    """Which lists are made anew; see `interface.Kernels.renew`. Cosines in fp64."""
    check_renewal(q, how, (at, stop, due, active, start), words, lengths, counts)
    rows, heads, dim = q.shape
    cos, sin = angles or (None, None)
    half = dim // 2
    if cos is not None and sin is not None:
        fp32(cos)
        fp32(sin)
        half = cos.shape[1]
    if rows:
        _renew[rows,](
            q, words, words.view(torch.float32), at, stop, due, cos, sin, active, start, lengths, counts, *strides(q)[:2],
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), heads, dim, half, lengths.shape[1],
            how.tail, how.query, how.width, how.recent, how.most, how.threshold, COMPARE=how.compare, DENSE=how.dense,
            TURN=angles is not None, HEADS=power_of_2(heads), HALF=power_of_2(half), REST=power_of_2(dim - 2 * half),
            LISTS=power_of_2(lengths.shape[1]), num_warps=8,
        )  # fmt: skip
