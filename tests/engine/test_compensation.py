"""The compensation token and the window: Z3 to Z5 of the specification, and a state that is empty or reused."""

from __future__ import annotations

import math
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


class Sums:
    """A `Compensation` whose requests have their records one behind the other."""

    def __init__(self, heads: int | list[int] = HEADS, sinks: int = 4) -> None:
        self.state = Compensation(LAYERS, heads, GROUP, DIM, sinks)
        self.words = torch.full((20 * self.state.words,), 7, dtype=torch.int32)
        self.at: dict[Request, int] = {}

    def open(self, one: Request) -> None:
        self.at[one] = at = len(self.at) * self.state.words
        self.state.opened(one, self.words[at : at + self.state.words])

    def fold(self, one: Request, layers: list[PagedKV], table: np.ndarray, to: int) -> None:
        self.state.fold(self.words, self.at[one], layers, one, torch.from_numpy(table), to)

    def merge(
        self, kernel: Any, layer: int, q: Tensor, requests: list[Request], out: Tensor, lse: Tensor, mask: Tensor | None = None
    ) -> None:
        at = np.array([self.at.get(one, -1) for one in requests], np.int32)
        self.state.tokens(self.words, at, self.state.to(requests)).merge(kernel, layer, q, out, lse, SCALE, mask)


def opened(sinks: int = 4) -> tuple[Sums, Request]:
    sums, one = Sums(sinks=sinks), request()
    sums.open(one)
    return sums, one


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
    sums, one = opened(2)
    sums.fold(one, kvs, blocks, 50)
    for layer, kv in enumerate(kvs):
        q = 3 * drawn(4, HEADS * GROUP, DIM, seed=9)
        whole, whole_lse = attend(kernel, q, kv, blocks, 0, 75)
        out, lse = attend(kernel, q, kv, blocks, 50, 75)
        kernel.merge(out, lse, *attend(kernel, q, kv, blocks, 0, 2))
        assert (out - whole).abs().max() > 1e-2
        sums.merge(kernel, layer, q, [one] * 4, out, lse)
        torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
        torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=1e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_state_is_a_biased_token(backend: str, dtype: torch.dtype) -> None:
    """Z4: against an explicit softmax in fp64 with one more token; only masked heads; strided queries and outputs."""
    kernel, blocks = kernels.load(backend), table(12)
    kvs = [PagedKV(kv.k.to(dtype), kv.v.to(dtype)) for kv in cache()]
    sums, one = opened()
    sums.fold(one, kvs, blocks, 61)
    q, out = drawn(3, 2 * HEADS * GROUP, DIM).to(dtype)[:, ::2], torch.empty(3, 2 * HEADS * GROUP, DIM, dtype=dtype)[:, ::2]
    for layer, kv in enumerate(kvs):
        plain, lse = attend(kernel, q.contiguous(), kv, blocks, 61, 90)
        out.copy_(plain)
        sums.merge(kernel, layer, q, [one] * 3, out, lse, torch.tensor([False, True]))
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
    sums, one = opened()
    for last in steps[1:]:
        sums.fold(one, kvs, blocks, last)
        assert sums.state.to([one]).tolist() == [last]
    q = drawn(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
        sums.merge(kernel, layer, q, [one], out, lse)
        k, v = (sequence(cached, blocks)[:, 4:61].mean(1).repeat_interleave(GROUP, 0) for cached in kv)
        torch.testing.assert_close(out[0], v, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[0], (q[0] * k).sum(-1) * SCALE + math.log(57), atol=1e-6, rtol=1e-5)


def test_long_prompts_are_gathered_in_pieces() -> None:
    """The pieces of a sequence that is longer than one."""
    kvs = [PagedKV(*(drawn(150, HEADS, SIZE, DIM, seed=seed) for seed in (layer, layer + 5))) for layer in range(LAYERS)]
    blocks = np.random.default_rng(1).permutation(150).astype(np.int32)
    sums, one = opened(3)
    sums.fold(one, kvs, blocks, 1190)
    q = torch.zeros(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
        sums.merge(kernels.load("reference"), layer, q, [one], out, lse)
        expected = sequence(kv.v, blocks)[:, 3:1190].mean(1).repeat_interleave(GROUP, 0)
        torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lse[0], torch.full((HEADS * GROUP,), math.log(1187)))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_folded_contributes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit; so do a slot that was forgotten, and one that another request has used."""
    kernel, kvs, blocks = kernels.load(backend), cache(), table(10)
    sums = Sums()
    first, second, third = (request(name) for name in ("first", "second", "third"))
    for one in (first, second):
        sums.open(one)
        sums.fold(one, kvs, blocks, 61)
    sums.state.forget(first)
    sums.state.closed(second)
    sums.at[third] = sums.at[second]
    sums.state.opened(third, sums.words[sums.at[third] : sums.at[third] + sums.state.words])
    both = [first, third]
    assert sums.state.to(both).tolist() == [0, 0]
    q, out, lse = (
        drawn(2, HEADS * GROUP, DIM).to(dtype),
        drawn(2, HEADS * GROUP, DIM, seed=1).to(dtype),
        drawn(2, HEADS * GROUP),
    )
    before = out.clone(), lse.clone()
    sums.merge(kernel, 1, q, both, out, lse)
    sums.merge(kernel, 1, q, [request("without"), third], out, lse)
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
    sums.fold(first, kvs, blocks, 61)
    sums.merge(kernel, 1, q, both, out, lse)
    assert not torch.equal(out[0], before[0][0]) and torch.equal(out[1], before[0][1])


def test_requests_have_sums_of_their_own() -> None:
    kvs, blocks = cache(), table(10)
    sums, requests = Sums(), [request(str(i)) for i in range(11)]
    for i, one in enumerate(requests):
        sums.open(one)
        sums.fold(one, kvs, blocks, 8 + i)
    assert sums.state.to(requests).tolist() == list(range(8, 19))
    q = torch.zeros(11, HEADS * GROUP, DIM)
    out, lse = torch.zeros_like(q), torch.full((11, HEADS * GROUP), -torch.inf)
    sums.merge(kernels.load("reference"), 0, q, requests, out, lse)
    torch.testing.assert_close(lse[:, 0], torch.arange(4.0, 15.0).log())
    values = sequence(kvs[0].v, blocks)
    expected = torch.stack([values[:, 4 : 8 + i].mean(1).repeat_interleave(GROUP, 0) for i in range(11)])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-4)
    assert sums.state.words == LAYERS * HEADS * DIM * 2


def test_layers_may_have_other_numbers_of_heads() -> None:
    kvs = cache()
    kvs[0] = PagedKV(kvs[0].k[:, :0], kvs[0].v[:, :0])
    sums, one, blocks = Sums([0, HEADS]), request(), table(10)
    sums.open(one)
    sums.fold(one, kvs, blocks, 61)
    q = torch.zeros(1, HEADS * GROUP, DIM)
    out, lse = torch.zeros_like(q), torch.full((1, HEADS * GROUP), -torch.inf)
    sums.merge(kernels.load("reference"), 1, q, [one], out, lse)
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
