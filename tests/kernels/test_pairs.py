"""Attention on bf16 dot products beside attention in fp32: which build does which, and that both are right.

A row's bits in mixed batches, and over lists, are tested in test_native and test_attend, on the same builds.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvloom.kernels import PagedKV, Rows
from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.cpu.native.variants import FAST_DOT, missing, processor_flags
from tests.conftest import native_kernels
from tests.kernels.conftest import Paged, ints, make_rows, masked_attention, paged

BUILDS = {"native": not missing(FAST_DOT, processor_flags()), "x86-64-v4-vnni": False}
"""Whether each multiplies pairs."""


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kernels(build: str) -> NativeKernels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLOOM_NATIVE", build)
        return native_kernels()


def attend(kernels: NativeKernels, q: Tensor, kv: PagedKV, rows: Rows) -> Tensor:
    plan = kernels.plan(rows, q.shape[1], kv.k.shape[1], q.shape[2])
    return kernels.attend(q, kv, plan, scale=q.shape[2] ** -0.5, out=torch.full_like(q, float("nan")))


def queries(rows: Rows, heads: int, dim: int) -> Tensor:
    return torch.randn(rows.size, heads, dim, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_weights_are_rounded_where_pairs_are_multiplied_and_nowhere_else(build: str, kernels: NativeKernels) -> None:
    """Three positions, of which two have weights that differ by less than bf16 can tell, and opposite values."""
    k, v = torch.zeros(1, 1, 3, 8).bfloat16(), torch.zeros(1, 1, 3, 8).bfloat16()
    k[0, 0, 1, :2], k[0, 0, 2, :2] = torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, 2.0**-12])
    v[0, 0, 1], v[0, 0, 2] = 1024, -1024
    rows = Rows(ints([[0]]), ints([0]), ints([0]), ints([3]))
    out = attend(kernels, torch.full((1, 1, 8), 8**0.5).bfloat16(), PagedKV(k, v), rows)
    expected = torch.tensor([0.0, -1.0, -1.0 + 2.0**-12], dtype=torch.float64).softmax(0) @ v[0, 0, :, 0].double()
    assert bool((out == 0).all()) == BUILDS[build]
    if not BUILDS[build]:
        torch.testing.assert_close(out.double(), expected.expand(1, 1, 8), rtol=0.05, atol=0)


@pytest.mark.parametrize("dim", [20, 36, 40, 64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 6, 7, 8])
def test_odd_numbers_of_everything(kernels: NativeKernels, dim: int, group: int) -> None:
    """Positions, rows in registers, head dimensions: what fills no pair and no vector. Beyond each row there is NaN."""
    store = paged(2, 333, 2, dim, dtype=torch.bfloat16, seed=dim)
    rows = make_rows(store, [0, 1, *[1] * 7], [0, 0, *[0] * 7], [333, 129, *range(321, 328)])
    q = queries(rows, 2 * group, dim)
    expected, _ = masked_attention(q, store, rows, dim**-0.5)
    torch.testing.assert_close(attend(kernels, q, store.kv, rows).double(), expected, atol=2e-3, rtol=2**-8)


@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 7), (128, 6)])
def test_a_row_has_the_same_bits_however_its_prompt_was_cut(kernels: NativeKernels, dim: int, group: int) -> None:
    """In one chunk, in two, one after the other, with one thread, and beside another request."""
    store = paged(2, 700, 2, dim, dtype=torch.bfloat16)
    stops = list(range(601, 680))
    whole = rows_of(store, stops)
    q = queries(whole, 2 * group, dim)
    out = attend(kernels, q, store.kv, whole)
    one = NativeKernels(kernels.library, threads=1)
    assert torch.equal(attend(one, q, store.kv, whole), out)
    for cut in ([0, 33, 79], [0, 1, 3, 4, 71, 79]):
        parts = [attend(kernels, q[a:b], store.kv, rows_of(store, stops[a:b])) for a, b in itertools.pairwise(cut)]
        assert torch.equal(torch.cat(parts), out)
    both = make_rows(store, [0, *[1] * 79], [0] * 80, [700, *stops])
    assert torch.equal(attend(kernels, torch.cat([q[:1], q]), store.kv, both)[1:], out)


def rows_of(store: Paged, stops: list[int]) -> Rows:
    return make_rows(store, [1] * len(stops), [0] * len(stops), stops)


@pytest.mark.parametrize("seen", [5, 6, 64, 65])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_positions_that_no_row_sees_may_hold_anything(kernels: NativeKernels, seen: int, tokens: int) -> None:
    """Rows of one request that all see the same positions, in front of one whose key and value are no numbers."""
    source, dim, heads = torch.Generator().manual_seed(seen), 64, 3
    k, v = (torch.randn(8, 1, 16, dim, generator=source).bfloat16() for _ in "kv")
    rows = Rows(ints([list(range(8))]), ints([0] * tokens), ints([0] * tokens), ints([seen] * tokens))
    q = queries(rows, heads, dim)
    wanted = attend(kernels, q, PagedKV(k.clone(), v.clone()), rows)
    for cache in (k, v):
        cache.view(-1, dim)[seen:] = float("nan")
    assert torch.equal(attend(kernels, q, PagedKV(k, v), rows), wanted)
