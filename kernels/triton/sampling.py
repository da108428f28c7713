"""Drawing tokens without sorting: a program has a row, and finds the token at which weights, added up in order, reach a share.

Weights are whole numbers, of which the likeliest token has 2^40: sums are exact in any order, and the same tokens are drawn
whatever else is in the batch. A token less likely than 2^-40 of that weighs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import fp32, strides
from kvloom.kernels.reference import check_sample
from kvloom.kernels.triton.numbers import ordered

TILE = 1024
"""Tokens that a program looks at together."""


@triton.jit
def _weigh(x, top, temperature, min_p):
    weight = tl.exp2((x - top) / temperature * 1.4426950408889634)
    return (tl.where(weight < min_p, 0.0, weight) * 1099511627776.0).to(tl.int64)


@triton.jit
def _amounts(source, column, vocab, top, temperature, min_p, limit, limit_id, COUNT: tl.constexpr):
    """Keys of tokens, and what they weigh (or 1, to count them): 0 behind the last that stays, which has the key `limit`."""
    x = tl.load(source + column, mask=column < vocab, other=-float("inf"))
    key = ordered(x)
    stays = (column < vocab) & ((key > limit) | ((key == limit) & (column <= limit_id)))
    if COUNT:
        return key, stays.to(tl.int64)
    return key, tl.where(stays, _weigh(x, top, temperature, min_p), 0)


@triton.jit
def _reach(source, vocab, target, top, temperature, min_p, limit, limit_id, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The key and id of the first token up to which amounts add up to `target`, and that sum; digit by digit from the top."""
    lane, digit = tl.arange(0, TILE), tl.arange(0, 16)
    found, known, before = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32), tl.full([], 0, tl.int64)
    for level in range(8):
        shift = 28 - 4 * level
        sums = tl.zeros([16, TILE], tl.int64)
        for begin in range(0, vocab, TILE):
            key, amount = _amounts(source, begin + lane, vocab, top, temperature, min_p, limit, limit_id, COUNT)
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
    for begin in range(0, vocab, TILE):
        key = ordered(tl.load(source + begin + lane, mask=begin + lane < vocab, other=-float("inf")))
        equal = (begin + lane < vocab) & (key == found)
        rank = seen + tl.cumsum(equal.to(tl.int64), axis=0)
        token = tl.minimum(token, tl.min(tl.where(equal & (rank == wanted), begin + lane, vocab), axis=0))
        seen += tl.sum(equal.to(tl.int64), axis=0)
    return found, token, before + wanted * each


@triton.jit
def _sample(logits, how, out, row_stride, vocab, TILE: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    source, how = logits + row * row_stride, how + row * 5
    best, token, bad = tl.full([TILE], -float("inf"), tl.float32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    for begin in range(0, vocab, TILE):
        x = tl.load(source + begin + lane, mask=begin + lane < vocab, other=-float("inf"))
        bad = bad | ((x < float("inf")) == 0).to(tl.int32)
        token = tl.where(x > best, begin + lane, token)
        best = tl.maximum(x, best)
    top = tl.max(best, axis=0)
    drawn = tl.min(tl.where(best == top, token, vocab), axis=0)
    temperature = tl.load(how).to(tl.float32)
    if (tl.max(bad, axis=0) > 0) | (top == -float("inf")):
        drawn = tl.full([], -1, tl.int32)
    elif temperature > 0:
        top_k, top_p = tl.load(how + 1), tl.load(how + 2)
        min_p, number = tl.load(how + 3).to(tl.float32), tl.load(how + 4)
        limit, limit_id, likeliest = tl.full([], 0, tl.uint32), vocab, drawn
        if (top_k > 0) & (top_k < vocab):
            limit, limit_id, _ = _reach(source, vocab, top_k.to(tl.int64), top, temperature, min_p, limit, limit_id, True, TILE)
        total = tl.zeros([TILE], tl.int64)
        for begin in range(0, vocab, TILE):
            _, amount = _amounts(source, begin + lane, vocab, top, temperature, min_p, limit, limit_id, False)
            total += amount
        whole = tl.sum(total, axis=0)
        if top_p < 1:
            share = tl.maximum(tl.minimum(tl.ceil(top_p * whole.to(tl.float64)).to(tl.int64), whole), 1)
            _, _, whole = _reach(source, vocab, share, top, temperature, min_p, limit, limit_id, False, TILE)
        target = tl.minimum(tl.floor(number * whole.to(tl.float64)).to(tl.int64) + 1, whole)
        _, drawn, _ = _reach(source, vocab, target, top, temperature, min_p, limit, limit_id, False, TILE)
        drawn = tl.where(drawn < vocab, drawn, likeliest)
    tl.store(out + row, drawn.to(tl.int64))


def sample(logits: Tensor, how: Tensor, out: Tensor) -> Tensor:
    """A token for every row; see `interface.Kernels.sample`."""
    check_sample(logits, how, out)
    fp32(logits)
    if len(logits):
        _sample[len(logits),](logits, how, out, strides(logits)[0], logits.shape[1], TILE=TILE, num_warps=16)
    return out
