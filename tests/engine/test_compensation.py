"""The compensation token and the window: Z3 to Z5 of the specification, and a state that is empty, reused or grown."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import kernels
from kvloom.engine.request import Request, SamplingParams
from kvloom.engine.retention.compensation import Compensation
from kvloom.engine.retention.window import Window
from kvloom.kernels.interface import PagedKV, Rows

LAYERS, HEADS, GROUP, DIM, SIZE = 2, 2, 3, 16, 8
SCALE = DIM**-0.5
backends = pytest.mark.parametrize("backend", ["native", "torch", "reference"])


def request(name: str = "one") -> Request:
    return Request(id=name, prompt=[1], sampling=SamplingParams())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache(blocks: int = 20, seed: int = 0) -> list[PagedKV]:
    return [
        PagedKV(*(drawn(blocks, HEADS, SIZE, DIM, seed=seed + 10 * layer + which) for which in range(2)))
        for layer in range(LAYERS)
    ]


def sequence(tensor: Tensor, table: np.ndarray) -> Tensor:
    """[heads, positions, dim] of a table's blocks."""
    return tensor[torch.from_numpy(table).long()].transpose(0, 1).flatten(1, 2)


def table(blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(20)[:blocks].astype(np.int32)


def opened(dtype: torch.dtype = torch.float32) -> tuple[Compensation, int]:
    state, one = Compensation(LAYERS, HEADS, GROUP, DIM, dtype), request()
    state.open(one)
    return state, int(state.slots([one])[0])


def attend(kernel: Any, q: Tensor, kv: PagedKV, blocks: np.ndarray, begin: int, stop: int) -> tuple[Tensor, Tensor]:
    """Every row sees [begin, stop)."""
    rows, one = q.shape[0], torch.ones(q.shape[0], dtype=torch.int32)
    plan = kernel.plan(Rows(torch.from_numpy(blocks)[None], 0 * one, begin * one, stop * one), HEADS * GROUP, HEADS, DIM)
    lse = torch.empty(rows, HEADS * GROUP)
    return kernel.attend(q, kv, plan, scale=SCALE, out=torch.empty_like(q), lse=lse), lse


@backends
def test_identical_dropped_keys_are_exact(backend: str) -> None:
    """Z3: values may be any."""
    kernel, kvs, blocks = kernels.load(backend), cache(), table(10)
    for kv in kvs:
        for position in range(3, 50):
            kv.k[int(blocks[position // SIZE]), :, position % SIZE] = kv.k[int(blocks[0]), :, 2]
    state, slot = opened()
    state.fold(slot, kvs, blocks, 2, 50)
    for layer, kv in enumerate(kvs):
        q = 3 * drawn(4, HEADS * GROUP, DIM, seed=9)
        whole, whole_lse = attend(kernel, q, kv, blocks, 0, 75)
        out, lse = attend(kernel, q, kv, blocks, 50, 75)
        kernel.merge(out, lse, *attend(kernel, q, kv, blocks, 0, 2))
        assert (out - whole).abs().max() > 1e-2
        state.merge(kernel, layer, q, np.full(4, slot), out, lse, SCALE)
        torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
        torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=1e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_state_is_a_biased_token(backend: str, dtype: torch.dtype) -> None:
    """Z4: against an explicit softmax in fp64 with one more token; only masked heads; strided queries and outputs."""
    kernel, blocks = kernels.load(backend), table(12)
    kvs = [PagedKV(kv.k.to(dtype), kv.v.to(dtype)) for kv in cache()]
    state, slot = opened(dtype)
    state.fold(slot, kvs, blocks, 4, 61)
    q, out = drawn(3, 2 * HEADS * GROUP, DIM).to(dtype)[:, ::2], torch.empty(3, 2 * HEADS * GROUP, DIM, dtype=dtype)[:, ::2]
    for layer, kv in enumerate(kvs):
        plain, lse = attend(kernel, q.contiguous(), kv, blocks, 61, 90)
        out.copy_(plain)
        state.merge(kernel, layer, q, np.full(3, slot), out, lse, SCALE, torch.tensor([False, True]))
        k, v = (sequence(cached, blocks).double() for cached in kv)
        for head in range(HEADS * GROUP):
            mine = head // GROUP
            logits = k[mine, 61:90] @ q[:, head].double().T * SCALE
            token = k[mine, 4:61].mean(0) @ q[:, head].double().T * SCALE + math.log(57)
            if mine == 0:
                assert torch.equal(out[:, head], plain[:, head])
                continue
            weights = torch.softmax(torch.cat([logits, token[None]]), 0)
            expected = weights.T @ torch.cat([v[mine, 61:90], v[mine, 4:61].mean(0)[None]])
            close = 2e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[:, head].double(), expected, atol=close, rtol=close)
            total = torch.logsumexp(torch.cat([logits, token[None]]), 0)
            torch.testing.assert_close(lse[:, head].double(), total, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [[4, 61], [4, 5, 16, 17, 61], [4, *range(8, 64, 8), 61], list(range(4, 62))])
def test_sums_grow_as_if_made_at_once(steps: list[int]) -> None:
    """Z5: whatever the pieces, and however many blocks are gathered at once."""
    kernel, kvs, blocks = kernels.load("reference"), cache(), table(10)
    state, slot = opened()
    for first, last in pairwise(steps):
        state.fold(slot, kvs, blocks, first, last)
        assert state.dropped_to(np.array([slot])).tolist() == [last]
    q = drawn(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
        state.merge(kernel, layer, q, np.array([slot]), out, lse, SCALE)
        k, v = (sequence(cached, blocks)[:, 4:61].mean(1).repeat_interleave(GROUP, 0) for cached in kv)
        torch.testing.assert_close(out[0], v, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[0], (q[0] * k).sum(-1) * SCALE + math.log(57), atol=1e-6, rtol=1e-5)


def test_long_prompts_are_gathered_in_pieces() -> None:
    """The pieces of a sequence that is longer than one."""
    kvs = [PagedKV(*(drawn(150, HEADS, SIZE, DIM, seed=seed) for seed in (layer, layer + 5))) for layer in range(LAYERS)]
    blocks = np.random.default_rng(1).permutation(150).astype(np.int32)
    state, slot = opened()
    state.fold(slot, kvs, blocks, 3, 1190)
    q = torch.zeros(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
        state.merge(kernels.load("reference"), layer, q, np.array([slot]), out, lse, SCALE)
        expected = sequence(kv.v, blocks)[:, 3:1190].mean(1).repeat_interleave(GROUP, 0)
        torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lse[0], torch.full((HEADS * GROUP,), math.log(1187)))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_folded_contributes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit; so do a slot that was forgotten, and one that another request has used."""
    kernel, kvs, blocks = kernels.load(backend), cache(), table(10)
    state = Compensation(LAYERS, HEADS, GROUP, DIM, dtype)
    first, second, third = (request(name) for name in ("first", "second", "third"))
    for one in (first, second):
        state.open(one)
        state.fold(int(state.slots([one])[0]), kvs, blocks, 4, 61)
    state.forget(state.slots([first]))
    state.close(second)
    state.open(third)
    slots = state.slots([first, third])
    assert state.dropped_to(slots).tolist() == [0, 0]
    q, out, lse = (
        drawn(2, HEADS * GROUP, DIM).to(dtype),
        drawn(2, HEADS * GROUP, DIM, seed=1).to(dtype),
        drawn(2, HEADS * GROUP),
    )
    before = out.clone(), lse.clone()
    state.merge(kernel, 1, q, slots, out, lse, SCALE)
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
    state.fold(int(slots[0]), kvs, blocks, 4, 61)
    state.merge(kernel, 1, q, slots, out, lse, SCALE)
    assert not torch.equal(out[0], before[0][0]) and torch.equal(out[1], before[0][1])


def test_state_survives_growth() -> None:
    kvs, blocks = cache(), table(10)
    state, requests = Compensation(LAYERS, HEADS, GROUP, DIM, torch.float32), [request(str(i)) for i in range(11)]
    for i, one in enumerate(requests):
        state.open(one)
        state.fold(int(state.slots([one])[0]), kvs, blocks, 4, 8 + i)
    slots = state.slots(requests)
    assert len(set(slots.tolist())) == 11
    assert state.dropped_to(slots).tolist() == list(range(8, 19))
    q = torch.zeros(11, HEADS * GROUP, DIM)
    out, lse = torch.zeros_like(q), torch.full((11, HEADS * GROUP), -torch.inf)
    state.merge(kernels.load("reference"), 0, q, slots, out, lse, SCALE)
    torch.testing.assert_close(lse[:, 0], torch.arange(4.0, 15.0).log())
    assert state.bytes_per_request == 16 + LAYERS * HEADS * DIM * (8 + GROUP * 8)


def test_layers_may_have_other_numbers_of_heads() -> None:
    kvs = cache()
    kvs[0] = PagedKV(kvs[0].k[:, :0], kvs[0].v[:, :0])
    state, one, blocks = Compensation(LAYERS, [0, HEADS], GROUP, DIM, torch.float32), request(), table(10)
    state.open(one)
    slots = state.slots([one])
    state.fold(int(slots[0]), kvs, blocks, 4, 61)
    q = torch.zeros(1, HEADS * GROUP, DIM)
    out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
    state.merge(kernels.load("reference"), 1, q, slots, out, lse, SCALE)
    torch.testing.assert_close(out[0, 0], sequence(kvs[1].v, blocks)[0, 4:61].mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 8, 16])
def test_windows_grow_and_never_fall_back(size: int) -> None:
    window, n = Window(4, 24, 5), np.arange(1, 400, dtype=np.int32)
    begins = window.begin(n, size)
    assert begins.dtype == np.int32 and (np.diff(begins) >= 0).all() and (begins % size == 0).all()
    wanted = np.maximum(24, -(-n // 5))
    dropping = begins > 0
    assert (begins[dropping] > 4).all() and dropping.any()
    kept = n - begins
    assert (kept[dropping] >= wanted[dropping]).all() and (kept[dropping] < wanted[dropping] + size).all()
    assert ((n - wanted)[~dropping] < max(size, 5)).all()
    assert Window().begin(np.array([8192]), 16).tolist() == [6544]  # 8192 - 1639, down to a block


def test_windows_that_leave_nothing_between_drop_nothing() -> None:
    assert Window(20, 8, 1000).begin(np.array([24, 28, 31, 32, 40]), 16).tolist() == [0, 0, 0, 0, 32]
