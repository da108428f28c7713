"""Attention against a masked fp64 oracle: geometry, dtypes, storage layouts, lists, boundaries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kernels import Kernels, Lists, PagedKV, Rows, load
from tests.kernels.conftest import TOLERANCE, ints, make_lists, make_rows, masked_attention, paged


def check(kernels: Kernels, store, rows: Rows, q_heads: int, seed: int = 0) -> torch.Tensor:
    """attend equals the oracle, in values and log-sum-exps; returns its output."""
    dtype, dim = store.kv.k.dtype, store.kv.k.shape[3]
    q = torch.randn(rows.size, q_heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out, lse = torch.full_like(q, float("nan")), torch.full((rows.size, q_heads), float("nan"))
    plan = kernels.plan(rows, q_heads, store.kv.k.shape[1], dim)
    assert kernels.attend(q, store.kv, plan, scale=dim**-0.5, out=out, lse=lse) is out
    expected, expected_lse = masked_attention(q, store, rows, dim**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    return out


def decode_rows(store, *lengths: int) -> Rows:
    return make_rows(store, range(len(lengths)), [0] * len(lengths), lengths)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_head_geometry(kernels: Kernels, dim: int, group: int) -> None:
    store = paged(2, 70, 2, dim)
    chunk = make_rows(store, [0, 1] + [1] * 5, [0] * 7, [70, 33, 40, 41, 42, 43, 44])
    check(kernels, store, chunk, 2 * group)


@pytest.mark.parametrize("dim", [8, 20, 36])
def test_head_dims_that_fill_no_vector(kernels: Kernels, dim: int) -> None:
    store = paged(1, 40, 2, dim)
    check(kernels, store, make_rows(store, [0] * 9, [0] * 9, range(31, 40)), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_storage(kernels: Kernels, dtype: torch.dtype, block_size: int, layout: str) -> None:
    store = paged(3, 90, 3, 64, dtype=dtype, block_size=block_size, layout=layout)
    rows = make_rows(store, [0, 2] + [1] * 6, [0, 60] + [0] * 6, [90, 77, 85, 86, 87, 88, 89, 90])
    check(kernels, store, rows, 9)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 512, 513, 700])
def test_lengths_around_boundaries(kernels: Kernels, length: int) -> None:
    store = paged(1, 700, 1, 16)
    check(kernels, store, decode_rows(store, length), 2)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 31, 32, 33, 70])
def test_chunk_lengths(kernels: Kernels, count: int) -> None:
    store = paged(1, 140, 1, 16)
    check(kernels, store, make_rows(store, [0] * count, [0] * count, range(141 - count, 141)), 3)


def test_short_chunk_over_a_long_context(kernels: Kernels) -> None:
    """Few rows, many keys: back ends split the keys, and the first rows of a tile end before the last split does."""
    store = paged(1, 4100, 1, 16, dtype=torch.bfloat16)
    check(kernels, store, make_rows(store, [0] * 9, [0] * 9, range(4090, 4099)), 2)


def test_chunk_that_starts_behind_the_beginning(kernels: Kernels) -> None:
    store = paged(2, 100, 2, 16)
    check(kernels, store, make_rows(store, [1] * 20, [37] * 20, range(50, 70)), 4)


def test_rows_that_look_like_a_chunk_but_are_not(kernels: Kernels) -> None:
    store = paged(2, 64, 1, 16)
    request = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    start = [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    stop = [10, 11, 12, 13, 15, 16, 17, 18, 19, 20]
    check(kernels, store, make_rows(store, request, start, stop), 2)


def test_rows_that_see_nothing(kernels: Kernels) -> None:
    store = paged(2, 40, 2, 16)
    out = check(kernels, store, make_rows(store, [0, 1, 1, 1, 1, 1], [0, 9, 0, 0, 0, 0], [0, 9, 0, 1, 2, 3]), 4)
    assert out[:3].count_nonzero() == 0


def test_no_rows(kernels: Kernels) -> None:
    store = paged(1, 16, 1, 16)
    q = torch.empty(0, 2, 16)
    assert kernels.attend(q, store.kv, kernels.plan(make_rows(store, [], [], []), 2, 1, 16), scale=1.0, out=q).shape == q.shape


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tail", [0, 1, 20])
@pytest.mark.parametrize("block_size", [1, 16])
def test_lists_and_tails(kernels: Kernels, shared: bool, tail: int, block_size: int) -> None:
    store = paged(3, 400, 2, 16, block_size=block_size)
    heads = 1 if shared else 2
    positions = [[list(range(h, 330, 2 + row + h)) for h in range(heads)] for row in range(2)]
    positions.append([[0, 7, 8][h:] for h in range(heads)])
    rows = make_rows(store, [2, 0, 1], [340, 350, 9], [340 + tail, 350 + tail, 9 + tail], make_lists(positions))
    check(kernels, store, rows, 6)


def test_lists_beside_rows_without(kernels: Kernels) -> None:
    """A chunk of rows with empty lists, a row with a list, and an empty row."""
    store = paged(2, 80, 2, 16)
    positions = [[[]]] * 6 + [[[1, 5, 9]]] + [[[]]]
    rows = make_rows(store, [0] * 6 + [1, 1], [0] * 6 + [30, 0], [*range(60, 66), 50, 0], make_lists(positions))
    check(kernels, store, rows, 4)


def test_a_list_of_everything_equals_dense_bitwise(kernels: Kernels) -> None:
    store = paged(1, 600, 2, 64, dtype=torch.bfloat16)
    lists = make_lists([[list(range(500))]])
    dense = check(kernels, store, decode_rows(store, 600), 6)
    assert torch.equal(dense, check(kernels, store, make_rows(store, [0], [500], [600], lists), 6))


def test_a_list_of_everything_equals_dense_bitwise_in_every_split(kernels: Kernels) -> None:
    """Whatever part of the positions is listed, and wherever lists and splits end."""
    store = paged(1, 620, 1, 64, dtype=torch.bfloat16, block_size=1)
    dense = check(kernels, store, decode_rows(store, 620), 3)
    for listed in (1, 63, 256, 257, 619, 620):
        rows = make_rows(store, [0], [listed], [620], make_lists([[list(range(listed))]]))
        assert torch.equal(dense, check(kernels, store, rows, 3))


def test_a_plan_reads_list_positions_when_used(kernels: Kernels) -> None:
    """Lists may be rewritten between the layers of a step; decode rows, and a chunk that shares one list."""
    store = paged(2, 300, 2, 16)
    positions = ints([*range(0, 80, 2), *range(100, 140)])
    lists = Lists(positions, ints([[0, 20], *[[20, 40]] * 6]), ints([[40, 20], *[[40, 40]] * 6]))
    rows = make_rows(store, [0, *[1] * 6], [200] * 7, [220, *range(205, 211)], lists)
    plan = kernels.plan(rows, 4, 2, 16)
    q = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(5))
    for step in (0, 3):
        positions += step
        out, logits = torch.empty_like(q), torch.empty(7, 4, 60)
        kernels.attend(q, store.kv, plan, scale=0.25, out=out)
        torch.testing.assert_close(out.double(), masked_attention(q, store, rows, 0.25)[0], atol=1e-5, rtol=1e-5)
        kernels.score(q, store.kv, plan, scale=0.25, out=logits)
        first = store.dense_k[0, 0, positions[:40].long()] @ q[0, 0] * 0.25
        torch.testing.assert_close(logits[0, 0, :40], first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_chunk_that_shares_its_lists(kernels: Kernels, shared: bool) -> None:
    """A prefill chunk over a selection of what came before, and its own causal tail."""
    store = paged(2, 500, 2, 64, dtype=torch.bfloat16)
    positions = make_lists([[list(range(h, 420, 3 + h)) for h in range(1 if shared else 2)]])
    lists = positions._replace(offsets=positions.offsets.repeat(70, 1), lengths=positions.lengths.repeat(70, 1))
    rows = make_rows(store, [1] * 70, [425] * 70, range(426, 496), lists)
    together = check(kernels, store, rows, 6)
    q = torch.randn(70, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone = make_rows(store, [1], [425], [495], positions)
    out = kernels.attend(q[69:], store.kv, kernels.plan(alone, 6, 2, 64), scale=0.125, out=torch.empty_like(q[69:]))
    torch.testing.assert_close(out[0].float(), together[69].float(), atol=1e-2, rtol=1e-2)


def test_chunks_with_different_lists_are_kept_apart(kernels: Kernels) -> None:
    """Equal lengths, different lists; then equal offsets, different lengths."""
    store = paged(1, 120, 2, 16)
    lists = Lists(ints(range(60)), ints([[0]] * 5 + [[7]] * 5 + [[20]] * 10), ints([[9]] * 10 + [[4]] * 5 + [[5]] * 5))
    rows = make_rows(store, [0] * 20, [60] * 20, range(70, 90), lists)
    check(kernels, store, rows, 4)


def test_a_start_per_head(kernels: Kernels) -> None:
    """One head sees everything, another sinks and a window, a third nothing: decode rows beside a chunk."""
    store = paged(2, 400, 3, 64, dtype=torch.bfloat16)
    decode = [[[], [0, 1, 2, 3], []], [[], [0, 5], []]]
    starts = [[0, 340, 400], [0, 250, 300], *[[0, 310, 330]] * 50]
    lists = make_lists([*decode, *[[[], [], []]] * 50])
    rows = make_rows(store, [0, 1, *[0] * 50], starts, [400, 300, *range(331, 381)], lists)
    out = check(kernels, store, rows, 9)
    assert out[:2, 6:].count_nonzero() == 0 and out[:2, :6].count_nonzero() > 0
    check(kernels, store, rows._replace(lists=None), 9)


def test_equal_starts_per_head_are_one_start(kernels: Kernels) -> None:
    store = paged(2, 400, 3, 64, dtype=torch.bfloat16)
    args = [0, *[1] * 40], [400, *range(341, 381)]
    one = check(kernels, store, make_rows(store, args[0], [0, *[20] * 40], args[1]), 9)
    each = check(kernels, store, make_rows(store, args[0], [[0] * 3, *[[20] * 3] * 40], args[1]), 9)
    assert torch.equal(one, each)


def test_permuting_blocks_changes_nothing(kernels: Kernels) -> None:
    store = paged(2, 300, 2, 16)
    order = torch.randperm(store.kv.k.shape[0], generator=torch.Generator().manual_seed(7))
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order))
    kv = PagedKV(*(cache[order].contiguous() for cache in store.kv))
    moved = store._replace(kv=kv, tables=where[store.tables.long()].int())
    args = [0, 1, *[1] * 8], [0] * 10, [300, 299, *range(200, 208)]
    assert torch.equal(check(kernels, store, make_rows(store, *args), 4), check(kernels, moved, make_rows(moved, *args), 4))


def test_batch_composition_changes_nothing(kernels: Kernels) -> None:
    """Each request alone gives the bits it gives in a mixed batch."""
    store = paged(4, 900, 2, 64, dtype=torch.bfloat16)
    lists = make_lists([[[]], [[2, 3, 60]], *[[[]]] * 40, [[]], [[]]])
    parts = [slice(0, 1), slice(1, 2), slice(2, 42), slice(42, 44)]
    rows = make_rows(store, [0, 1, *[2] * 40, 3, 3], [0, 70, *[0] * 42], [900, 200, *range(800, 840), 511, 700], lists)
    q = torch.randn(44, 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = kernels.attend(q, store.kv, kernels.plan(rows, 6, 2, 64), scale=0.125, out=torch.empty_like(q))
    for part in parts:
        own = lists._replace(offsets=lists.offsets[part].contiguous(), lengths=lists.lengths[part].contiguous())
        alone = Rows(store.tables, *(x[part].contiguous() for x in (rows.request, rows.start, rows.stop)), own)
        out = torch.empty_like(q[part])
        kernels.attend(q[part], store.kv, kernels.plan(alone, 6, 2, 64), scale=0.125, out=out)
        assert torch.equal(out, together[part])


def test_number_of_threads_changes_nothing(kernels: Kernels) -> None:
    store = paged(2, 1100, 2, 64, dtype=torch.bfloat16)
    rows = make_rows(store, [0] * 20 + [1], [0] * 21, [*range(1060, 1080), 1100])
    q = torch.randn(21, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    outs = [
        some.attend(q, store.kv, some.plan(rows, 4, 2, 64), scale=0.125, out=torch.empty_like(q))
        for some in (kernels, load(kernels.name, threads=1))
    ]
    assert torch.equal(*outs)


def test_one_plan_serves_many_layers(kernels: Kernels) -> None:
    """A plan is used again with other tensors, and after other plans were made."""
    stores = [paged(2, 600, 2, 16, seed=s) for s in range(2)]
    stores[1] = stores[1]._replace(tables=stores[0].tables)
    rows = decode_rows(stores[0], 600, 550)
    plan = kernels.plan(rows, 4, 2, 16)
    kernels.plan(make_rows(stores[0], [0] * 40, [0] * 40, range(500, 540)), 16, 2, 16)
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    outs = [kernels.attend(q, s.kv, plan, scale=0.25, out=torch.empty_like(q)) for s in (stores[0], stores[1], stores[0])]
    assert torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0].double(), masked_attention(q, stores[0], rows, 0.25)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outs[0], outs[1])


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    store = paged(1, 300, 1, 16)
    q = torch.full((1, 1, 16), 300.0)
    out = kernels.attend(q, store.kv, kernels.plan(decode_rows(store, 300), 1, 1, 16), scale=1.0, out=torch.empty_like(q))
    best = int((store.dense_k[0, 0].double() @ q[0, 0].double()).argmax())
    torch.testing.assert_close(out[0, 0], store.dense_v[0, 0, best], atol=1e-4, rtol=1e-4)


def test_not_a_number_is_not_hidden(kernels: Kernels) -> None:
    """A broken cache must show in the output, not pass as a plausible average."""
    store = paged(1, 40, 1, 16)
    store.kv.k[int(store.tables[0, 0]), 0, 3, 5] = float("nan")
    q = torch.ones(1, 1, 16)
    out = kernels.attend(q, store.kv, kernels.plan(decode_rows(store, 40), 1, 1, 16), scale=1.0, out=torch.empty_like(q))
    assert out.isnan().all()


def test_strided_queries_and_outputs(kernels: Kernels) -> None:
    """q may be a slice of a fused projection, out a slice of a wider buffer."""
    store = paged(2, 50, 2, 16)
    rows = decode_rows(store, 50, 31)
    wide = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    q, target = wide[:, 2:6], torch.zeros(2, 7, 16)
    kernels.attend(q, store.kv, kernels.plan(rows, 4, 2, 16), scale=0.25, out=target[:, 1:5])
    torch.testing.assert_close(target[:, 1:5].double(), masked_attention(q, store, rows, 0.25)[0], atol=1e-5, rtol=1e-5)
    assert target[:, 0].count_nonzero() == 0 and target[:, 5:].count_nonzero() == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(kernels: Kernels, data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    block_size = data.draw(st.sampled_from([1, 2, 16]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    store = paged(2, 80, kv_heads, 16, dtype=dtype, block_size=block_size, seed=data.draw(st.integers(0, 9)))
    per_head = data.draw(st.booleans())
    request, start, stop, positions = [], [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, 70))
        begin = data.draw(st.integers(0, first))
        length = data.draw(st.integers(1, 10))
        listed = data.draw(st.booleans()) and begin > 0
        for i in range(length):
            request.append(data.draw(st.integers(0, 1)) if listed else 1)
            start.append([min(begin + h, first + i) for h in range(kv_heads)] if per_head else begin)
            stop.append(first + i)
            some = st.lists(st.integers(0, max(begin - 1, 0)), unique=True, max_size=20)
            heads = [data.draw(some) if listed else [] for _ in range(kv_heads)]
            positions.append([sorted(p) for p in heads])
    check(kernels, store, make_rows(store, request, start, stop, make_lists(positions)), kv_heads * group)
