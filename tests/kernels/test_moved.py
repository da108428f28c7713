"""Kernels that are called with another device's tensors: what a test sees is as if it had been called itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvloom.kernels import load
from tests.kernels.conftest import ints, make_lists, make_rows, paged
from tests.kernels.moved import Moved


@pytest.fixture
def moved() -> Any:
    """A copy of all memory stands for another device's."""
    return Moved(load("torch"), torch.device("cpu"))


def test_all_that_is_written_comes_back_and_nothing_else_changes(moved: Any) -> None:
    room = torch.full((4, 90), 7.0)
    out = room[1:3, 10:60]
    gate_up = torch.randn(2, 100)
    assert moved.silu_mul(gate_up, out) is out
    assert torch.equal(out, torch.nn.functional.silu(gate_up[:, :50]) * gate_up[:, 50:])
    room[1:3, 10:60] = 7.0
    assert (room == 7.0).all()


def test_what_shares_memory_shares_it_there(moved: Any) -> None:
    words, x = torch.zeros(96), torch.randn(2, 24)
    moved.add_rms_norm(x, words[:48].view(2, 24), torch.ones(24), 1e-5, words[48:].view(2, 24))
    assert not words[:48].any() and words[48:].all()


def test_a_plan_sees_what_is_written_later(moved: Any) -> None:
    store, plain = paged(1, 200, 2, 16, layout="NHD"), load("torch")
    lists = make_lists([[list(range(0, 80, 2))]])
    rows = make_rows(store, [0], [150], [170], lists)
    plan, q = moved.plan(rows, 4, 2, 16), torch.randn(1, 4, 16)
    for step in (0, 7):
        lists.positions.add_(step)
        out, wanted = torch.empty_like(q), torch.empty_like(q)
        assert moved.attend(q, store.kv, plan, scale=0.25, out=out) is out
        plain.attend(q, store.kv, plain.plan(rows, 4, 2, 16), scale=0.25, out=wanted)
        assert torch.equal(out, wanted)


def test_new_tensors_come_back_too(moved: Any) -> None:
    columns, counts = moved.select(torch.tensor([[3.0, 1.0, 2.0]]), ints([3]), 2)
    assert columns.tolist() == [[0, 2]] and counts.tolist() == [2]
    none = torch.empty(0, 8)
    assert moved.silu_mul(torch.empty(0, 16), none) is none
    moved.forget()
    assert not moved._memories


def test_what_is_refused_skips_and_what_is_wrong_does_not(moved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("head_dim is 20; the triton back end takes multiples of 8 up to 256")

    monkeypatch.setattr(moved._kernels, "silu_mul", refuse)
    with pytest.raises(pytest.skip.Exception, match="multiples of 8"):
        moved.silu_mul(torch.empty(1, 2), torch.empty(1, 1))
    with pytest.raises(ValueError, match="window is 2"):
        moved.pool(torch.zeros(1, 2, 4), ints([0]), ints([4]), 1, how="sum", window=2, out=torch.empty(1, 1, 4))
