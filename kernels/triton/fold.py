"""Sums of keys and values that leave what rows see.

Positions of SECTION blocks, at multiples of as many, are added up by themselves, block by block in fp64, and these sums in
order: by one program where a step folds little, else each section by one of its own. Both add the same in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvloom.kernels.checks import strides
from kvloom.kernels.interface import PagedKV
from kvloom.kernels.triton.numbers import power_of_2, wide

SECTION = 16
"""Blocks of a section."""
PIECE = 128
"""Most positions at once: those of a larger block are added up piece by piece."""

INDICES = ["tables", "request", "first", "last", "words", "at"]
"""Tensors of which Triton need not know where they begin."""


@triton.jit
def section_sum(source, by_block, by_token, table, section, begin, end, SECTION: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[D] fp64: what lies at positions [begin, end) of a section. source: keys or values of a head; table: of a request."""
    total = tl.zeros([BLOCK_D], tl.float64)
    inner, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    first, last = tl.maximum(section * SECTION, begin // BLOCK_SIZE), tl.cdiv(end, BLOCK_SIZE)
    pieces: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    for piece in range(first * pieces, tl.minimum((section + 1) * SECTION, last) * pieces):
        block, offset = piece // pieces, piece % pieces * BLOCK_N + inner
        position = block * BLOCK_SIZE + offset
        there = ((offset < BLOCK_SIZE) & (position >= begin) & (position < end))[:, None] & (dims < DIM)[None, :]
        place = source + tl.load(table + block).to(tl.int64) * by_block + offset[:, None] * by_token + dims[None, :]
        total += tl.sum(wide(tl.load(place, mask=there, other=0.0)), 0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=["tables_row", "origin", "sections"], do_not_specialize_on_alignment=INDICES)
def fold_sections(
    k, k_block, k_head, k_token, v, v_block, v_head, v_token, tables, tables_row, request, first, last, words, at, partial,
    origin, sections, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SECTION: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Add a row's keys or values of a head to its sums. SPREAD: put the sums of one section of them into `partial` instead."""
    row, head, which = tl.program_id(0), tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    place = tl.load(at + row)
    if place < 0:
        return
    begin, end, dims = tl.load(first + row), tl.load(last + row), tl.arange(0, BLOCK_D)
    table, far = tables + tl.load(request + row) * tables_row, head.to(tl.int64)
    if which == 0:
        source, by_block, by_token = k + far * k_head, k_block, k_token
    else:
        source, by_block, by_token = v + far * v_head, v_block, v_token
    span: tl.constexpr = SECTION * BLOCK_SIZE
    if SPREAD:
        section = begin // span + tl.program_id(2)
        if section * span < end:
            total = section_sum(
                source, by_block, by_token, table, section, begin, end, SECTION, BLOCK_SIZE, DIM, BLOCK_N, BLOCK_D
            )
            entry = ((row * 2 + which) * KV_HEADS + head).to(tl.int64) * sections + tl.program_id(2)
            tl.store(partial + entry * DIM + dims, total, mask=dims < DIM)
    else:
        record = words + place + (which * KV_HEADS + head) * DIM + dims
        total = tl.load(record, mask=(dims < DIM) & (begin > origin), other=0.0).to(tl.float64)
        for section in range(begin // span, tl.cdiv(end, span)):
            total += section_sum(
                source, by_block, by_token, table, section, begin, end, SECTION, BLOCK_SIZE, DIM, BLOCK_N, BLOCK_D
            )
        tl.store(record, total.to(tl.float32), mask=dims < DIM)


@triton.jit(do_not_specialize=["origin", "sections"], do_not_specialize_on_alignment=INDICES)
def add_sections(first, last, words, at, partial, origin, sections, SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Add a row's sections to its sums, in order. HEADS: of keys and values together."""
    row, head, dims = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_D)
    place = tl.load(at + row)
    if place < 0:
        return
    begin, end, inside = tl.load(first + row), tl.load(last + row), dims < DIM
    record, entry = words + place + head * DIM + dims, partial + (row * HEADS + head).to(tl.int64) * sections * DIM + dims
    total = tl.load(record, mask=inside & (begin > origin), other=0.0).to(tl.float64)
    number = tl.maximum(tl.cdiv(end, SPAN) - begin // SPAN, 0)
    for section in range(0, number, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # loads that need not wait for each other
            total += tl.load(entry + (section + i) * DIM, mask=inside & (section + i < number), other=0.0)
    tl.store(record, total.to(tl.float32), mask=inside)


def fold(kv: PagedKV, tables: Tensor, request: Tensor, first: Tensor, last: Tensor, words: Tensor, at: Tensor, scratch: Tensor,
         *, origin: int, most: int) -> None:  # fmt: skip
    """See `interface.Kernels.fold`. words: fp32; scratch: fp64, for sections of as many rows as there is room for."""
    _, heads, block, dim = kv.k.shape
    sections = -(-most // (SECTION * block)) + 1
    size, spread = 2 * heads * sections * dim, sections > 2
    rows = max(1, len(scratch) // size) if spread else len(at)
    if size > len(scratch):
        spread = False
    for begin in range(0, len(at), rows):
        part = slice(begin, begin + rows)
        where, own = (first[part], last[part], words, at[part], scratch, origin, sections), len(at[part])
        fold_sections[own, 2 * heads, sections if spread else 1](
            kv.k, *strides(kv.k)[:3], kv.v, *strides(kv.v)[:3], tables, tables.stride(0), request[part], *where, KV_HEADS=heads,
            DIM=dim, BLOCK_SIZE=block, BLOCK_N=min(PIECE, power_of_2(block)), BLOCK_D=power_of_2(dim), SECTION=SECTION,
            SPREAD=spread,
        )  # fmt: skip
        if spread:
            add_sections[own, 2 * heads](*where, SPAN=SECTION * block, HEADS=2 * heads, DIM=dim, BLOCK_D=power_of_2(dim),
                                         AT_ONCE=8, num_warps=1)  # fmt: skip
