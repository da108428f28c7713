"""Top-k selection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kernels import Kernels
from tests.kernels.conftest import ints

INF = float("inf")


def test_select(kernels: Kernels) -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 4.0, 9.0], [-2.0, -1.0, -3.0, INF, INF], [0.0, 0.0, 0.0, 0.0, 0.0]])
    columns, counts = kernels.select(scores, ints([4, 3, 0]), 2)
    assert columns.tolist() == [[1, 3], [0, 1], [-1, -1]]
    assert counts.tolist() == [2, 2, 0]
    assert columns.dtype == counts.dtype == torch.int32


def test_select_ties_go_to_the_lower_column(kernels: Kernels) -> None:
    scores = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -0.0], [-INF, 2.0, -INF, -INF, 2.0, -INF]])
    assert kernels.select(scores, ints([6, 6]), 4)[0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]


def test_select_more_than_there_is(kernels: Kernels) -> None:
    columns, counts = kernels.select(torch.randn(2, 5), ints([3, 5]), 7)
    assert columns.tolist() == [[0, 1, 2, -1, -1, -1, -1], [0, 1, 2, 3, 4, -1, -1]]
    assert counts.tolist() == [3, 5]


def test_select_from_a_slice_of_a_buffer(kernels: Kernels) -> None:
    buffer = torch.arange(30.0).view(3, 10)
    assert kernels.select(buffer[:, 2:8], ints([6, 2, 6]), 2)[0].tolist() == [[4, 5], [0, 1], [4, 5]]


def test_select_into_a_wider_buffer_with_an_offset(kernels: Kernels) -> None:
    """Columns become positions; what lies beside the view is left alone, padding stays -1."""
    scores = torch.tensor([[1.0, 5.0, 3.0], [4.0, 2.0, 9.0], [0.0, 0.0, 0.0]])
    buffer = torch.full((3, 6), 77, dtype=torch.int32)
    columns, counts = buffer[:, 1:3], torch.full((3,), 77, dtype=torch.int32)
    result = kernels.select(scores, ints([3, 1, 0]), 2, offset=ints([100, 200, 300]), out=(columns, counts))
    assert result[0] is columns and result[1] is counts
    assert buffer.tolist() == [[77, 101, 102, 77, 77, 77], [77, 200, -1, 77, 77, 77], [77, -1, -1, 77, 77, 77]]
    assert counts.tolist() == [2, 1, 0]
    assert kernels.select(scores, ints([3, 3, 3]), 2, offset=ints([10, 20, 0]))[0].tolist() == [[11, 12], [20, 22], [0, 1]]


@pytest.mark.parametrize(("n", "k"), [(7500, 512), (5000, 4999), (4096, 1), (6000, 3000)])
def test_select_of_many(kernels: Kernels, n: int, k: int) -> None:
    """Values as pooled shares are: positive, over many octaves, with runs of equal ones."""
    scores = torch.exp(torch.randn(3, n, generator=torch.Generator().manual_seed(n)) * 4)
    scores = torch.nn.functional.max_pool1d(scores[:, None], 7, 1, 3)[:, 0]
    scores[2] = 0.25
    columns, counts = kernels.select(scores, ints([n, n - 3, n]), k)
    for row, length in enumerate((n, n - 3, n)):
        best = torch.sort(scores[row, :length], descending=True, stable=True).indices[:k].sort().values
        assert columns[row, : len(best)].tolist() == best.tolist() and counts[row] == len(best)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 600), st.integers(1, 600), st.sampled_from([0.0, 1.0, 100.0]))
def test_select_equals_a_stable_sort(kernels: Kernels, seed: int, width: int, k: int, rounding: float) -> None:
    scores = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) * 3
    if rounding:
        scores = (scores * rounding).round() / rounding  # many ties
    columns, counts = kernels.select(scores, ints([width, width // 2]), k)
    for row, length in enumerate((width, width // 2)):
        best = sorted(range(length), key=lambda i: (-float(scores[row, i]), i))[:k]
        assert columns[row].tolist() == sorted(best) + [-1] * (k - len(best))
        assert counts[row] == len(best)
