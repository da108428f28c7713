"""Log-probabilities against a plain computation."""

import math

import pytest
import torch

from kvloom.engine.step.logprobs import logprobs


def plain(row: list[float], token: int, top: int) -> tuple[int, float, int, list[tuple[int, float]]]:
    highest = max(row)
    total = highest + math.log(sum(math.exp(value - highest) for value in row))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return token, row[token] - total, order.index(token) + 1, [(i, row[i] - total) for i in order[:top]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 1, 5, 40])
@pytest.mark.parametrize("rows", [1, 70])
def test_equals_plain(dtype: torch.dtype, top: int, rows: int) -> None:
    """bf16 has many equal values: ranks and order go by id then."""
    values = (torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)) * 2).round(decimals=1).to(dtype)
    tokens = [(7 * i) % 40 for i in range(rows)]
    found = logprobs(values, tokens, top)
    assert len(found) == rows
    for row, token, result in zip(values.float().tolist(), tokens, found):
        expected = plain(row, token, top)
        assert (result.token, result.rank) == (expected[0], expected[2])
        assert result.logprob == pytest.approx(expected[1], abs=1e-5)
        assert [i for i, _ in result.top] == [i for i, _ in expected[3]]
        assert [p for _, p in result.top] == pytest.approx([p for _, p in expected[3]], abs=1e-5)


def test_a_row_does_not_depend_on_its_batch() -> None:
    values = torch.randn(70, 3000, generator=torch.Generator().manual_seed(2))
    tokens = list(range(70))
    assert logprobs(values, tokens, 3) == [logprobs(values[i : i + 1], [i], 3)[0] for i in range(70)]


def test_no_rows() -> None:
    assert logprobs(torch.zeros(0, 10), [], 3) == []
