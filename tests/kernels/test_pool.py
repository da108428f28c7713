"""From logits to a ranking per head group, against a softmax and a running maximum spelt out in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import Kernels, PoolHow, load
from tests.kernels.conftest import ints

INF = float("inf")


def ranked(logits: Tensor, begin: int, end: int, groups: int, how: PoolHow, window: int) -> list[list[float]]:
    """One row: [groups][end - begin]."""
    shares = torch.softmax(logits[:, begin:end].double(), -1).view(groups, -1, end - begin)
    combined = shares.sum(1) if how == "sum" else shares.max(1).values
    half = window // 2
    return [[max(row[max(0, j - half) : j + half + 1]) for j in range(len(row))] for row in combined.tolist()]


def check(
    kernels: Kernels, logits: Tensor, first: list[int], last: list[int], groups: int, how: PoolHow, window: int
) -> Tensor:
    width = max((end - begin for begin, end in zip(first, last)), default=0) + 3
    out = torch.full((len(first), groups, max(width, 1)), 7.0)
    assert kernels.pool(logits, ints(first), ints(last), groups, how=how, window=window, out=out) is out
    for row, (begin, end) in enumerate(zip(first, last)):
        count = max(0, end - begin)
        assert (out[row, :, count:] == 7).all(), "columns past the candidates are left alone"
        if count:
            expected = torch.tensor(ranked(logits[row], begin, end, groups, how, window), dtype=torch.float64)
            torch.testing.assert_close(out[row, :, :count].double(), expected, rtol=2e-5, atol=1e-7)
    return out


@pytest.mark.parametrize("how", ["sum", "max"])
@pytest.mark.parametrize("window", [1, 3, 7, 31])
@pytest.mark.parametrize("groups", [1, 3, 9])
def test_pool(kernels: Kernels, how: PoolHow, window: int, groups: int) -> None:
    logits = torch.randn(4, 9, 120, generator=torch.Generator().manual_seed(window)) * 4
    check(kernels, logits, [0, 5, 40, 7], [120, 116, 40, 8], groups, how, window)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 2000])
def test_candidates_around_vector_boundaries(kernels: Kernels, count: int) -> None:
    logits = torch.randn(2, 4, count + 2, generator=torch.Generator().manual_seed(count))
    check(kernels, logits, [1, 0], [count + 1, count], 2, "sum", 5)


def test_shares_of_a_group_add_up(kernels: Kernels) -> None:
    """Three heads in a group give three whole distributions, whatever lies outside the candidates."""
    logits = torch.randn(1, 6, 500, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :, :10] = 1e4
    logits[:, :, 490:] = float("nan")
    out = check(kernels, logits, [10], [490], 2, "sum", 1)
    torch.testing.assert_close(out[0, :, :480].sum(-1), torch.full((2,), 3.0), rtol=1e-5, atol=0)


def test_large_logits_do_not_overflow(kernels: Kernels) -> None:
    logits = torch.randn(1, 2, 90, generator=torch.Generator().manual_seed(0)) * 1e4
    logits[0, 1] -= 1e6
    check(kernels, logits, [0], [90], 2, "sum", 1)


def test_candidates_without_weight(kernels: Kernels) -> None:
    """-inf is a share of 0; a head that has nothing else contributes 0 and does not spoil its group."""
    logits = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(0))
    logits[0, :, ::3] = -INF
    logits[0, 1] = -INF
    out = torch.full((1, 2, 40), 7.0)
    kernels.pool(logits, ints([0]), ints([40]), 2, how="sum", window=1, out=out)
    alone = torch.softmax(logits[0, 0].double(), -1)
    torch.testing.assert_close(out[0, 0].double(), alone, rtol=1e-5, atol=1e-8)
    assert (out[0, :, ::3] == 0).all() and not out.isnan().any()
    logits[:] = -INF
    kernels.pool(logits, ints([0]), ints([40]), 2, how="max", window=3, out=out)
    assert out.count_nonzero() == 0


def test_a_row_does_not_depend_on_the_others_nor_on_threads(kernels: Kernels) -> None:
    logits = torch.randn(6, 6, 3000, generator=torch.Generator().manual_seed(1))
    first, last = [0, 3, 10, 0, 2000, 5], [3000, 2990, 10, 17, 3000, 2999]
    together, serial = torch.zeros(6, 2, 3000), torch.zeros(6, 2, 3000)
    kernels.pool(logits, ints(first), ints(last), 2, how="sum", window=7, out=together)
    load(kernels.name, threads=1).pool(logits, ints(first), ints(last), 2, how="sum", window=7, out=serial)
    assert torch.equal(together, serial)
    for row in range(6):
        out = torch.zeros(1, 2, 3000)
        part = slice(row, row + 1)
        kernels.pool(logits[part], ints(first[part]), ints(last[part]), 2, how="sum", window=7, out=out)
        assert torch.equal(out[0], together[row])


def test_pool_between_slices_of_buffers(kernels: Kernels) -> None:
    buffer = torch.randn(3, 8, 70, generator=torch.Generator().manual_seed(2))
    logits, target = buffer[:, 2:6, 5:65], torch.full((3, 4, 90), 7.0)
    kernels.pool(logits, ints([0] * 3), ints([60] * 3), 2, how="max", window=3, out=target[:, 1:3, 10:80])
    plain = kernels.pool(logits.contiguous(), ints([0] * 3), ints([60] * 3), 2, how="max", window=3, out=torch.zeros(3, 2, 60))
    assert torch.equal(target[:, 1:3, 10:70], plain)
    assert (target[:, 0] == 7).all() and (target[:, 3] == 7).all()
    assert (target[:, :, :10] == 7).all() and (target[:, :, 70:] == 7).all()


@pytest.mark.parametrize(
    ("groups", "how", "window", "named"), [(4, "sum", 1, "groups"), (3, "mean", 1, "how"), (3, "sum", 4, "window")]
)
def test_what_cannot_be_pooled_is_refused(kernels: Kernels, groups: int, how: PoolHow, window: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.pool(torch.zeros(1, 9, 8), ints([0]), ints([8]), groups, how=how, window=window, out=torch.zeros(1, groups, 8))


def test_pool_then_select_finds_what_stands_out(kernels: Kernels) -> None:
    """The road from logits to positions: each group keeps the neighbourhood of its own peak."""
    logits = torch.zeros(2, 4, 104)
    logits[0, 0, 30], logits[0, 3, 60], logits[1, 1, 10], logits[1, 2, 100] = 9.0, 9.0, 9.0, 9.0
    out = torch.empty(2, 2, 100)
    kernels.pool(logits, ints([4, 4]), ints([104, 104]), 2, how="sum", window=3, out=out)
    positions = torch.full((4, 10), -7, dtype=torch.int32)
    columns, counts = positions[:, 2:5], torch.empty(4, dtype=torch.int32)
    kernels.select(out.view(4, 100), ints([100] * 4), 3, offset=ints([4] * 4), out=(columns, counts))
    assert columns.tolist() == [[29, 30, 31], [59, 60, 61], [9, 10, 11], [99, 100, 101]]
    assert (positions[:, :2] == -7).all() and (positions[:, 5:] == -7).all() and counts.tolist() == [3] * 4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(kernels: Kernels, data: st.DataObject) -> None:
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    spans = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 200)), min_size=1, max_size=4))
    first, last = [a for a, _ in spans], [a + n for a, n in spans]
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(len(spans), groups * per_group, 260, generator=make) * data.draw(st.sampled_from([0.1, 3.0, 50.0]))
    window = 2 * data.draw(st.integers(0, 20)) + 1
    out = check(kernels, logits, first, last, groups, data.draw(st.sampled_from(["sum", "max"])), window)
    assert all(math.isfinite(x) for x in out.flatten().tolist())
