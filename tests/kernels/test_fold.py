"""Sums of keys and values that leave what rows see, and the position that stands for them: against fp64, on every back end."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.kernels import Kernels, Rows
from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.interface import Folded
from tests.kernels.conftest import TOLERANCE, Paged, ints, make_lists, make_rows, paged
from tests.native import native_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SUMS = 1e-5
"""Of sums relative to the largest of their kind, whatever the order of additions."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(words: Tensor, at: int, heads: int, dim: int) -> Tensor:
    """[2, heads, dim] fp32: the sums that begin at a word, in place."""
    return words[at : at + 2 * heads * dim].view(torch.float32).view(2, heads, dim)


def fold(kernels: Kernels, store: Paged, words: Tensor, rows: list[tuple[int, int, int, int]], origin: int = 0) -> None:
    """rows: (request, first, last, at)."""
    request, first, last, at = (ints(column) for column in zip(*rows))
    most = max((end - begin for _, begin, end, _ in rows), default=0)
    kernels.fold(store.kv, store.tables, request, first, last, words, at, origin=origin, most=most)


def summed(store: Paged, request: int, first: int, last: int) -> Tensor:
    return torch.stack([dense[request, :, first:last].double().sum(1) for dense in (store.dense_k, store.dense_v)])


def assert_sums(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).abs().max()) <= SUMS * max(1.0, float(expected.abs().max()))


# Sums -----------------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (40, 5), (8, 1), (20, 64), (16, 256)])
def test_sums(kernels: Kernels, dtype: torch.dtype, layout: str, dim: int, block_size: int) -> None:
    """From within blocks and from their edges, nothing at all, one position, and everything."""
    store, heads = paged(2, 150, 3, dim, dtype=dtype, block_size=block_size, layout=layout), 3
    spans = [(0, 4, 150), (1, 0, 150), (0, 16, 32), (1, 17, 31), (1, 63, 64), (0, 64, 64), (1, 33, 33), (0, 149, 150)]
    size = 2 * heads * dim + 3
    words = torch.full((len(spans) * size,), 7, dtype=torch.int32)
    fold(kernels, store, words, [(*span, i * size + 1) for i, span in enumerate(spans)], origin=150)
    for i, span in enumerate(spans):
        assert_sums(record(words, i * size + 1, heads, dim), summed(store, *span))
        assert words[[i * size, i * size + size - 2, i * size + size - 1]].tolist() == [7] * 3, "words of nobody's"


def test_sums_grow_and_begin_anew(kernels: Kernels) -> None:
    """A row is cleared by where it begins; one without a record is left out, whatever else it says."""
    store, size = paged(2, 100, 2, 16), 64
    words = torch.zeros(3 * size, dtype=torch.int32)
    records = [record(words, i * size, 2, 16) for i in range(3)]
    records[0].fill_(math.nan)
    records[2].fill_(5.0)
    fold(kernels, store, words, [(1, 4, 20, 0), (0, 0, 90, -1)], origin=4)
    assert_sums(records[0], summed(store, 1, 4, 20))
    fold(kernels, store, words, [(0, 99, 99, -1), (1, 20, 61, 0), (0, 4, 8, size), (0, 5, 9, -1)], origin=4)
    assert_sums(records[0], summed(store, 1, 4, 61))
    assert_sums(records[1], summed(store, 0, 4, 8))
    fold(kernels, store, words, [(1, 61, 61, 0), (0, 4, 4, size)], origin=4)
    assert_sums(records[0], summed(store, 1, 4, 61))
    assert not records[1].any() and (records[2] == 5.0).all(), "what is empty is cleared too, and others are left alone"
    fold(kernels, store, words, [(0, 0, 50, -1), (1, 4, 90, -3)], origin=4)
    assert_sums(records[0], summed(store, 1, 4, 61))


@pytest.mark.parametrize(
    "cuts", [[3, 16, 32, 208, 1190], [3, 1190], [3, *range(16, 1190, 16), 1190], [3, *range(4, 1191, 37), 1190]]
)
def test_sums_do_not_depend_on_how_they_are_cut_or_on_others(kernels: Kernels, cuts: list[int]) -> None:
    """A sequence longer than any piece; beside others to the bit, and in pieces of blocks on the native back end too."""
    store, size = paged(3, 1200, 2, 40), 160
    words = torch.zeros(4 * size, dtype=torch.int32)
    fold(kernels, store, words, [(1, 3, 1190, 0)], origin=3)
    for first, last in itertools.pairwise(cuts):
        others = [(2, 3, 1200, 2 * size), (0, 9, 10, 3 * size)] if last % 3 else [(0, 3, 60, 3 * size)]
        fold(kernels, store, words, [*others, (1, first, last, size)], origin=3)
    alone, cut = record(words, 0, 2, 40), record(words, size, 2, 40)
    assert_sums(alone, summed(store, 1, 3, 1190))
    assert_sums(cut, summed(store, 1, 3, 1190))
    of_blocks = all(edge % 16 == 0 for edge in cuts[1:-1])
    if len(cuts) == 2 or (kernels.name == "native" and of_blocks):
        assert torch.equal(alone, cut)


def test_threads_do_not_show_in_sums() -> None:
    store, found = paged(2, 3000, 2, 64, dtype=torch.bfloat16), []
    for threads in (1, 2, 5):
        words = torch.zeros(512, dtype=torch.int32)
        kernels = NativeKernels(native_kernels().library, threads=threads)
        fold(kernels, store, words, [(0, 4, 2990, 0), (1, 4, 17, 256)], origin=4)
        found.append(words)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_rows_and_no_heads_are_no_work(kernels: Kernels) -> None:
    store, words = paged(1, 40, 2, 16), torch.full((64,), 7, dtype=torch.int32)
    none = ints([])
    kernels.fold(store.kv, store.tables, none, none, none, words, none, origin=0, most=0)
    headless = store._replace(kv=type(store.kv)(*(cache[:, :0] for cache in store.kv)))
    fold(kernels, headless, words, [(0, 4, 30, 0)], origin=4)
    assert (words == 7).all()


@pytest.mark.parametrize("wrong", ["dtype", "rows", "strides", "words"])
def test_what_cannot_be_folded_is_refused(kernels: Kernels, wrong: str) -> None:
    store, words, column = paged(2, 40, 2, 16), torch.zeros(128, dtype=torch.int32), ints([4])
    at = {"dtype": column.long(), "rows": ints([1, 2]), "strides": column, "words": column}[wrong]
    words = words.view(torch.float32) if wrong == "words" else words
    tables = store.tables.t() if wrong == "strides" else store.tables
    with pytest.raises((TypeError, ValueError)):
        kernels.fold(store.kv, tables, ints([0]), column, ints([9]), words, at, origin=0, most=5)


# One more position ------------------------------------------------------------------------------------------------------------


def attended(kernels: Kernels, store: Paged, rows: Rows, q: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:2], 7.0)
    plan = kernels.plan(rows, q.shape[1], store.kv.k.shape[1], q.shape[2])
    assert kernels.attend(q, store.kv, plan, scale=q.shape[2] ** -0.5, out=out, lse=lse, **more) is out
    return out, lse


def with_means(q: Tensor, store: Paged, rows: Rows, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """An explicit softmax in fp64: rows see their lists, their tails, and the mean of a span of the same sequence."""
    out, lse = q.double().clone(), q.new_zeros(q.shape[:2], dtype=torch.float64)
    group = q.shape[1] // store.dense_k.shape[1]
    for row, (first, last) in enumerate(spans):
        for head in range(q.shape[1]):
            mine, request = head // group, int(rows.request[row])
            k, v = (dense[request, mine].double() for dense in (store.dense_k, store.dense_v))
            start = int(rows.start[row] if rows.start.ndim == 1 else rows.start[row, mine])
            seen = list(range(start, int(rows.stop[row])))
            if rows.lists is not None:
                column = min(mine, rows.lists.lengths.shape[1] - 1)
                at = int(rows.lists.offsets[row, column])
                seen = [*rows.lists.positions[at : at + int(rows.lists.lengths[row, column])].tolist(), *seen]
            logits, values = k[seen] @ q[row, head].double() * q.shape[2] ** -0.5, v[seen]
            if last > first:
                mean = k[first:last].mean(0) @ q[row, head].double() * q.shape[2] ** -0.5 + math.log(last - first)
                logits, values = torch.cat([logits, mean[None]]), torch.cat([values, v[first:last].mean(0)[None]])
            out[row, head] = torch.softmax(logits, 0) @ values
            lse[row, head] = torch.logsumexp(logits, 0)
    return out, lse


def folded_of(kernels: Kernels, store: Paged, rows: Rows, spans: list[tuple[int, int]]) -> Folded:
    heads, dim = store.kv.k.shape[1], store.kv.k.shape[3]
    words, size = torch.full((len(spans) * 2 * heads * dim + 5,), -1, dtype=torch.int32), 2 * heads * dim  # NaN, all of them
    at = [5 + i * size for i in range(len(spans))]
    found = [(int(rows.request[i]), *span, at[i]) for i, span in enumerate(spans) if span[1] > span[0]]
    if found:
        fold(kernels, store, words, found, origin=10**6)
    counts = [last - first for first, last in spans]
    return Folded(words, ints([where if n else -1 for where, n in zip(at, counts)]), ints(counts))


@DTYPES
@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("dim", [64, 40, 8, 128])
def test_one_more_position(kernels: Kernels, dtype: torch.dtype, group: int, dim: int) -> None:
    """Decode rows with sinks and a window, one that sees all, and one that sees nothing else."""
    store = paged(3, 330, 2, dim, dtype=dtype)
    rows = make_rows(store, [0, 1, 2, 1], [288, 0, 21, 300], [330, 77, 21, 301], make_lists([[[0, 1, 2]], [[]], [[]], [[0]]]))
    q, spans = drawn(4, 2 * group, dim).to(dtype), [(3, 288), (0, 0), (4, 21), (2, 3)]
    folded = folded_of(kernels, store, rows, spans)
    out, lse = attended(kernels, store, rows, q, folded=folded)
    expected, expected_lse = with_means(q, store, rows, spans)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert (out - attended(kernels, store, rows, q)[0]).abs().amax((1, 2)).gt(0.01).tolist() == [True, False, True, True]
    again = torch.empty_like(q)
    plan = kernels.plan(rows, 2 * group, 2, dim)
    kernels.attend(q, store.kv, plan, scale=dim**-0.5, out=again, folded=folded)
    assert torch.equal(again, out), "without lse"


@DTYPES
def test_rows_without_it_stay_as_they_are(kernels: Kernels, dtype: torch.dtype) -> None:
    """To the bit, alone and beside rows that have it; NaN in records of nobody's is not read."""
    store = paged(2, 600, 2, 40, dtype=dtype)
    rows = make_rows(store, [0, 1, *[1] * 40], [0, 500, *[0] * 40], [600, 590, *range(540, 580)])
    q = drawn(rows.size, 6, 40).to(dtype)
    plain = attended(kernels, store, rows, q)
    nothing = Folded(torch.full((200,), -1, dtype=torch.int32), ints([-1] * rows.size), ints([0] * rows.size))
    for one, other in zip(plain, attended(kernels, store, rows, q, folded=nothing)):
        assert torch.equal(one, other)
    spans = [(0, 0)] * rows.size
    spans[1], spans[7] = (4, 500), (0, 3)
    for one, other in zip(plain, attended(kernels, store, rows, q, folded=folded_of(kernels, store, rows, spans))):
        same = [row not in (1, 7) for row in range(rows.size)]
        assert torch.equal(one[same], other[same]) and not torch.equal(one[1], other[1]) and not torch.equal(one[7], other[7])


def test_heads_that_are_left_out_have_none(kernels: Kernels) -> None:
    store = paged(2, 300, 2, 64)
    rows = make_rows(store, [0, 1], [[280, 260], [200, 210]], [300, 290])
    q, spans = drawn(2, 6, 64), [(4, 200), (4, 180)]
    folded = folded_of(kernels, store, rows, spans)
    whole = attended(kernels, store, rows, q, folded=folded)
    expected = with_means(q, store, rows, spans)[0]
    torch.testing.assert_close(whole[0].double(), expected, atol=1e-5, rtol=1e-5)
    for left_out in range(2):
        heads = ints([-1 if head == left_out else head for head in range(2)])
        own = torch.arange(6) // 3 != left_out
        for found, of in zip(attended(kernels, store, rows, q, folded=folded, heads=heads), whole):
            assert torch.equal(found[:, own], of[:, own]) and (found[:, ~own] == 7.0).all()


def test_it_is_neither_counted_nor_in_logits(kernels: Kernels) -> None:
    store = paged(1, 300, 2, 64)
    rows = make_rows(store, [0], [280], [300])
    q, logits, read = drawn(1, 4, 64), torch.full((1, 4, 40), 7.0), torch.zeros(1, dtype=torch.int64)
    more = {"folded": folded_of(kernels, store, rows, [(4, 280)])}
    before = asdict(kernels.counters)
    attended(kernels, store, rows, q, logits=logits, read=read, **more)
    between = asdict(kernels.counters)
    plain = torch.full_like(logits, 7.0)
    attended(kernels, store, rows, q, logits=plain)
    after = asdict(kernels.counters)
    assert torch.equal(logits, plain) and (logits[..., 20:] == 7.0).all() and read.tolist() == [40]
    assert all(between[name] - before[name] == after[name] - between[name] for name in after)


@pytest.mark.parametrize("threads", [1, 4])
def test_splits_that_are_computed_apart(threads: int) -> None:
    """Long rows, spread over threads, with bounds and without: the bits of one thread."""
    library = native_kernels().library
    store, q = paged(2, 4000, 2, 64, dtype=torch.bfloat16), drawn(2, 6, 64).bfloat16()
    rows = make_rows(store, [0, 1], [900, 0], [4000, 3900])
    one, several = (NativeKernels(library, threads=n) for n in (1, threads))
    folded = folded_of(one, store, rows, [(4, 900), (0, 0)])
    found = attended(one, store, rows, q, folded=folded)
    for bounds in (None, ints([4000, 4000])):
        for this, other in zip(found, attended(several, store, rows._replace(most=bounds), q, folded=folded)):
            assert torch.equal(this, other)
    torch.testing.assert_close(found[0].double(), with_means(q, store, rows, [(4, 900), (0, 0)])[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("generic", [False, True])
@DTYPES
def test_builds_agree_with_fp64(generic: bool, dtype: torch.dtype) -> None:
    """The build without processor-specific code has another order of elements."""
    kernels = native_kernels(generic=generic)
    store = paged(1, 200, 2, 72, dtype=dtype)
    rows = make_rows(store, [0], [150], [200])
    q = drawn(1, 6, 72).to(dtype)
    out, lse = attended(kernels, store, rows, q, folded=folded_of(kernels, store, rows, [(4, 150)]))
    expected, expected_lse = with_means(q, store, rows, [(4, 150)])
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_replays_read_what_is_there_now() -> None:
    """A captured fold and the attention over it, for other rows, positions and records."""
    kernels, store = native_kernels(), paged(4, 300, 2, 64)
    size = 2 * 2 * 64
    columns = {name: torch.zeros(4, dtype=torch.int32) for name in ("request", "first", "last", "at", "counts")}
    words, q, out = torch.zeros(4 * size, dtype=torch.int32), drawn(4, 6, 64), torch.empty(4, 6, 64)
    plan: Any = None

    def step(rows: list[tuple[int, int, int, int]]) -> Rows:
        nonlocal plan
        for i, (request, first, last, at) in enumerate(rows):
            for name, value in zip(columns, (request, first, last, at, last - 4)):
                columns[name][i] = value
        visible = make_rows(store, [row[0] for row in rows], [row[2] for row in rows], [row[2] + 20 for row in rows])
        plan = kernels.plan(visible, 6, 2, 64, plan)
        return visible

    def run(n: int) -> None:
        request, first, last, at, counts = (column[:n] for column in columns.values())
        kernels.fold(store.kv, store.tables, request, first, last, words, at, origin=4, most=300)
        kernels.attend(q[:n], store.kv, plan, scale=0.125, out=out[:n], folded=Folded(words, at, counts))

    graph = kernels.graph()
    step([(0, 4, 100, 0)])
    graph.piece(lambda: run(1))
    for rows in ([(0, 100, 132, 0), (2, 4, 64, size), (3, 4, 4, 2 * size)], [(1, 4, 250, 3 * size)]):
        visible = step(rows)
        graph.replay(0, len(rows))
        spans = [(4, last) for _, _, last, _ in rows]
        expected = with_means(q[: len(rows)], store, visible, spans)[0]
        torch.testing.assert_close(out[: len(rows)].double(), expected, atol=1e-5, rtol=1e-5)
