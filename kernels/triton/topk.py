"""The largest columns of rankings, without sorting: ties go to the lower column, and columns come out ascending.

A program holds up to WIDE keys and halves what lies between a key that enough of them are above and one that too few are above.
Longer rankings are cut into segments of as many columns. Each has a program of its own, which leaves its k largest in scratch
as candidates; then one program chooses among those: what is not among the k largest of its segment is not among those of all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import fp32, index, strides
from kvloom.kernels.triton.numbers import aligned, multiple, ordered, power_of_2

WIDE = 8192
"""Most keys that a program holds,"""
WARPS = 16
"""and as many warps hold them."""

INDICES = ["lengths", "offset", "at", "candidates", "columns", "counts"]
"""Tensors of which Triton need not know where they begin."""
STEPS = ["row_stride", "head_stride", "out_row", "out_head", "many", "k"]
"""Numbers that depend on how long rankings and lists are: no variant is compiled for them."""


@triton.jit
def _entries(source, candidates, number, count, ALIGNED: tl.constexpr):
    """Columns of a ranking's entries of these numbers, whether there are such, and their keys, 0 where there are none."""
    column, there = number, number < count
    if candidates is not None:
        column = tl.load(candidates + number, mask=there, other=-1)
        there = column >= 0
        x = tl.load(source + column, mask=there, other=0.0)
    elif ALIGNED:  # to the end of 16 columns, so that a thread reads four at once
        x = tl.load(source + number, mask=number < tl.cdiv(count, 16) * 16, other=0.0)
    else:
        x = tl.load(source + number, mask=there, other=0.0)
    return column, there, tl.where(there, ordered(x), 0)


@triton.jit
def _above(source, candidates, key, middle, count, HELD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """How many keys are at least `middle`: of those at hand, if they are all, else of those that are read again."""
    if HELD:
        return tl.sum((key >= middle).to(tl.int32), axis=0)
    counts = tl.zeros([WIDE], tl.int32)
    for begin in range(0, count, WIDE):
        _, there, again = _entries(source, candidates, begin + tl.arange(0, WIDE), count, ALIGNED)
        counts += (there & (again >= middle)).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _bound(source, candidates, count, wanted, HELD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """A key, and how many of its equals belong to the `wanted` largest, as do all larger ones. Done when a cut has just as
    many."""
    low, high, ties, key = tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32), wanted, 0
    if HELD:
        _, _, key = _entries(source, candidates, tl.arange(0, WIDE), count, ALIGNED)
    while low < high:
        middle = low + ((high - low) >> 1) + 1
        above = _above(source, candidates, key, middle, count, HELD, ALIGNED, WIDE)
        ties = tl.where(above == wanted, 0, tl.where(above < wanted, wanted - above, ties))
        low = tl.where(above == wanted, middle - 1, tl.where(above > wanted, middle, low))
        high = tl.where(above > wanted, high, middle - 1)
    return low, ties


@triton.jit
def _write(target, source, candidates, count, bound, ties, added, HELD: tl.constexpr, ALIGNED: tl.constexpr,
           WIDE: tl.constexpr):  # fmt: skip
    """Columns of keys above `bound`, and of its first `ties` equals, in order. Returns how many."""
    larger, equal, lane = 0, 0, tl.arange(0, WIDE)
    for begin in range(0, count, WIDE):
        column, there, key = _entries(source, candidates, begin + lane, count, ALIGNED)
        mark = (there & (key > bound)).to(tl.int32) + ((there & (key == bound)).to(tl.int32) << 16)
        before = tl.cumsum(mark, axis=0) - mark
        equals = tl.minimum(equal + (before >> 16), ties)
        chosen = there & ((key > bound) | ((key == bound) & (equals < ties)))
        tl.store(target + larger + (before & 0xFFFF) + equals, (column + added).to(tl.int32), mask=chosen)
        all_marks = tl.sum(mark, axis=0)
        larger += all_marks & 0xFFFF
        equal += all_marks >> 16
    return larger + tl.minimum(equal, ties)


@triton.jit(do_not_specialize=STEPS, do_not_specialize_on_alignment=INDICES)
def _select(scores, lengths, offset, at, candidates, columns, counts, row_stride, head_stride, out_row, out_head, heads, k,
            many, SEGMENT: tl.constexpr, HELD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One ranking, or a segment of one: finds the key of its last column, then writes columns in order, and -1 behind them.
    candidates: [rows, heads, many], columns to choose from, -1 where there is none."""
    row, head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * WIDE
    length, added, place = tl.load(lengths + row), 0, 0
    if at is not None:
        place = tl.load(at + row)
    if place >= 0:
        if offset is not None:
            added = tl.load(offset + row)
        target = columns + row * out_row + head * out_head
        source = scores + row * multiple(row_stride, ALIGNED) + head * multiple(head_stride, ALIGNED)
        if SEGMENT:
            target += tl.program_id(2) * k
        elif at is not None:
            target += place
        count, number = tl.minimum(length, many) - begin, tl.minimum(k, length)
        if candidates is not None:
            candidates += (row * heads + head) * many + begin
            count = many - begin
        elif SEGMENT:
            source, added = source + begin, begin
        if SEGMENT:
            count = tl.maximum(tl.minimum(count, WIDE), 0)
        bound, ties = tl.full([], 0, tl.uint32), k
        if tl.minimum(length, count) > k:
            bound, ties = _bound(source, candidates, count, k, HELD, ALIGNED, WIDE)
        written = _write(target, source, candidates, count, bound, ties, added, HELD, ALIGNED, WIDE)
        for rest in range(written, k, WIDE):
            lane = rest + tl.arange(0, WIDE)
            tl.store(target + lane, tl.full([WIDE], -1, tl.int32), mask=lane < k)
        if counts is not None:
            tl.store(counts + row * heads + head, number)


def select(scores: Tensor, lengths: Tensor, k: int, scratch: Tensor, *, offset: Tensor | None = None,
           out: tuple[Tensor, Tensor | None] | None = None,
           at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `interface.Kernels.select`. NaN is not ordered meaningfully. scratch: int32, for candidates of at least one row, or
    long rankings are read at each halving."""
    fp32(scores)
    rows, heads, shape = scores.shape[0], 1 if scores.ndim == 2 else scores.shape[1], scores.shape[:-1]
    columns, counts = out or (lengths.new_empty(*shape, k), lengths.new_empty(shape))
    for tensor in (lengths, offset, counts, at):
        if tensor is not None:
            index(tensor, torch.int32)
    wanted = (*shape, k) if at is None else (*shape[1:], k)
    if columns.dtype is not torch.int32 or columns.shape != wanted or (counts is not None and counts.shape != shape):
        raise ValueError(f"out must be int32 {list(wanted)} and {list(shape)}; got {columns.dtype} {tuple(columns.shape)} "
                         f"and {None if counts is None else tuple(counts.shape)}")  # fmt: skip
    if rows == 0 or heads == 0:
        return columns, counts
    steps = [*((0,) if at is not None else ()), *strides(columns)[:-1], *((0,) if scores.ndim == 2 else ())]
    stages = _stages(scores.shape[-1], k, heads, len(scratch))
    taken = sum(heads * segments * k for segments in stages)
    most = len(scratch) // taken if taken else rows
    for first in range(0, rows, most):
        part = slice(first, first + most)
        into = columns if at is not None else columns[part]
        _run(scores[part], lengths[part], k, scratch, None if offset is None else offset[part], into,
             None if counts is None else counts[part], None if at is None else at[part], steps, stages)  # fmt: skip
    return columns, counts


def _stages(width: int, k: int, heads: int, room: int) -> list[int]:
    """Segments of a ranking before the last stage; none where candidates would be no fewer, or find no room."""
    stages: list[int] = []
    while width > WIDE and 2 * k <= WIDE:
        stages.append(-(-width // WIDE))
        width = stages[-1] * k
    return stages if sum(stages) * heads * k <= room else []


def _run(scores: Tensor, lengths: Tensor, k: int, scratch: Tensor, offset: Tensor | None, columns: Tensor,
         counts: Tensor | None, at: Tensor | None, steps: list[int], stages: list[int]) -> None:  # fmt: skip
    """Rows whose candidates find room together."""
    rows, heads, many, candidates = len(scores), 1 if scores.ndim == 2 else scores.shape[1], scores.shape[-1], None
    source = (scores.stride(0), 0 if scores.ndim == 2 else scores.stride(1))
    for segments in stages:
        into, scratch = scratch[: (size := rows * heads * segments * k)], scratch[size:]
        _select[rows, heads, segments](
            scores, lengths, None, at, candidates, into, None, *source, heads * segments * k, segments * k, heads, k, many,
            SEGMENT=True, HELD=True, ALIGNED=aligned(scores), WIDE=WIDE, num_warps=WARPS,
        )  # fmt: skip
        candidates, many = into, segments * k
    wide = min(WIDE, max(1024, power_of_2(many)))
    _select[rows, heads](
        scores, lengths, offset, at, candidates, columns, counts, *source, *steps, heads, k, many, SEGMENT=False,
        HELD=many <= wide, ALIGNED=aligned(scores), WIDE=wide, num_warps=max(4, wide // (WIDE // WARPS)),
    )  # fmt: skip
