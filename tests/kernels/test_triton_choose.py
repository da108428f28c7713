"""Pooling, top-k and renewals of the Triton back end, run by its interpreter, against the reference, drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import load
from kvloom.kernels.interface import COMPARES, NO_LIST, Renewal
from kvloom.kernels.reference import ReferenceKernels
from tests.kernels.conftest import ints

topk: Any = pytest.importorskip("kvloom.kernels.triton.topk")

REFERENCE, TRITON = ReferenceKernels(), load("triton")
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def on_or_off(count: int) -> Tensor:
    return torch.where(torch.rand(count) < 0.3, -1, torch.arange(count) * 1000).int()


@few
@given(seeds, st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 7, 8]), st.sampled_from([5, 700, 1024, 1400]),
       st.sampled_from([1, 3, 7, 31, 601]), st.sampled_from(["sum", "max"]), st.booleans(), st.booleans())  # fmt: skip
def test_pool(seed: int, count: int, groups: int, group: int, width: int, window: int, how: Any, masked: bool,
              aligned: bool) -> None:  # fmt: skip
    """A row alone has the bits that it has among others. What is no candidate may be anything."""
    torch.manual_seed(seed)
    room = -(-width // 16) * 16 if aligned else width + 2
    logits = torch.randn(count, groups * group, room + (not aligned))[:, :, int(not aligned) :] * 4
    logits[torch.rand(count, groups * group) < 0.1] = -torch.inf
    last = torch.randint(0, width + 1, (count,)).int()
    first = torch.minimum(last, torch.randint(0, 9, (count,)).int())
    column = torch.arange(room)
    logits[((column < first[:, None]) | (column >= last[:, None]))[:, None].expand_as(logits)] = torch.nan
    active = on_or_off(count) if masked else None
    found, expected = (torch.full((count, groups, width), torch.nan) for _ in range(2))
    assert TRITON.pool(logits, first, last, groups, how=how, window=window, out=found, active=active) is found
    REFERENCE.pool(logits, first, last, groups, how=how, window=window, out=expected, active=active)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7, equal_nan=True)
    if count:
        alone = torch.full((1, groups, width + 50), torch.nan)
        off = None if active is None else active[:1]
        TRITON.pool(logits[:1], first[:1], last[:1], groups, how=how, window=window, out=alone, active=off)
        assert torch.equal(alone[0, :, :width].nan_to_num(7.0), found[0].nan_to_num(7.0))


@few
@given(st.data(), seeds, st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 40, 1023, 1024, 1025, 2500]),
       st.sampled_from([0.0, 1.0, 20.0]), st.booleans())  # fmt: skip
def test_select(data: st.DataObject, seed: int, count: int, heads: int, width: int, rounding: float, by_head: bool) -> None:
    torch.manual_seed(seed)
    shape = (count, heads) if by_head else (count,)
    scores = torch.randn(*shape, width + 1)[..., 1:] * 3
    scores = (scores * rounding).round() / rounding if rounding else scores  # many ties, and -0
    scores[torch.rand(*shape, width) < 0.05] = -torch.inf
    k = data.draw(st.sampled_from([1, 3, width // 2 + 1, width, width + 30]))
    lengths = torch.randint(0, width + 1, (count,)).int()
    offset = torch.randint(0, 1000, (count,)).int() if data.draw(st.booleans()) else None
    found, expected = (kernels.select(scores, lengths, k, offset=offset) for kernels in (TRITON, REFERENCE))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    at = torch.where(torch.rand(count) < 0.3, -1, torch.arange(count) * heads * (k + 2)).int()
    words = [torch.full((count * heads * (k + 2) + k * heads + 9,), 7, dtype=torch.int32) for _ in range(2)]
    for kernels, into in zip((TRITON, REFERENCE), words):
        place = into.as_strided((heads, k) if by_head else (k,), (k + 1, 1) if by_head else (1,), 3)
        kernels.select(scores, lengths, k, offset=offset, out=(place, None), at=at)
    assert torch.equal(*words)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seeds, st.sampled_from([1, 50, 600, 1500]), st.sampled_from([0.0, 2.0]), st.booleans(), st.sampled_from([1 << 16, 9000, 4])
)
def test_rankings_too_wide_to_be_held(seed: int, k: int, rounding: float, by_head: bool, room: int) -> None:
    """Cut into segments, once or again; read at each halving if that brings nothing, or candidates find no room; row by row if
    those of all rows find none together."""
    torch.manual_seed(seed)
    shape, lengths = (3, 2) if by_head else (3,), ints([5008, 4097, 30])
    scores = torch.randn(*shape, 5008)
    scores = (scores * rounding).round() / rounding if rounding else scores
    at, offset = ints([-1, 0, shape[-1] * k]), ints([5, 0, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "WIDE", 2048)
        patch.setattr(TRITON, "_scratches", [torch.full((room,), torch.nan)])
        found, expected = (kernels.select(scores, lengths, k) for kernels in (TRITON, REFERENCE))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        words = [torch.full((2 * shape[-1] * k,), 7, dtype=torch.int32) for _ in range(2)]
        for kernels, into in zip((TRITON, REFERENCE), words):
            place = into[: k * shape[-1]].view(2, k) if by_head else into[:k]
            kernels.select(scores, lengths, k, offset=offset, out=(place, None), at=at)
        assert torch.equal(*words)


@few
@given(st.data(), seeds, st.integers(0, 5), st.sampled_from([1, 3, 8]), st.sampled_from([(8, 4), (64, 64), (80, 0)]),
       st.sampled_from(COMPARES), st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_renew(data: st.DataObject, seed: int, count: int, heads: int, dims: tuple[int, int], compare: Any,
               dtype: torch.dtype) -> None:  # fmt: skip
    torch.manual_seed(seed)
    (dim, rotary), (turned, dense) = dims, (data.draw(st.booleans()), data.draw(st.booleans()))
    how = Renewal(tail=2, query=5, width=12, recent=4, most=50, compare=compare, threshold=0.6, dense=dense)
    q, size = torch.randn(count, heads, dim).to(dtype), 5 + heads * dim
    angle = torch.randn(count, rotary // 2)
    angles = (angle.cos(), angle.sin()) if turned and rotary else None
    words, at = torch.randint(-9, 9, (count * size + 3,)).int(), torch.arange(count).int() * size + 3
    words.view(torch.float32)[3:].view(count, size)[:, 5:] = torch.randn(count, heads * dim) * 0.5 + q.flatten(1).float()
    words[3:].view(count, size)[:, 2] = torch.tensor([NO_LIST, 60, 96, 110, 40])[torch.randint(0, 5, (count,))].int()
    stop, due = torch.randint(90, 120, (count,)).int(), torch.randint(0, 3, (count,)).int()
    runs = []
    for kernels in (REFERENCE, TRITON):
        record, active, start = words.clone(), torch.full((count,), -7).int(), torch.full((count,), -7).int()
        lengths, counts = torch.full((count, 3), -7).int(), torch.tensor([5, 6, 7])
        kernels.renew(q, record, at, stop, due, how, angles, active, start, lengths, counts)
        kept = record[3:].view(count, size)[:, 5:].clone().view(torch.float32)
        record[3:].view(count, size)[:, 5:] = 0
        runs.append((kept, record, active, start, lengths, counts))
    for expected, found in zip(*runs):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_belong_together_is_refused() -> None:
    scores, one = torch.zeros(1, 8), ints([1])
    with pytest.raises(ValueError, match=r"out must be int32 \[1, 2\] and \[1\]"):
        TRITON.select(scores, one, 2, out=(torch.zeros(1, 3, dtype=torch.int32), None))
    with pytest.raises(TypeError, match=r"must be contiguous torch\.int32"):
        TRITON.select(scores, one.long(), 2)
    with pytest.raises(TypeError, match="must be fp32"):
        TRITON.select(scores.double(), one, 2)
    with pytest.raises(ValueError, match="they must have one row each"):
        TRITON.pool(scores[None], ints([0, 0]), one, 1, how="sum", window=1, out=torch.zeros(1, 1, 8))
