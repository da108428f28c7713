"""Row-wise operations against formulas written out in fp64."""

import pytest
import torch
from torch import Tensor

from kvloom.kernels import Kernels, PagedKV
from tests.kernels.conftest import ints

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding of the result."""
    torch.testing.assert_close(actual.double(), expected, rtol=ULP[actual.dtype], atol=max(1e-6, ULP[actual.dtype] * 2**-8))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(("stream", "dtype"), [*zip(DTYPES, DTYPES), *((torch.float32, dtype) for dtype in DTYPES[1:])])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_add_rms_norm(kernels: Kernels, stream: torch.dtype, dtype: torch.dtype, rows: int) -> None:
    x, delta = random(rows, 200, dtype=stream), random(rows, 200, dtype=dtype, seed=1)
    weight, out = random(200, dtype=stream, seed=2), torch.empty(rows, 200, dtype=dtype)
    total = (x.float() + delta.float()).to(stream)
    assert kernels.add_rms_norm(x, delta, weight, 1e-5, out) is out
    assert torch.equal(x, total)
    close(out, norm(total, weight, 1e-5))


def test_rms_norm_without_addition_leaves_x(kernels: Kernels) -> None:
    x, weight, out = random(3, 48), random(48, seed=1), torch.empty(3, 48)
    before = x.clone()
    kernels.add_rms_norm(x, None, weight, 1e-3, out)
    assert torch.equal(x, before)
    close(out, norm(before, weight, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_silu_mul(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    gate_up = random(rows, 300, dtype=dtype) * 8
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    out = torch.empty(rows, 150, dtype=dtype)
    assert kernels.silu_mul(gate_up, out) is out
    gate, up = gate_up.double().chunk(2, -1)
    close(out, gate * torch.sigmoid(gate) * up)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (i, i + rotary/2) as complex numbers times e^(i angle); x: [rows, heads, dim], angle: [rows, rotary/2]."""
    half = angle.shape[-1]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("rotary", [64, 32])
@pytest.mark.parametrize(("reach", "in_place"), [(30, True), (30, False), (100_000, True)])
def test_rotate(kernels: Kernels, dtype: torch.dtype, rows: int, rotary: int, reach: int, in_place: bool) -> None:
    """A long shift is as exact as a short one: no angle passes through fp32 before it is reduced."""
    k = random(rows, 3, 64, dtype=dtype)
    delta = torch.randint(-reach, reach, (rows,), generator=torch.Generator().manual_seed(1)).int()
    delta[rows // 2 :] = delta[rows // 2]  # runs of one delta, as KVShare's segments have
    inv_freq = 10000.0 ** (-torch.arange(rotary // 2) / (rotary // 2))
    expected = turned(k, delta[:, None].double() * inv_freq.double())
    out = k if in_place else torch.empty_like(k)
    assert kernels.rotate(k, delta, inv_freq, out) is out
    torch.testing.assert_close(out.double(), expected, rtol=ULP[dtype], atol=max(1e-5, ULP[dtype] * 2**-2))


def test_rotating_there_and_back(kernels: Kernels) -> None:
    k = random(10, 2, 16)
    inv_freq = 100.0 ** (-torch.arange(8) / 8)
    there = kernels.rotate(k, ints(range(10)), inv_freq, torch.empty_like(k))
    back = kernels.rotate(there, ints([-i for i in range(10)]), inv_freq, torch.empty_like(k))
    torch.testing.assert_close(back, k, atol=1e-5, rtol=1e-5)
    assert torch.equal(there[0], k[0]) and not torch.allclose(there[1], k[1])


def empty_cache(dtype: torch.dtype, layout: str, heads: int = 2, dim: int = 64) -> PagedKV:
    if layout == "HND":
        return PagedKV(*(torch.zeros(5, heads, 16, dim, dtype=dtype) for _ in "kv"))
    return PagedKV(*(torch.zeros(5, 16, heads, dim, dtype=dtype).transpose(1, 2) for _ in "kv"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_store(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    kv = empty_cache(dtype, layout)
    fused = random(4, 6, 64, dtype=dtype)  # k and v as strided slices of one tensor
    k, v = fused[:, 1:3], fused[:, 3:5]
    kernels.store(k, v, kv, torch.tensor([79, 0, -1, 17]))
    for row, (block, offset) in {0: (4, 15), 1: (0, 0), 3: (1, 1)}.items():
        assert torch.equal(kv.k[block, :, offset], k[row]) and torch.equal(kv.v[block, :, offset], v[row])
    assert kv.k.any(-1).sum() == kv.v.any(-1).sum() == 3 * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rows", "rotary"), [(6, 64), (6, 32), (70, 64)])
def test_rotate_store(kernels: Kernels, dtype: torch.dtype, layout: str, normed: bool, rows: int, rotary: int) -> None:
    kv = empty_cache(dtype, layout)
    qkv = random(rows, (1 + 6 + 2 * 2) * 64, dtype=dtype)[:, 64:]  # a head group's part of a wider projection
    inv_freq = 10000.0 ** (-torch.arange(rotary // 2).double() / (rotary // 2))
    angles = torch.arange(128).double()[:, None] * inv_freq
    positions = torch.arange(rows) + 7
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:rows]
    slots[1] = -1
    weights = (random(64, dtype=dtype, seed=4), random(64, dtype=dtype, seed=5)) if normed else (None, None)
    q = torch.empty(rows, 6, 64, dtype=dtype)
    result = kernels.rotate_store(qkv, angles.cos().float(), angles.sin().float(), positions, kv, slots, q, *weights, 1e-6)
    assert result is q

    heads = qkv.double().reshape(rows, 10, 64)
    queries, keys, values = heads.split([6, 2, 2], 1)
    if normed:
        queries, keys = norm(queries, weights[0], 1e-6), norm(keys, weights[1], 1e-6)
    limits = {"rtol": ULP[dtype], "atol": max(1e-5, ULP[dtype] * 2**-2)}
    torch.testing.assert_close(q.double(), turned(queries, angles[positions]), **limits)
    kept = slots >= 0
    block, offset = slots[kept] // 16, slots[kept] % 16
    torch.testing.assert_close(kv.k[block, :, offset].double(), turned(keys, angles[positions])[kept], **limits)
    assert torch.equal(kv.v[block, :, offset].double(), values[kept])
    assert kv.v.any(-1).sum() == (rows - 1) * 2
