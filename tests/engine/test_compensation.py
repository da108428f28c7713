"""The compensation token and the window: Z3 to Z5 of the specification, and a state that is empty or reused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import kernels
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.retention.compensation import Compensation, Leaving
from kvloom.engine.retention.window import Window
from kvloom.kernels.interface import Folded, Lists, PagedKV, Rows

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

    def __init__(self, heads: int | list[int] = HEADS, sinks: int = 4, backend: str = "reference") -> None:
        self.state, self.kernel = Compensation(LAYERS, heads, DIM, sinks), kernels.load(backend)
        self.words = torch.full((20 * self.state.words,), -1, dtype=torch.int32)  # NaN
        self.at: dict[Request, int] = {}
        self.to: dict[Request, int] = {}

    def open(self, one: Request) -> None:
        self.at[one] = at = len(self.at) * self.state.words
        self.state.opened(one, self.words[at : at + self.state.words])

    def fold(self, one: Request, layers: list[PagedKV], table: np.ndarray, to: int) -> int:
        """Returns how many positions were added."""
        (first,) = self.state.advance([one], np.array([to], np.int32)).tolist()
        self.to[one] = to
        columns = (torch.tensor([value], dtype=torch.int32) for value in (0, first, to, self.at[one]))
        leaving = Leaving(torch.from_numpy(table)[None], *columns, most=to - first)
        for layer, kv in enumerate(layers):
            self.state.fold(self.kernel, self.words, layer, kv, leaving)
        return to - first

    def folded(self, layer: int, requests: list[Request]) -> Folded:
        at, to = (np.array([of.get(one, 0) for one in requests], np.int32) for of in (self.at, self.to))
        return self.state.folded(self.words, layer, torch.from_numpy(at), torch.from_numpy(self.state.dropped(to)))

    def alone(self, layer: int, q: Tensor, requests: list[Request], kv: PagedKV) -> tuple[Tensor, Tensor]:
        """What rows see that see nothing else."""
        return attend(self.kernel, q, kv, np.zeros(1, np.int32), 0, 0, folded=self.folded(layer, requests))


def opened(sinks: int = 4, backend: str = "reference") -> tuple[Sums, Request]:
    sums, one = Sums(sinks=sinks, backend=backend), request()
    sums.open(one)
    return sums, one


def attend(
    kernel: Any, q: Tensor, kv: PagedKV, blocks: np.ndarray, begin: int, stop: int, *, sinks: int = 0,
    out: Tensor | None = None, **more: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every row sees sinks and [begin, stop)."""
    rows, one = q.shape[0], torch.ones(q.shape[0], dtype=torch.int32)
    lists = Lists(torch.arange(sinks + 1, dtype=torch.int32), 0 * one[:, None], sinks * one[:, None])
    seen = Rows(torch.from_numpy(blocks)[None], 0 * one, begin * one, stop * one, lists)
    plan = kernel.plan(seen, HEADS * GROUP, HEADS, DIM)
    lse, out = torch.empty(rows, HEADS * GROUP), torch.empty_like(q) if out is None else out
    return kernel.attend(q, kv, plan, scale=SCALE, out=out, lse=lse, **more), lse


@backends
def test_identical_dropped_keys_are_exact(backend: str) -> None:
    """Z3: values may be any."""
    kvs, blocks = cache(), table(10)
    for kv in kvs:
        for position in range(3, 50):
            kv.k[int(blocks[position // SIZE]), :, position % SIZE] = kv.k[int(blocks[0]), :, 2]
    sums, one = opened(2, backend)
    sums.fold(one, kvs, blocks, 50)
    for layer, kv in enumerate(kvs):
        q = 3 * drawn(4, HEADS * GROUP, DIM, seed=9)
        whole, whole_lse = attend(sums.kernel, q, kv, blocks, 0, 75)
        out, lse = attend(sums.kernel, q, kv, blocks, 50, 75, sinks=2)
        assert (out - whole).abs().max() > 1e-2
        out, lse = attend(sums.kernel, q, kv, blocks, 50, 75, sinks=2, folded=sums.folded(layer, [one] * 4))
        torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
        torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=1e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_folded_is_a_biased_token(backend: str, dtype: torch.dtype) -> None:
    """Z4: against an explicit softmax in fp64 with one more token; some heads alone; strided queries and outputs."""
    blocks = table(12)
    kvs = [PagedKV(kv.k.to(dtype), kv.v.to(dtype)) for kv in cache()]
    sums, one = opened(backend=backend)
    sums.fold(one, kvs, blocks, 61)
    q, out = drawn(3, 2 * HEADS * GROUP, DIM).to(dtype)[:, ::2], torch.empty(3, 2 * HEADS * GROUP, DIM, dtype=dtype)[:, ::2]
    for layer, kv in enumerate(kvs):
        plain, _ = attend(sums.kernel, q.contiguous(), kv, blocks, 61, 90)
        out.copy_(plain)
        heads = torch.tensor([-1, 1], dtype=torch.int32)
        _, lse = attend(sums.kernel, q, kv, blocks, 61, 90, out=out, heads=heads, folded=sums.folded(layer, [one] * 3))
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


@backends
@pytest.mark.parametrize("steps", [[4, 61], [4, 5, 16, 17, 61], [4, *range(8, 64, 8), 61], list(range(4, 62))])
def test_sums_grow_as_if_made_at_once(backend: str, steps: list[int]) -> None:
    """Z5: whatever the pieces."""
    kvs, blocks = cache(), table(10)
    sums, one = opened(backend=backend)
    for first, last in itertools.pairwise(steps):
        assert sums.fold(one, kvs, blocks, last) == last - first
        assert sums.fold(one, kvs, blocks, last) == 0
    q = drawn(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = sums.alone(layer, q, [one], kv)
        k, v = (sequence(cached, blocks)[:, 4:61].mean(1).repeat_interleave(GROUP, 0) for cached in kv)
        torch.testing.assert_close(out[0], v, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[0], (q[0] * k).sum(-1) * SCALE + math.log(57), atol=1e-6, rtol=1e-5)


@backends
def test_long_prompts(backend: str) -> None:
    kvs = [PagedKV(*(drawn(150, HEADS, SIZE, DIM, seed=seed) for seed in (layer, layer + 5))) for layer in range(LAYERS)]
    blocks = np.random.default_rng(1).permutation(150).astype(np.int32)
    sums, one = opened(3, backend)
    sums.fold(one, kvs, blocks, 1190)
    q = torch.zeros(1, HEADS * GROUP, DIM)
    for layer, kv in enumerate(kvs):
        out, lse = sums.alone(layer, q, [one], kv)
        expected = sequence(kv.v, blocks)[:, 3:1190].mean(1).repeat_interleave(GROUP, 0)
        torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lse[0], torch.full((HEADS * GROUP,), math.log(1187)))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_folded_contributes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit; so do a record whose sums begin anew, and one that another request has used."""
    kvs, blocks = [PagedKV(kv.k.to(dtype), kv.v.to(dtype)) for kv in cache()], table(10)
    sums = Sums(backend=backend)
    first, second, third = (request(name) for name in ("first", "second", "third"))
    for one in (first, second):
        sums.open(one)
        sums.fold(one, kvs, blocks, 61)
    assert sums.state.advance([first], np.zeros(1, np.int32)).tolist() == [4], "nothing is in the sums any more"
    sums.to[first] = 0
    sums.state.closed(second)
    sums.at[third] = sums.at[second]
    sums.state.opened(third, sums.words[sums.at[third] : sums.at[third] + sums.state.words])
    both, without = [first, third], [request("without"), third]
    q = drawn(2, HEADS * GROUP, DIM).to(dtype)
    before = attend(sums.kernel, q, kvs[1], blocks, 61, 70)
    for requests in (both, without):
        for found, was in zip(attend(sums.kernel, q, kvs[1], blocks, 61, 70, folded=sums.folded(1, requests)), before):
            assert torch.equal(found, was)
    assert sums.fold(first, kvs, blocks, 61) == 57
    out, _ = attend(sums.kernel, q, kvs[1], blocks, 61, 70, folded=sums.folded(1, both))
    assert not torch.equal(out[0], before[0][0]) and torch.equal(out[1], before[0][1])


def test_sums_of_more_than_what_is_dropped_begin_anew() -> None:
    kvs, blocks = cache(), table(10)
    sums, one = opened()
    sums.fold(one, kvs, blocks, 61)
    assert sums.fold(one, kvs, blocks, 40) == 36
    out, _ = sums.alone(0, torch.zeros(1, HEADS * GROUP, DIM), [one], kvs[0])
    torch.testing.assert_close(out[0, 0], sequence(kvs[0].v, blocks)[0, 4:40].mean(0), atol=1e-6, rtol=1e-4)


def test_requests_have_sums_of_their_own() -> None:
    kvs, blocks = cache(), table(10)
    sums, requests = Sums(), [request(str(i)) for i in range(11)]
    for i, one in enumerate(requests):
        sums.open(one)
        sums.fold(one, kvs, blocks, 8 + i)
    known = np.arange(8, 19, dtype=np.int32)
    assert sums.state.advance(requests, known).tolist() == known.tolist()
    q = torch.zeros(11, HEADS * GROUP, DIM)
    out, lse = sums.alone(0, q, requests, kvs[0])
    torch.testing.assert_close(lse[:, 0], torch.arange(4.0, 15.0).log())
    values = sequence(kvs[0].v, blocks)
    expected = torch.stack([values[:, 4 : 8 + i].mean(1).repeat_interleave(GROUP, 0) for i in range(11)])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-4)
    assert sums.state.words == LAYERS * HEADS * DIM * 2


@backends
def test_layers_may_have_other_numbers_of_heads(backend: str) -> None:
    kvs = cache()
    kvs[0] = PagedKV(kvs[0].k[:, :0], kvs[0].v[:, :0])
    sums, one, blocks = Sums([0, HEADS], backend=backend), request(), table(10)
    sums.open(one)
    sums.fold(one, kvs, blocks, 61)
    out, _ = sums.alone(1, torch.zeros(1, HEADS * GROUP, DIM), [one], kvs[1])
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
