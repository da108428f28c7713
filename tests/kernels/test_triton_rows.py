"""Row-wise operations of the Triton back end, run by its interpreter, against the reference, in shapes drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import PagedKV
from kvloom.kernels.reference import ReferenceKernels

rows: Any = pytest.importorskip("kvloom.kernels.triton.rows")
triton: Any = pytest.importorskip("kvloom.kernels.triton")

REFERENCE, KERNELS = ReferenceKernels(), triton.TritonKernels("cpu")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
few = settings(max_examples=25, deadline=None, derandomize=True)
dtypes, seeds = st.sampled_from(list(NEAR)), st.integers(0, 10**6)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding; what was NaN still is."""
    torch.testing.assert_close(found, expected, rtol=NEAR[found.dtype], atol=NEAR[found.dtype], equal_nan=True)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def cache(heads: int, block_size: int, dim: int, dtype: torch.dtype, tokens_first: bool) -> PagedKV:
    if tokens_first:
        return PagedKV(*(poisoned(4, block_size, heads, dim, dtype=dtype).transpose(1, 2) for _ in "kv"))
    return PagedKV(*(poisoned(4, heads, block_size, dim, dtype=dtype) for _ in "kv"))


def some_slots(count: int, block_size: int) -> Tensor:
    """No two the same; about one in four is -1."""
    return torch.where(torch.rand(count) < 0.25, -1, torch.randperm(4 * block_size)[:count])


@few
@given(seeds, st.integers(0, 4), st.integers(1, 9), st.sampled_from([16, 24, 128]), st.sampled_from([8, 64, 80, 96]), dtypes,
       st.booleans())  # fmt: skip
def test_store(seed: int, count: int, heads: int, block_size: int, dim: int, dtype: torch.dtype, tokens_first: bool) -> None:
    torch.manual_seed(seed)
    fused = torch.randn(count, 2 * heads + 1, dim).to(dtype)
    k, v, slots = fused[:, 1 : 1 + heads], fused[:, 1 + heads :], some_slots(count, block_size)
    found, expected = (cache(heads, block_size, dim, dtype, tokens_first) for _ in range(2))
    rows.store(k, v, found, slots)
    REFERENCE.store(k, v, expected, slots)
    for one, other in zip(found, expected):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@few
@given(seeds, st.integers(0, 3), st.integers(1, 10), st.sampled_from([(16, 8), (64, 64), (80, 20), (96, 96)]), dtypes,
       st.booleans(), st.sampled_from([3, 3000, 10**6]))  # fmt: skip
def test_rotate(seed: int, count: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, in_place: bool, far: int) -> None:
    torch.manual_seed(seed)
    k, delta = torch.randn(count, heads, dims[0]).to(dtype), torch.randint(-far, far, (count,)).int()
    inv_freq = 10_000.0 ** (-torch.arange(dims[1] // 2) / (dims[1] // 2))
    expected = REFERENCE.rotate(k, delta, inv_freq, torch.empty_like(k))
    out = k.clone() if in_place else poisoned(count, heads, dims[0], dtype=dtype)
    assert rows.rotate(out if in_place else k, delta, inv_freq, out) is out
    same(out, expected)


@few
@given(st.data(), seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 7, 8]),
       st.sampled_from([(16, 8), (64, 64), (80, 20), (96, 96)]), dtypes)  # fmt: skip
def test_rotate_store(data: st.DataObject, seed: int, count: int, kv_heads: int, group: int, dims: tuple[int, int],
                      dtype: torch.dtype) -> None:  # fmt: skip
    """A row alone has the bits that it has among others."""
    torch.manual_seed(seed)
    (dim, rotary), q_heads, tokens_first = dims, kv_heads * group, data.draw(st.booleans())
    qkv = torch.randn(count, (1 + q_heads + 2 * kv_heads) * dim).to(dtype)[:, dim:]
    angles = torch.randn(50, rotary // 2)
    positions, slots = torch.randint(0, 50, (count,)), some_slots(count, 16)
    norms = [torch.randn(dim).to(dtype) if data.draw(st.booleans()) else None for _ in "qk"]
    runs = []
    for run in (REFERENCE.rotate_store, rows.rotate_store):
        kv, q = cache(kv_heads, 16, dim, dtype, tokens_first), poisoned(count, q_heads, dim, dtype=dtype)
        assert run(qkv, angles.cos(), angles.sin(), positions, kv, slots, q, *norms, 1e-6) is q
        runs.append((q, *kv))
    for expected, found in zip(*runs):
        same(found, expected)
    kv, q = cache(kv_heads, 16, dim, dtype, tokens_first), poisoned(1, q_heads, dim, dtype=dtype)
    rows.rotate_store(qkv[:1], angles.cos(), angles.sin(), positions[:1], kv, slots[:1], q, *norms, 1e-6)
    assert torch.equal(q[0], runs[1][0][0])


@few
@given(seeds, st.integers(0, 4), st.integers(1, 700), dtypes, st.booleans(), st.booleans())
def test_add_rms_norm(seed: int, count: int, hidden: int, dtype: torch.dtype, wide_stream: bool, add: bool) -> None:
    torch.manual_seed(seed)
    stream = torch.float32 if wide_stream else dtype
    x, weight = torch.randn(count, hidden).to(stream), torch.randn(hidden).to(stream)
    delta = torch.randn(count, hidden + 3).to(dtype)[:, 3:] if add else None
    known, expected = x.clone(), torch.empty(count, hidden, dtype=dtype)
    REFERENCE.add_rms_norm(known, delta, weight, 1e-5, expected)
    out = poisoned(count, hidden, dtype=dtype)
    assert rows.add_rms_norm(x, delta, weight, 1e-5, out) is out
    assert torch.equal(x, known)
    same(out, expected)


@few
@given(seeds, st.integers(0, 3), st.integers(1, 2100), dtypes)
def test_silu_mul(seed: int, count: int, intermediate: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    gate_up = (torch.randn(count, 2 * intermediate) * 5).to(dtype)
    out = poisoned(count, intermediate, dtype=dtype)
    assert rows.silu_mul(gate_up, out) is out
    same(out, REFERENCE.silu_mul(gate_up, torch.empty_like(out)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 1100), st.booleans())
def test_sample(seed: int, vocab: int, ties: bool) -> None:
    """Four rows that are drawn in different ways, with a fifth that cannot be."""
    torch.manual_seed(seed)
    logits = torch.randn(5, vocab) * 3
    logits = (logits * 2).round() / 2 if ties else logits
    logits[:, torch.rand(vocab) < 0.1] = -torch.inf
    logits[4, vocab // 2] = torch.nan
    how = torch.tensor([[0, 0, 1, 0, 0.3], [0.8, 0, 1, 0.02, 0.6], [1, 40, 0.9, 0, 0.97], [20, 3, 0.5, 0.1, 0.4],
                        [1, 0, 1, 0, 0.5]], dtype=torch.float64)  # fmt: skip
    expected = REFERENCE.sample(logits, how, torch.empty(5, dtype=torch.int64))
    out = torch.full((5,), -7)
    assert KERNELS.sample(logits, how, out) is out
    assert out.tolist() == expected.tolist()
    alone = KERNELS.sample(logits[2:3], how[2:3], torch.full((1,), -7))
    assert alone.tolist() == out[2:3].tolist()


def test_what_does_not_belong_together_is_refused() -> None:
    x, out = torch.zeros(2, 8), torch.zeros(2, 4)
    with pytest.raises(TypeError, match="share one dtype"):
        rows.silu_mul(x, out.bfloat16())
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        rows.silu_mul(torch.zeros(8, 2).t(), out)
    with pytest.raises(TypeError, match=r"must be contiguous torch\.int64"):
        rows.store(out[:, None], out[:, None], PagedKV(out[None, None], out[None, None]), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="must be fp32"):
        rows.rotate(out[:, None], torch.zeros(2, dtype=torch.int32), torch.zeros(2).double(), out[:, None])
