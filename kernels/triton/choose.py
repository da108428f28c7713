"""From logits to rankings, and which lists are made anew.

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
from kvloom.kernels.triton.numbers import aligned, multiple, power_of_2, read

TILE = 1024
"""Columns that a program looks at together, or more for wider windows."""

INDICES = ["first", "last", "active", "at", "stop", "due", "start", "lengths", "words", "floats", "counts"]
"""Tensors of which Triton need not know where they begin."""
STEPS = ["row_stride", "head_stride", "out_row", "out_group"]
"""Numbers that depend on how long candidates are: no variant is compiled for them."""


@triton.jit
def _candidates(first, last, active, row):
    """A row's columns [begin, end), and the multiple of 16 at or below `begin`, from which threads read several at once."""
    begin, end = tl.load(first + row), tl.load(last + row)
    if active is not None:
        end = tl.where(tl.load(active + row) < 0, begin, end)
    return begin, end, begin // 16 * 16


@triton.jit
def _logits(source, column, begin, end, ALIGNED: tl.constexpr):
    """-inf for what is no candidate."""
    if ALIGNED:
        x = tl.load(source + column, mask=(column >= begin // 16 * 16) & (column < tl.cdiv(end, 16) * 16), other=-float("inf"))
        return tl.where((column >= begin) & (column < end), x, -float("inf"))
    return tl.load(source + column, mask=(column >= begin) & (column < end), other=-float("inf"))


@triton.jit(do_not_specialize=STEPS, do_not_specialize_on_alignment=INDICES)
def _sum_up(logits, first, last, active, peaks, row_stride, head_stride, heads, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """The largest logit of a head's candidates (in base 2; 0 if all are -inf) and 1 / the sum of their weights (1 then)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end, origin = _candidates(first, last, active, row)
    if begin < end:
        source = logits + row * multiple(row_stride, ALIGNED) + head * multiple(head_stride, ALIGNED)
        lane = tl.arange(0, TILE)
        top = tl.full([TILE], -float("inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for at in range(origin, end, TILE):
            x = _logits(source, at + lane, begin, end, ALIGNED) * 1.4426950408889634
            higher = tl.maximum(top, x)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(top - base) + tl.exp2(x - base)
            top = higher
        peak = tl.max(top, axis=0)
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        weight = tl.sum(total * tl.exp2(top - peak), axis=0)
        tl.store(peaks + (row * heads + head) * 2, peak)
        tl.store(peaks + (row * heads + head) * 2 + 1, 1.0 / tl.maximum(weight, 1.0))  # that of the largest alone is 1


@triton.jit(do_not_specialize=STEPS, do_not_specialize_on_alignment=INDICES)
def _pool(logits, first, last, active, peaks, out, row_stride, head_stride, out_row, out_group, heads, group,
          ALIGNED: tl.constexpr, SUM: tl.constexpr, WINDOW: tl.constexpr, DOUBLINGS: tl.constexpr, HALO: tl.constexpr,
          WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """WIDTH columns of a group's ranking, of TILE that are read: HALO before them, at least half a window, and some behind."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1) * group
    begin, end, origin = _candidates(first, last, active, row)
    lane, at = tl.arange(0, TILE), origin + tl.program_id(0) * WIDTH
    if at < end:
        column = at - HALO + lane
        found = tl.zeros([TILE], tl.float32)
        for one in range(group):
            source = logits + row * multiple(row_stride, ALIGNED) + (head + one) * multiple(head_stride, ALIGNED)
            x = _logits(source, column, begin, end, ALIGNED)
            peak = tl.load(peaks + (row * heads + head + one) * 2)
            share = tl.exp2(x * 1.4426950408889634 - peak) * tl.load(peaks + (row * heads + head + one) * 2 + 1)
            found = found + share if SUM else tl.maximum(found, share)
        for doubling in tl.static_range(DOUBLINGS):  # then a lane knows the largest of as many from its own on
            found = tl.maximum(found, tl.gather(found, tl.minimum(lane + (1 << doubling), TILE - 1), 0))
        if WINDOW > 1:
            found = tl.maximum(found, tl.gather(found, tl.minimum(lane + (WINDOW - (1 << DOUBLINGS)), TILE - 1), 0))
        column += WINDOW // 2
        kept = (column >= tl.maximum(at, begin)) & (column < tl.minimum(at + WIDTH, end))
        tl.store(out + row * out_row + tl.program_id(1) * out_group + column - begin, found, mask=kept)


def pool(logits: Tensor, first: Tensor, last: Tensor, groups: int, scratch: Tensor, *, how: PoolHow, window: int, out: Tensor,
         active: Tensor | None = None) -> Tensor:  # fmt: skip
    """From logits to rankings; see `interface.Kernels.pool`. scratch: fp32, two numbers for each head of as many rows as there
    is room for; others come later."""
    check_pool(logits, groups, how, window)
    rows, heads, _ = logits.shape
    for tensor in (first, last, *(() if active is None else (active,))):
        index(tensor, torch.int32)
    fp32(logits)
    fp32(out)
    if not (first.shape == last.shape == (rows,) and out.shape[:2] == (rows, groups)):
        raise ValueError(f"logits are {tuple(logits.shape)} in {groups} groups, but first is {tuple(first.shape)}, last "
                         f"{tuple(last.shape)} and out {tuple(out.shape)}; they must have one row each")  # fmt: skip
    tile, halo = max(TILE, power_of_2(3 * window)), -(-(window // 2) // 16) * 16
    width, most = (tile - halo - window // 2) // 16 * 16, len(scratch) // max(1, 2 * heads)
    for begin in range(0, rows if out.shape[2] else 0, most):
        part = slice(begin, begin + most)
        count, same = len(logits[part]), aligned(logits)
        common = (logits[part], first[part], last[part], None if active is None else active[part], scratch)
        _sum_up[count, heads](*common, *strides(logits)[:2], heads, ALIGNED=same, TILE=4 * TILE, num_warps=8)
        _pool[triton.cdiv(out.shape[2] + 15, width), groups, count](
            *common, out[part], *strides(logits)[:2], *strides(out)[:2], heads, heads // groups, ALIGNED=same,
            SUM=how == "sum", WINDOW=window, DOUBLINGS=window.bit_length() - 1, HALO=halo, WIDTH=width, TILE=tile,
        )  # fmt: skip
    return out


@triton.jit
def _pieces(source, cos, sin, pair, there, column, resting, half, TURN: tl.constexpr):
    """A row's query in three pieces: both halves of its pairs, turned back, and what is not turned."""
    a, b, rest = read(source + pair, there), read(source + half + pair, there), read(source + column, resting)
    if TURN:
        c = tl.load(cos + pair, mask=pair < half, other=0.0)
        s = tl.load(sin + pair, mask=pair < half, other=0.0)
        return a * c + b * s, b * c - a * s, rest
    return a, b, rest


@triton.jit
def _products(record, first, second, rest, pair, column, half, there, resting):
    """[heads] fp64 each: a query by the one that was kept, by itself, and the kept one by itself."""
    kept = tl.load(record + pair, mask=there, other=0.0).to(tl.float64)
    product, own, old = first * kept, first.to(tl.float64) * first, kept * kept
    kept = tl.load(record + half + pair, mask=there, other=0.0).to(tl.float64)
    product, own, old = product + second * kept, own + second.to(tl.float64) * second, old + kept * kept
    kept = tl.load(record + column, mask=resting, other=0.0).to(tl.float64)
    products = tl.sum(product, axis=1) + tl.sum(rest * kept, axis=1)
    owns = tl.sum(own, axis=1) + tl.sum(rest.to(tl.float64) * rest, axis=1)
    return products, owns, tl.sum(old, axis=1) + tl.sum(kept * kept, axis=1)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _renew(q, words, floats, at, stop, due, cos, sin, active, start, lengths, counts, q_row, q_head, cos_row, sin_row, heads,
           dim, half, lists, tail_at, query_at, width, recent, most, threshold, COMPARE: tl.constexpr, DENSE: tl.constexpr,
           TURN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, LISTS: tl.constexpr):  # fmt: skip
    """One row."""
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
        column = 2 * half + tl.arange(0, REST)[None, :]
        resting = (head < heads) & (column < dim)
        if TURN:
            cos += row * cos_row
            sin += row * sin_row
        first, second, rest = _pieces(source, cos, sin, pair, there, column, resting, half, TURN)
        if COMPARE == "mean":
            first, second = tl.sum(first, axis=0)[None, :] / heads, tl.sum(second, axis=0)[None, :] / heads
            rest, there, resting = tl.sum(rest, axis=0)[None, :] / heads, pair < half, column < dim
        else:
            record += head * dim
        products, owns, olds = _products(record, first, second, rest, pair, column, half, there, resting)
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
