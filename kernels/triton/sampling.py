"""Drawing tokens without sorting: rows are cut into parts, each a program's, which leave little for one program to end with.

    peaks     the likeliest token of each part
    sums      how many tokens of a part, and what they weigh, are in each of BUCKETS bands of likelihood
    gather    which tokens can matter, by those sums: down to the band in which the last token that stays must be
    finish    among these, in each row, the token at which weights, added up in order, reach a share, digit by digit of its key

Weights are whole numbers, of which the likeliest token has 2^40: sums are exact in any order, and the same tokens are drawn
whatever else is in the batch. A token less likely than 2^-40 of that weighs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import fp32, strides
from kvloom.kernels.reference import check_sample
from kvloom.kernels.triton.numbers import aligned, multiple, ordered, power_of_2

PART = 8192
"""Tokens of a part."""
TILE = 1024
"""Tokens that the program of a row looks at together."""
BUCKETS: tl.constexpr = tl.constexpr(16)
"""Bands of 2.8 powers of two each; tokens of the last weigh nothing."""
WORDS = 2 + 2 * 16
"""Numbers of 8 bytes that a part leaves."""

COUNTS, OWN = ["vocab", "parts"], ["how", "out", "scratch", "chosen"]
"""Numbers and tensors of which Triton need not know whether they are, or begin at, multiples of 16."""


@triton.jit
def _weigh(x, top, temperature, min_p):
    weight = tl.exp2((x - top) / temperature * 1.4426950408889634)
    return (tl.where(weight < min_p, 0.0, weight) * 1099511627776.0).to(tl.int64)


@triton.jit
def _bucket(x, top, temperature):
    """The band of a token, which no less likely one is in front of."""
    return tl.minimum((top - x) / temperature * (1.4426950408889634 * 15 / 42), 15.0).to(tl.int32)


@triton.jit
def _part(source, row_stride, row, begin, vocab, ALIGNED: tl.constexpr, PART: tl.constexpr):
    """A part's ids, whether there are such, and their logits: where rows are `aligned`, to the end of 16, so that a thread
    reads four at once."""
    column = begin + tl.arange(0, PART)
    there, source = column < vocab, source + row * multiple(row_stride, ALIGNED)
    if ALIGNED:
        x = tl.load(source + column, mask=column < tl.cdiv(vocab, 16) * 16, other=-float("inf"))
        return column, there, tl.where(there, x, -float("inf"))
    return column, there, tl.load(source + column, mask=there, other=-float("inf"))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=OWN)
def _peaks(logits, row_stride, scratch, vocab, WORDS: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr):
    """Leaves a part's largest logit, and behind it the first token that has it, or -1 where something is not finite."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, _, x = _part(logits, row_stride, row, part * PART, vocab, ALIGNED, PART)
    top = tl.max(x, axis=0)
    first = tl.min(tl.where(x == top, column, vocab), axis=0)
    bad = tl.max(((x < float("inf")) == 0).to(tl.int32), axis=0) > 0
    left = scratch + (row * tl.num_programs(1) + part) * WORDS
    tl.store(left, top.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(left + 1, tl.where(bad, -1, first).to(tl.int64))


@triton.jit
def _likeliest(scratch, row, parts, vocab, WORDS: tl.constexpr, PARTS: tl.constexpr):
    """Of a row: the largest logit, and the first token that has it; -1 if there is none to be drawn."""
    part = tl.arange(0, PARTS)
    left, there = scratch + (row * parts + part) * WORDS, part < parts
    tops = tl.load(left, mask=there, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    firsts = tl.load(left + 1, mask=there, other=0).to(tl.int32)
    tops = tl.where(there, tops, -float("inf"))
    none = tl.min(tl.where(there, firsts, 0), axis=0) < 0
    tops = tl.where(none, 0.0, tops)
    top = tl.max(tops, axis=0)
    first = tl.min(tl.where(there & (tops == top), firsts, vocab), axis=0)
    return top, tl.where(none | (top == -float("inf")), -1, first)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=OWN)
def _sums(logits, row_stride, how, scratch, vocab, WORDS: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr,
          PART: tl.constexpr):  # fmt: skip
    """Leaves of each band how many tokens of the part are there, and what they weigh."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, first = _likeliest(scratch, row, parts, vocab, WORDS, PARTS)
    temperature = tl.load(how + row * 5).to(tl.float32)
    if (first >= 0) & (temperature > 0):
        _, there, x = _part(logits, row_stride, row, part * PART, vocab, ALIGNED, PART)
        band = tl.where(there, _bucket(x, top, temperature), BUCKETS)
        weight = _weigh(x, top, temperature, tl.load(how + row * 5 + 3).to(tl.float32))
        left = scratch + (row * parts + part) * WORDS + 2
        for bucket in range(BUCKETS):
            mine = band == bucket
            tl.store(left + bucket, tl.sum(mine.to(tl.int32), axis=0).to(tl.int64))
            tl.store(left + BUCKETS + bucket, tl.sum(tl.where(mine, weight, 0), axis=0))


@triton.jit
def _decide(scratch, how, row, parts, vocab, WORDS: tl.constexpr, PARTS: tl.constexpr):
    """Of a row: tokens of each part that can matter [PARTS], all weight, and how many tokens stay of the likeliest, 0 if that
    cuts off nothing that weighs anything."""
    part, bucket = tl.arange(0, PARTS), tl.arange(0, BUCKETS)
    left = scratch + (row * parts + part)[:, None] * WORDS + 2 + bucket[None, :]
    there = (part < parts)[:, None] & (bucket < BUCKETS)[None, :]
    counts, weights = tl.load(left, mask=there, other=0), tl.load(left + BUCKETS, mask=there, other=0)
    tokens, reached = tl.cumsum(tl.sum(counts, axis=0), axis=0), tl.cumsum(tl.sum(weights, axis=0), axis=0)
    total = tl.max(reached, axis=0)
    top_k, top_p, number = tl.load(how + row * 5 + 1), tl.load(how + row * 5 + 2), tl.load(how + row * 5 + 4)
    most = tl.where((top_k > 0) & (top_k < vocab), top_k, 0).to(tl.int64)
    last = tl.sum((tokens < most).to(tl.int32), axis=0)
    most = tl.where(last < BUCKETS - 1, most, 0)
    if most == 0:
        wanted = _number(number, total)
        if top_p < 1:
            wanted = _share(top_p, total)
        last = tl.sum((reached < wanted).to(tl.int32), axis=0)
    return tl.sum(tl.where(bucket[None, :] <= last, counts, 0), axis=1), total, most, last


@triton.jit
def _share(top_p, whole):
    """The weight that the first tokens reach together."""
    return tl.maximum(tl.minimum(tl.ceil(top_p * whole.to(tl.float64)).to(tl.int64), whole), 1)


@triton.jit
def _number(number, whole):
    """The weight at which the token is drawn."""
    return tl.minimum(tl.floor(number * whole.to(tl.float64)).to(tl.int64) + 1, whole)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=OWN)
def _gather(logits, row_stride, how, scratch, chosen, vocab, WORDS: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr,
            PART: tl.constexpr):  # fmt: skip
    """Leaves the ids of tokens that can matter, ascending. chosen: [rows, vocab] int32."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, first = _likeliest(scratch, row, parts, vocab, WORDS, PARTS)
    temperature = tl.load(how + row * 5).to(tl.float32)
    if (first >= 0) & (temperature > 0):
        counts, _, _, last = _decide(scratch, how, row, parts, vocab, WORDS, PARTS)
        before = tl.sum(tl.where(tl.arange(0, PARTS) < part, counts, 0), axis=0)
        column, there, x = _part(logits, row_stride, row, part * PART, vocab, ALIGNED, PART)
        mine = there & (_bucket(x, top, temperature) <= last)
        place = before + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(chosen + row * vocab + place, column, mask=mine)


@triton.jit
def _amounts(source, chosen, number, count, top, temperature, min_p, limit, limit_id, COUNT: tl.constexpr):
    """Ids and keys of tokens, and what they weigh (or 1, to count them): 0 behind the last that stays, which has the key
    `limit`. number: of entries of `chosen`."""
    there = number < count
    column = tl.load(chosen + number, mask=there, other=0)
    x = tl.load(source + column, mask=there, other=-float("inf"))
    key = ordered(x)
    stays = there & ((key > limit) | ((key == limit) & (column <= limit_id)))
    if COUNT:
        return column, key, stays.to(tl.int64)
    return column, key, tl.where(stays, _weigh(x, top, temperature, min_p), 0)


@triton.jit
def _reach(source, chosen, count, vocab, target, top, temperature, min_p, limit, limit_id, COUNT: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    """The key and id of the first token up to which amounts add up to `target`, and that sum; digit by digit from the top."""
    lane, digit = tl.arange(0, TILE), tl.arange(0, 16)
    found, known, before = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32), tl.full([], 0, tl.int64)
    for level in range(8):
        shift = 28 - 4 * level
        sums = tl.zeros([16, TILE], tl.int64)
        for begin in range(0, count, TILE):
            _ids, key, amount = _amounts(source, chosen, begin + lane, count, top, temperature, min_p, limit, limit_id, COUNT)
            amount = tl.where((key & known) == found, amount, 0)
            sums += tl.where(((key >> shift) & 15).to(tl.int32)[None, :] == digit[:, None], amount[None, :], 0)
        total = tl.sum(sums, axis=1)
        up_to = before + tl.cumsum(total, axis=0, reverse=True)
        at = tl.maximum(tl.sum((up_to >= target).to(tl.int32), axis=0) - 1, 0)
        before = tl.sum(tl.where(digit == at, up_to - total, 0), axis=0)
        found = found | (at.to(tl.uint32) << shift)
        known = known | (tl.full([], 15, tl.uint32) << shift)
    each = tl.full([], 1, tl.int64)
    if not COUNT:
        bits = (found ^ 0x80000000).to(tl.int32, bitcast=True)
        each = tl.maximum(_weigh((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), top, temperature, min_p), 1)
    wanted, seen, token = (target - before + each - 1) // each, tl.full([], 0, tl.int64), vocab  # the how-manieth of its equals
    for begin in range(0, count, TILE):
        column, key, _one = _amounts(source, chosen, begin + lane, count, top, temperature, min_p, limit, limit_id, True)
        equal = (begin + lane < count) & (key == found)
        rank = seen + tl.cumsum(equal.to(tl.int64), axis=0)
        token = tl.minimum(token, tl.min(tl.where(equal & (rank == wanted), column, vocab), axis=0))
        seen += tl.sum(equal.to(tl.int64), axis=0)
    return found, token, before + wanted * each


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=OWN)
def _finish(logits, row_stride, how, out, scratch, chosen, vocab, parts, WORDS: tl.constexpr, PARTS: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    """A row's token."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    top, drawn = _likeliest(scratch, row, parts, vocab, WORDS, PARTS)
    source, ids = logits + row * row_stride, chosen + row * vocab
    temperature = tl.load(how + row * 5).to(tl.float32)
    if (drawn >= 0) & (temperature > 0):
        counts, whole, most, _ = _decide(scratch, how, row, parts, vocab, WORDS, PARTS)
        top_p, number = tl.load(how + row * 5 + 2), tl.load(how + row * 5 + 4)
        min_p, count = tl.load(how + row * 5 + 3).to(tl.float32), tl.sum(counts, axis=0).to(tl.int32)
        limit, limit_id, likeliest = tl.full([], 0, tl.uint32), vocab, drawn
        if most > 0:
            limit, limit_id, _reached = _reach(
                source, ids, count, vocab, most, top, temperature, min_p, limit, limit_id, True, TILE
            )
            total = tl.zeros([TILE], tl.int64)
            for begin in range(0, count, TILE):
                _ids, _keys, amount = _amounts(
                    source, ids, begin + lane, count, top, temperature, min_p, limit, limit_id, False
                )
                total += amount
            whole = tl.sum(total, axis=0)
        if top_p < 1:
            share = _share(top_p, whole)
            _last, _last_id, whole = _reach(
                source, ids, count, vocab, share, top, temperature, min_p, limit, limit_id, False, TILE
            )
        target = _number(number, whole)
        _key, drawn, _sum = _reach(source, ids, count, vocab, target, top, temperature, min_p, limit, limit_id, False, TILE)
        drawn = tl.where(drawn < vocab, drawn, likeliest)
    tl.store(out + row, drawn.to(tl.int64))


def sample(logits: Tensor, how: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """A token for every row; see `interface.Kernels.sample`. scratch: int32, with room for `scratch_size` of at least one row;
    rows for which there is none come later."""
    check_sample(logits, how, out, None)
    fp32(logits)
    stride, vocab = strides(logits)[0], logits.shape[1]
    parts = -(-vocab // PART)
    common = {"WORDS": WORDS, "PARTS": power_of_2(parts)}
    wide = {"ALIGNED": aligned(logits), "PART": PART, "num_warps": 16}
    step, left = max(1, len(scratch) // scratch_size(vocab)), scratch[: len(scratch) // 2 * 2].view(torch.int64)
    for begin in range(0, len(logits), step):
        rows, own, at = logits[begin : begin + step], how[begin : begin + step], out[begin : begin + step]
        grid, words = (len(rows), parts), scratch[2 * WORDS * parts * len(rows) :]
        _peaks[grid](rows, stride, left, vocab, WORDS=WORDS, **wide)
        _sums[grid](rows, stride, own, left, vocab, **common, **wide)
        _gather[grid](rows, stride, own, left, words, vocab, **common, **wide)
        _finish[grid[:1]](rows, stride, own, at, left, words, vocab, parts, **common, TILE=TILE, num_warps=16)
    return out


def scratch_size(vocab: int) -> int:
    """Numbers of 4 bytes that a row takes."""
    return 2 * WORDS * -(-vocab // PART) + vocab
