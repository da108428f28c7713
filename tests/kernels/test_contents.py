"""What a plan leaves open: contents that change between its uses, rows and heads that are left out, lists kept elsewhere, and
the decision which lists are made anew."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.kernels import Kernels, Lists, Rows
from kvloom.kernels.interface import NO_LIST, Renewal
from tests.kernels.conftest import Paged, ints, paged

ROWS, Q_HEADS, KV_HEADS, DIM, WIDTH = 4, 6, 2, 64, 40
SCALE = DIM**-0.5
CONTENTS = (([690, 640, 600, 490], WIDTH), ([0, 0, 0, 0], 0), ([300, 0, 610, 480], 3), ([700, 650, 610, 500], 0))
"""Where tails begin, and how long the lists of rows that have none at 0 are."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lists(seed: int) -> Tensor:
    """[rows, kv_heads, width] ascending positions below 300."""
    make = torch.Generator().manual_seed(seed)
    picked = [torch.randperm(300, generator=make)[:WIDTH].sort().values for _ in range(ROWS * KV_HEADS)]
    return torch.stack(picked).int().view(ROWS, KV_HEADS, WIDTH)


@pytest.fixture
def store() -> Paged:
    return paged(ROWS, 700, KV_HEADS, DIM)


def rows_of(store: Paged, start: Tensor, positions: Tensor, lengths: Tensor, most: Tensor | None = None) -> Rows:
    offsets = torch.arange(ROWS * KV_HEADS, dtype=torch.int32).view(ROWS, KV_HEADS) * WIDTH
    stop = ints([700, 650, 610, 500])
    return Rows(store.tables, torch.arange(ROWS, dtype=torch.int32), start, stop, Lists(positions, offsets, lengths), most)


def attended(kernels: Kernels, store: Paged, plan: Any, **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.full((ROWS, Q_HEADS, DIM), 7.0), torch.full((ROWS, Q_HEADS), 7.0)
    kernels.attend(drawn(ROWS, Q_HEADS, DIM), store.kv, plan, scale=SCALE, out=out, lse=lse, **more)
    return out, lse


def test_contents_may_change_within_bounds(kernels: Kernels, store: Paged) -> None:
    """From nothing but a tail to everything, each with the bits of a plan of its own."""
    positions, most = lists(1).flatten(), ints([700, 700, 700, 500])
    start, lengths = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, KV_HEADS, dtype=torch.int32)
    plan = kernels.plan(rows_of(store, start, positions, lengths, most), Q_HEADS, KV_HEADS, DIM)
    for starts, length in CONTENTS:
        start.copy_(ints(starts))
        lengths.copy_(torch.where(start > 0, length, 0)[:, None].expand(-1, KV_HEADS))
        before = asdict(kernels.counters)
        found = attended(kernels, store, plan)
        between, own = asdict(kernels.counters), kernels.plan(rows_of(store, start, positions, lengths), Q_HEADS, KV_HEADS, DIM)
        for one, other in zip(found, attended(kernels, store, own)):
            if kernels.name == "torch":  # whose sums run over the bound
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
            else:
                assert torch.equal(one, other)
        after = asdict(kernels.counters)
        assert after["rows"] > before["rows"]
        for name in ("rows", "positions", "kv_bytes", "list_kv_bytes"):
            assert between[name] - before[name] == after[name] - between[name]


def test_heads_are_left_out_or_read_each_others_lists(kernels: Kernels, store: Paged) -> None:
    positions, start = lists(2), torch.full((ROWS,), 480, dtype=torch.int32)
    lengths = torch.full((ROWS, KV_HEADS), WIDTH, dtype=torch.int32)
    plan = kernels.plan(rows_of(store, start, positions.flatten(), lengths), Q_HEADS, KV_HEADS, DIM)
    whole, whole_lse = attended(kernels, store, plan)
    group = Q_HEADS // KV_HEADS
    for left_out in range(KV_HEADS):
        heads = ints([-1 if head == left_out else head for head in range(KV_HEADS)])
        out, lse = attended(kernels, store, plan, heads=heads)
        own = torch.arange(Q_HEADS) // group != left_out
        assert torch.equal(out[:, own], whole[:, own]) and torch.equal(lse[:, own], whole_lse[:, own])
        assert (out[:, ~own] == 7.0).all() and (lse[:, ~own] == 7.0).all()
    swapped = kernels.plan(rows_of(store, start, positions.flip(1).flatten(), lengths), Q_HEADS, KV_HEADS, DIM)
    assert torch.equal(attended(kernels, store, plan, heads=ints([1, 0]))[0], attended(kernels, store, swapped)[0])


def test_lists_may_lie_elsewhere_and_what_is_read_is_counted(kernels: Kernels, store: Paged) -> None:
    start, lengths = ints([480, 480, 600, 490]), torch.full((ROWS, KV_HEADS), WIDTH, dtype=torch.int32)
    plan = kernels.plan(rows_of(store, start, lists(3).flatten(), lengths), Q_HEADS, KV_HEADS, DIM)
    other = kernels.plan(rows_of(store, start, lists(4).flatten(), lengths), Q_HEADS, KV_HEADS, DIM)
    read = ints([1, 2, 3, 4]).long()
    elsewhere = torch.cat([ints([5] * 9), lists(4).flatten()])[9:]
    found = attended(kernels, store, plan, positions=elsewhere, read=read)
    assert torch.equal(found[0], attended(kernels, store, other)[0])
    assert read.tolist() == [i + 1 + KV_HEADS * (WIDTH + tail) for i, tail in enumerate([220, 170, 10, 10])]
    attended(kernels, store, plan, positions=elsewhere, read=read, heads=ints([-1, 1]))
    assert read.tolist() == [i + 1 + (KV_HEADS + 1) * (WIDTH + tail) for i, tail in enumerate([220, 170, 10, 10])]


def test_rows_that_are_not_active_cost_nothing(kernels: Kernels, store: Paged) -> None:
    """Score, pool and select leave them as they were."""
    q, stop, zeros = drawn(ROWS, Q_HEADS, DIM), ints([700, 650, 610, 500]), torch.zeros(ROWS, dtype=torch.int32)
    rows = Rows(store.tables, torch.arange(ROWS, dtype=torch.int32), zeros, stop)
    plan = kernels.plan(rows, Q_HEADS, KV_HEADS, DIM)
    whole = kernels.score(q, store.kv, plan, scale=SCALE, out=torch.full((ROWS, Q_HEADS, 700), 7.0))
    for active in (ints([-1, 90, -1, 30]), ints([-1] * 4)):
        on = active >= 0
        before = kernels.counters.score_bytes
        logits = kernels.score(q, store.kv, plan, scale=SCALE, out=torch.full_like(whole, 7.0), active=active)
        assert kernels.counters.score_bytes - before == int(stop[on].sum()) * KV_HEADS * DIM * 4
        assert torch.equal(logits[on], whole[on]) and (logits[~on] == 7.0).all()
        pool: dict[str, Any] = {"how": "max", "window": 5}
        ranks = kernels.pool(whole, zeros, stop, KV_HEADS, **pool, out=torch.full((ROWS, KV_HEADS, 700), 7.0))
        found = kernels.pool(whole, zeros, stop, KV_HEADS, **pool, out=torch.full_like(ranks, 7.0), active=active)
        assert torch.equal(found[on], ranks[on]) and (found[~on] == 7.0).all()
        words = torch.full((200,), 7, dtype=torch.int32)
        place = words[3:].as_strided((KV_HEADS, 5), (8, 1), 3)  # where a row with at = 0 would go
        kernels.select(ranks, stop, 5, offset=ints([100] * ROWS), out=(place, None), at=active)
        columns, counts = kernels.select(ranks, stop, 5, offset=ints([100] * ROWS))
        assert columns.shape == (ROWS, KV_HEADS, 5) and counts is not None and counts.shape == (ROWS, KV_HEADS)
        expected = torch.full_like(words, 7)
        for row, head in itertools.product(range(ROWS), range(KV_HEADS)):
            if active[row] >= 0:
                begin = 3 + int(active[row]) + 8 * head
                expected[begin : begin + 5] = columns[row, head]
        assert torch.equal(words, expected)


def test_selecting_for_heads_is_selecting_for_rows(kernels: Kernels) -> None:
    scores, lengths = drawn(3, 4, 100), ints([100, 17, 3])
    columns, counts = kernels.select(scores, lengths, 9, offset=ints([5, 6, 7]))
    by_row = kernels.select(scores.flatten(0, 1), lengths.repeat_interleave(4), 9, offset=ints([5, 6, 7]).repeat_interleave(4))
    assert counts is not None and by_row[1] is not None
    assert torch.equal(columns.flatten(0, 1), by_row[0]) and torch.equal(counts.flatten(), by_row[1])


# Which lists are made anew ----------------------------------------------------------------------------------------------------

HOW = Renewal(tail=1, query=20, width=12, recent=4, most=50, compare="flat", threshold=0.5, dense=False)
STRIDE = 20 + Q_HEADS * DIM


def renewed(kernels: Kernels, words: Tensor, q: Tensor, stop: list[int], due: list[int], how: Renewal = HOW,
            angles: Any = None, at: list[int] | None = None,
            ) -> tuple[list[int], list[int], list[list[int]], list[int]]:  # fmt: skip
    """active, start, lengths and counts of rows whose records lie one behind the other, unless it is said where."""
    rows = len(stop)
    active, start = torch.full((rows,), 7, dtype=torch.int32), torch.full((rows,), 7, dtype=torch.int32)
    lengths, counts = torch.full((rows, 2), 7, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    begins = torch.arange(rows, dtype=torch.int32) * STRIDE if at is None else ints(at)
    kernels.renew(q, words, begins, ints(stop), ints(due), how, angles, active, start, lengths, counts)
    return active.tolist(), start.tolist(), lengths.tolist(), counts.tolist()


def records(rows: int) -> Tensor:
    words = torch.zeros(rows * STRIDE, dtype=torch.int32)
    words.view(rows, STRIDE)[:, HOW.tail] = NO_LIST
    return words


@pytest.mark.parametrize("dense", [False, True])
def test_lists_are_renewed_when_they_must_be(kernels: Kernels, dense: bool) -> None:
    """Without one, when due, when too old, when tokens were taken back, when the query has moved; and not otherwise."""
    words, q, how = records(6), drawn(6, Q_HEADS, DIM), HOW._replace(dense=dense)
    first = [0, 0, 0] if dense else [96, 12, 12]
    found = renewed(kernels, words, q, [100] * 6, [0, 1, 2, 0, 2, 2], how)
    assert found == ([i * STRIDE for i in range(6)], [first[0]] * 6, [first[1:]] * 6, [6, 0, 0])
    kept = words.view(6, STRIDE)[:, 20:].view(torch.float32)
    assert torch.equal(kept, q.flatten(1)) and words.view(6, STRIDE)[:, 1].tolist() == [96] * 6
    moved = q.clone()
    moved[1:] = drawn(5, Q_HEADS, DIM, seed=5)
    #       like it   due   too old   taken back   moved, not looked at   moved
    stop, due = [110, 110, 151, 96, 110, 110], [2, 1, 0, 0, 0, 2]
    active, start, lengths, counts = renewed(kernels, words, moved, stop, due, how)
    anew = [False, True, True, True, False, True]
    assert active == [i * STRIDE if one else -1 for i, one in enumerate(anew)]
    tails = [96, 106, 147, 92, 96, 106]
    assert start == [0 if one and dense else tail for one, tail in zip(anew, tails)]
    assert lengths == [[0 if one and dense else 12] * 2 for one in anew]
    assert counts == [4, 3, 2] and words.view(6, STRIDE)[:, 1].tolist() == tails
    kept = words.view(6, STRIDE)[:, 20:].view(torch.float32)
    assert torch.equal(kept, torch.where(torch.tensor(anew)[:, None], moved.flatten(1), q.flatten(1)))


@pytest.mark.parametrize("compare", ["mean", "min", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_queries_are_compared_as_said(kernels: Kernels, compare: Any, dtype: torch.dtype, turned: bool) -> None:
    """Against cosines in fp64, at thresholds on both sides of each."""
    old, new = drawn(1, Q_HEADS, DIM).to(dtype), drawn(1, Q_HEADS, DIM, seed=1).to(dtype)
    new = (old + new).to(dtype)
    angles = [drawn(1, 8, seed=i) for i in range(2)] if turned else None
    pairs = []
    for query, turn in ((old, angles and angles[0]), (new, angles and angles[1])):
        wide = query[0].double()
        if turn is not None:
            a, b, cos, sin = wide[:, :8], wide[:, 8:16], turn.double().cos(), turn.double().sin()
            wide = torch.cat([a * cos + b * sin, b * cos - a * sin, wide[:, 16:]], dim=1)
        pairs.append({"mean": wide.mean(0, keepdim=True), "min": wide, "flat": wide.flatten()[None]}[compare])
    cosine = float(torch.cosine_similarity(*pairs, dim=1).min())
    for threshold, anew in ((cosine - 1e-4, False), (cosine + 1e-4, True)):
        words, how = records(1), HOW._replace(compare=compare, threshold=threshold)
        for query, turn, expected in ((old, angles and angles[0], True), (new, angles and angles[1], anew)):
            pair = None if turn is None else (turn.cos(), turn.sin())
            active, *_ = renewed(kernels, words, query, [100], [2], how, pair)
            assert (active == [0]) == expected


def test_nothing_is_kept_of_queries_that_are_not_compared(kernels: Kernels) -> None:
    words, how = records(2), HOW._replace(compare="none")
    assert renewed(kernels, words, drawn(2, Q_HEADS, DIM), [100, 90], [0, 2], how)[3] == [2, 0, 0]
    assert renewed(kernels, words, drawn(2, Q_HEADS, DIM, seed=1), [101, 91], [0, 2], how)[3] == [0, 0, 2]
    assert not words.view(2, STRIDE)[:, 20:].any()


@pytest.mark.parametrize("compare", ["none", "flat"])
def test_rows_that_pad_a_step_do_nothing(kernels: Kernels, store: Paged, compare: Any) -> None:
    """Beside rows of which one has a list and one has none, in front of them and behind, and alone."""
    how, q, stop = HOW._replace(compare=compare), drawn(ROWS, Q_HEADS, DIM), [0, 90, 95, 0]
    words, own = records(2), records(2)
    for record in (words, own):
        record.view(2, STRIDE)[0, HOW.tail] = 60
        record.view(torch.float32).view(2, STRIDE)[0, HOW.query :] = q[1].flatten()
    expected = renewed(kernels, own, q[1:3], stop[1:3], [2, 2], how)
    found = renewed(kernels, words, q, stop, [1, 2, 2, 1], how, at=[-1, 0, STRIDE, -1])
    assert torch.equal(words, own) and expected[3] == [1, 0, 1]
    for padded, alone, nothing in zip(found, expected, (-1, 0, [0, 0])):
        assert padded == [nothing, *alone, nothing]
    assert found[3] == expected[3]
    nobody = renewed(kernels, words, q[:1], [0], [1], how, at=[-1])
    assert torch.equal(words, own) and nobody == ([-1], [0], [[0, 0]], [0, 0, 0])
    zeros, stops = torch.zeros(ROWS, dtype=torch.int32), ints(stop)
    plan = kernels.plan(Rows(store.tables, torch.arange(ROWS, dtype=torch.int32), zeros, stops), Q_HEADS, KV_HEADS, DIM)
    before, read = asdict(kernels.counters), torch.zeros(ROWS, dtype=torch.int64)
    out, lse = attended(kernels, store, plan, read=read)
    after = asdict(kernels.counters)
    assert not out[::3].any() and lse[::3].isinf().all() and read.tolist() == [KV_HEADS * end for end in stop]
    assert (after["rows"] - before["rows"], after["positions"] - before["positions"]) == (2, KV_HEADS * 185)


def test_what_cannot_be_renewed_is_refused(kernels: Kernels) -> None:
    q, words, one, flat = drawn(1, Q_HEADS, DIM), records(1), ints([0]), torch.zeros(1, 1, dtype=torch.int32)
    counts = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="compare is 'some'; allowed: none, mean, min, flat"):
        kernels.renew(q, words, one, one, one, HOW._replace(compare="some"), None, one, one, flat, counts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contiguous int32"):
        kernels.renew(q, words, one.long(), one, one, HOW, None, one, one, flat, counts)
    with pytest.raises(ValueError, match="there are 1 rows"):
        kernels.renew(q, words, ints([0, 0]), one, one, HOW, None, one, one, flat, counts)
    with pytest.raises(ValueError, match=r"counts must be int64 \[3\]"):
        kernels.renew(q, words, one, one, one, HOW, None, one, one, flat, counts[:2])
