"""Raw products: `score`, the logits of `attend`, and their agreement."""

import pytest
import torch

from kvloom.kernels import Kernels
from tests.kernels.conftest import make_lists, make_rows, paged


@pytest.fixture
def case():
    store = paged(2, 300, 2, 64, dtype=torch.bfloat16)
    positions = [[[1, 4, 40, 41], [0, 2]], [[], []], *[[[], []]] * 5]
    rows = make_rows(store, [1, 0, *[0] * 5], [100, 0, *[0] * 5], [280, 300, *range(90, 95)], make_lists(positions))
    q = torch.randn(7, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.full((7, 6, 310), 7.0, dtype=torch.float64)
    for row in range(7):
        for head in range(6):
            seen = positions[row][head // 3] + list(range(int(rows.start[row]), int(rows.stop[row])))
            keys = store.dense_k[int(rows.request[row]), head // 3, seen].double()
            expected[row, head, : len(seen)] = keys @ q[row, head].double() * 0.125
    return store, rows, q, expected


def test_score(kernels: Kernels, case) -> None:
    store, rows, q, expected = case
    out = torch.full((7, 6, 310), 7.0)
    assert kernels.score(q, store.kv, kernels.plan(rows, 6, 2, 64), scale=0.125, out=out) is out
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_score_does_not_read_v(kernels: Kernels, case) -> None:
    store, rows, q, expected = case
    out = torch.full((7, 6, 310), 7.0)
    hidden = store.kv._replace(v=torch.full_like(store.kv.v, float("nan")))
    kernels.score(q, hidden, kernels.plan(rows, 6, 2, 64), scale=0.125, out=out)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_logits_of_attend_are_those_of_score(kernels: Kernels, case) -> None:
    store, rows, q, _ = case
    plan = kernels.plan(rows, 6, 2, 64)
    logits, scores = torch.full((7, 6, 310), 7.0), torch.full((7, 6, 310), 7.0)
    out, plain = torch.empty_like(q), torch.empty_like(q)
    kernels.attend(q, store.kv, plan, scale=0.125, out=out, logits=logits)
    kernels.score(q, store.kv, plan, scale=0.125, out=scores)
    assert torch.equal(logits, scores)
    kernels.attend(q, store.kv, plan, scale=0.125, out=plain)
    torch.testing.assert_close(out, plain, atol=1e-2, rtol=1e-2)
    assert torch.equal(out[:2], plain[:2])  # decode rows: asking for logits changes no bit


@pytest.mark.parametrize("wanted", [0, 1, 2, 4, 7])
def test_logits_of_the_first_rows_only(kernels: Kernels, case, wanted: int) -> None:
    """The rows behind, prefill rows in a step, give what they give without; the first give what `score` gives."""
    store, rows, q, expected = case
    plan = kernels.plan(rows, 6, 2, 64)
    logits = torch.full((wanted, 6, 310), 7.0)
    out, plain, lse, plain_lse = torch.empty_like(q), torch.empty_like(q), torch.empty(7, 6), torch.empty(7, 6)
    kernels.attend(q, store.kv, plan, scale=0.125, out=out, lse=lse, logits=logits)
    torch.testing.assert_close(logits.double(), expected[:wanted], atol=1e-5, rtol=1e-5)
    kernels.attend(q, store.kv, plan, scale=0.125, out=plain, lse=plain_lse)
    if wanted <= 2:  # no row of the chunk
        assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    torch.testing.assert_close(out, plain, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, plain_lse, atol=1e-5, rtol=1e-5)


def test_logits_with_a_start_per_head(kernels: Kernels) -> None:
    """Columns are numbered by what the head itself sees."""
    store = paged(1, 90, 2, 16)
    rows = make_rows(store, [0], [[0, 80]], [90], make_lists([[[], [3, 4]]]))
    q = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    logits = torch.full((1, 4, 90), 7.0)
    kernels.attend(q, store.kv, kernels.plan(rows, 4, 2, 16), scale=1.0, out=torch.empty_like(q), logits=logits)
    torch.testing.assert_close(logits[0, 0], store.dense_k[0, 0] @ q[0, 0], atol=1e-5, rtol=1e-5)
    seen = store.dense_k[0, 1, [3, 4, *range(80, 90)]]
    torch.testing.assert_close(logits[0, 3, :12], seen @ q[0, 3], atol=1e-5, rtol=1e-5)
    assert (logits[0, 2:, 12:] == 7).all()


def test_logits_into_a_wider_buffer(kernels: Kernels, case) -> None:
    store, rows, q, expected = case
    buffer = torch.full((7, 8, 400), 7.0)
    kernels.score(q, store.kv, kernels.plan(rows, 6, 2, 64), scale=0.125, out=buffer[:, 1:7, 20:330])
    torch.testing.assert_close(buffer[:, 1:7, 20:330].double(), expected, atol=1e-5, rtol=1e-5)
    assert (buffer[:, 0] == 7).all() and (buffer[..., :20] == 7).all()
