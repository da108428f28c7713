"""Attention of the Triton back end, in its interpreter: random shapes against fp64, and what only this back end promises."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import Rows, load
from kvloom.kernels.interface import Folded
from tests.kernels.conftest import Paged, ints, make_lists, make_rows, masked_attention, paged
from tests.kernels.test_attend import check
from tests.kernels.test_vectorized import WAITS, Recorder, calls

pytest.importorskip("triton")

import kvloom.kernels.triton as back_end
from kvloom.kernels.triton import plan


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_rows(data: st.DataObject) -> None:
    """Ragged rows with lists and tails, starts per head and none, and a chunk that shares reads; outputs poisoned."""
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layout, dim = data.draw(st.sampled_from(["HND", "NHD"])), data.draw(st.sampled_from([16, 64, 80]))
    store = paged(2, 540, kv_heads, dim, dtype=dtype, block_size=data.draw(st.sampled_from([16, 32])), layout=layout)
    around = st.sampled_from([0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513, 540])
    request, start, stop, positions = [], [], [], []
    for _ in range(data.draw(st.integers(1, 2))):
        end = data.draw(around)
        begins = [data.draw(st.integers(0, end)) for _ in range(kv_heads)]
        request.append(data.draw(st.integers(0, 1)))
        start.append(begins)
        stop.append(end)
        positions.append(
            [sorted(data.draw(st.sets(st.integers(0, begin - 1), max_size=20))) if begin else [] for begin in begins]
        )
    for i in range(data.draw(st.sampled_from([0, 3, 17]))):
        request.append(1)
        start.append([0] * kv_heads)
        stop.append(250 + i)
        positions.append([[]] * kv_heads)
    check(load("triton"), store, make_rows(store, request, start, stop, make_lists(positions)), kv_heads * group)


@pytest.fixture
def short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits of a chunk over few positions, of small tiles, of which some find room for partial results at once."""
    monkeypatch.setattr(plan, "SECTION", 256)
    monkeypatch.setattr(plan, "QUERIES", 16)
    monkeypatch.setattr(back_end, "TOGETHER", 32)


def attended(store: Paged, rows: Rows, q: Tensor) -> Tensor:
    kernels, (_, q_heads, dim) = load("triton"), q.shape
    seen = kernels.plan(rows, q_heads, store.dense_k.shape[1], dim)
    return kernels.attend(q, store.kv, seen, scale=dim**-0.5, out=torch.full_like(q, torch.nan))


def part_of(rows: Rows, part: slice) -> Rows:
    lists = rows.lists
    if lists is not None:
        lists = lists._replace(offsets=lists.offsets[part].contiguous(), lengths=lists.lengths[part].contiguous())
    return Rows(rows.tables, *(x[part].contiguous() for x in (rows.request, rows.start, rows.stop)), lists)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("short_sections")
def test_splits_in_one_program_and_in_many_give_the_same_bits(dtype: torch.dtype) -> None:
    """A long row and a chunk alone leave partial results; beside many others a program does all of a tile's splits."""
    store = paged(3, 540, 1, 16, dtype=dtype)
    request, stop = [0, *[1] * 16, *[2] * 17, *[2] * 60], [530, *range(525, 541), *range(401, 418), *[3] * 60]
    rows = make_rows(store, request, [0] * len(stop), stop)
    q = torch.randn(len(stop), 4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = attended(store, rows, q)
    torch.testing.assert_close(together.double(), masked_attention(q, store, rows, 0.25)[0], atol=1e-2, rtol=1e-2)
    for part in (slice(0, 1), slice(1, 17), slice(0, 17)):
        assert torch.equal(attended(store, part_of(rows, part), q[part]), together[part])


@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_does_not_depend_on_where_its_prompt_was_cut(data: st.DataObject) -> None:
    """Into chunks of at least 16 rows, over a list that they share and a tail, or everything; with and without room for
    partial results."""
    dtype, group = data.draw(st.sampled_from([torch.bfloat16, torch.float32])), data.draw(st.sampled_from([1, 3, 4, 8]))
    listed, rows = data.draw(st.sampled_from([[], list(range(3, 250, 2))])), 36
    store = paged(1, 540, 1, 16, dtype=dtype)
    lists = make_lists([[listed]])
    lists = lists._replace(offsets=lists.offsets.repeat(rows, 1), lengths=lists.lengths.repeat(rows, 1))
    whole = make_rows(store, [0] * rows, [260 if listed else 0] * rows, range(505, 541), lists)
    q = torch.randn(rows, group, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SECTION", 256)
        patch.setattr(plan, "QUERIES", 16)
        together, cut = attended(store, whole, q), data.draw(st.integers(16, 20))
        assert torch.equal(attended(store, part_of(whole, slice(0, cut)), q[:cut]), together[:cut])
        assert torch.equal(attended(store, part_of(whole, slice(cut, rows)), q[cut:]), together[cut:])


@pytest.mark.parametrize("seen", [100, 300])
@pytest.mark.usefixtures("short_sections")
def test_a_chunk_with_one_more_position(seen: int) -> None:
    """Of some of its rows, in one split and in two: as the same rows have it one by one, which the contract's tests know."""
    store, rows = paged(1, 340, 2, 16), 17
    chunk = make_rows(store, [0] * rows, [0] * rows, range(seen, seen + rows))
    q, words = torch.randn(rows, 6, 16), torch.randn(rows * 64).view(torch.int32)
    folded = Folded(words, ints(range(rows)) * 64, ints([0, 9, 5, 70] * 4 + [3]))
    kernels, found, expected = load("triton"), torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    kernels.attend(q, store.kv, kernels.plan(chunk, 6, 2, 16), scale=0.25, out=found, folded=folded)
    for row in range(rows):
        part = slice(row, row + 1)
        own, one = Folded(words, folded.at[part], folded.counts[part]), kernels.plan(part_of(chunk, part), 6, 2, 16)
        kernels.attend(q[part], store.kv, one, scale=0.25, out=expected[part], folded=own)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], attended(store, chunk, q)[1])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 260), st.integers(0, 700), st.integers(0, 700), st.booleans())
def test_a_fold_does_not_depend_on_others(first: int, count: int, other: int, tight: bool) -> None:
    """Whether one program adds a row's sections up or many do, and however many rows find room for them."""
    store, kernels, last = paged(2, 960, 2, 16), load("triton"), first + count
    words = [torch.full((128,), 7, dtype=torch.int32) for _ in range(2)]
    alone, both = (ints([1]), ints([first]), ints([last])), (ints([0, 1]), ints([1, first]), ints([1 + other, last]))
    with pytest.MonkeyPatch.context() as patch:
        if tight:
            patch.setattr(kernels, "_scratches", [torch.full((2 * 2 * 4 * 5 * 16,), torch.nan)])
        kernels.fold(store.kv, store.tables, *alone, words[0], ints([64]), origin=1, most=count)
        kernels.fold(store.kv, store.tables, *both, words[1], ints([0, 64]), origin=1, most=max(count, other))
    if first > 1:  # sums that are there already
        assert not torch.equal(words[0][64:], torch.full((64,), 7, dtype=torch.int32))
    assert torch.equal(words[0][64:], words[1][64:])
    held = words[1].view(torch.float32)[:64].view(2, 2, 16)
    expected = torch.stack([dense[0, :, 1 : 1 + other].double().sum(1) for dense in (store.dense_k, store.dense_v)])
    torch.testing.assert_close(held.double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("number", range(11))
def test_no_operation_waits_for_a_result(number: int) -> None:
    call = calls(load("triton"))[number]
    with Recorder() as recorder:
        call()
    assert not recorder.names & WAITS


def test_a_plan_waits_for_nothing() -> None:
    store, kernels = paged(2, 300, 2, 64), load("triton")
    rows = make_rows(store, [1, *[0] * 40], [0] * 41, [280, *range(90, 130)], make_lists([[[], []]] * 41))
    with Recorder() as recorder:
        found = kernels.plan(rows, 6, 2, 64)
    assert recorder.names and not recorder.names & WAITS
    assert [tiles.size for tiles in found.tiles] == [1, 42] and [int(tiles.count) for tiles in found.tiles] == [1, 1]


def test_nothing_of_a_step_of_single_rows_lies_outside_of_its_tensors() -> None:
    """Rows that are no more than requests share no reads: their plan has no tiles of its own, which captured calls would look
    for where they were. So it serves other rows in the same tensors, padding among them."""
    from kvloom.kernels.triton.plan import Tiles

    store, kernels = paged(20, 40, 1, 16), load("triton")
    rows = make_rows(store, range(20), [0] * 20, [30] * 20)
    plan = kernels.plan(rows, 2, 1, 16)
    assert plan.tiles == (Tiles(1, 20),)
    rows.request.copy_(rows.request.flip(0))
    rows.stop.copy_(ints([*range(21, 40), 0]))
    q = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(1))
    out = kernels.attend(q, store.kv, plan, scale=0.25, out=torch.full_like(q, float("nan")))
    torch.testing.assert_close(out.double(), masked_attention(q, store, rows, 0.25)[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_run_is_refused() -> None:
    kernels, store = load("triton"), paged(1, 16, 1, 16)
    for dim in (12, 264):
        with pytest.raises(ValueError, match=f"head_dim is {dim}; the triton back end takes multiples of 8 up to 256"):
            kernels.plan(make_rows(store, [0], [0], [9]), 1, 1, dim)
    store, q = paged(1, 260, 1, 16, block_size=260), torch.zeros(1, 1, 16)
    made = kernels.plan(make_rows(store, [0], [0], [9]), 1, 1, 16)
    with pytest.raises(ValueError, match="block size is 260; the triton back end takes up to 256"):
        kernels.attend(q, store.kv, made, scale=1.0, out=q)
    with pytest.raises(ValueError, match=r"plan is for q \(1, 1, 16\)"):
        kernels.attend(torch.zeros(2, 1, 16), store.kv, made, scale=1.0, out=torch.zeros(2, 1, 16))
    with pytest.raises(ValueError, match="contiguous int32"):
        kernels.plan(make_rows(store, [0], [0], [9])._replace(stop=ints([9]).long()), 1, 1, 16)


def test_without_a_gpu_it_needs_the_interpreter() -> None:
    code = "from kvloom.kernels import load; load('triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "runs on cuda; on cpu only in its interpreter, with TRITON_INTERPRET=1 set" in done.stderr


def test_sums_of_large_blocks() -> None:
    """Blocks of more positions than are added up at once, from within and across them."""
    kernels, store = load("triton"), paged(1, 600, 1, 16, block_size=256)
    words = torch.zeros(2 * 16, dtype=torch.int32)
    kernels.fold(store.kv, store.tables, ints([0]), ints([130]), ints([600]), words, ints([0]), origin=200, most=470)
    wanted = torch.stack([dense[0, :, 130:600].double().sum(1) for dense in (store.dense_k, store.dense_v)])
    torch.testing.assert_close(words.view(torch.float32).view(2, 1, 16).double(), wanted, atol=1e-4, rtol=1e-4)
