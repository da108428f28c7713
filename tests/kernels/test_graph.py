"""Captured calls: a replay computes what the calls would, for other rows, other contents and another plan in the same place."""

from __future__ import annotations

import threading
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import Tensor

from kvloom.kernels import Counters, PagedKV, Rows
from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from tests.conftest import native_kernels
from tests.kernels.stored import random_stored

MOST, Q_HEADS, KV_HEADS, DIM, BLOCK = 40, 6, 2, 32, 16


@pytest.fixture
def kernels() -> NativeKernels:
    return native_kernels()


class Step:
    """A norm, a projection, rotation into the cache and attention, over buffers that stay where they are."""

    def __init__(self, kernels: NativeKernels) -> None:
        source = torch.Generator().manual_seed(3)
        width = (Q_HEADS + 2 * KV_HEADS) * DIM
        self.kernels = kernels
        self.project = QuantLinear(kernels, pack(kernels, random_stored("Q4_1", width, 64)))
        self.x, self.normed = torch.empty(MOST, 64), torch.empty(MOST, 64)
        self.qkv, self.q = torch.empty(MOST, width), torch.empty(MOST, Q_HEADS, DIM)
        self.out, self.weight = torch.empty_like(self.q), torch.rand(64, generator=source)
        angles = torch.arange(512)[:, None] * torch.rand(DIM // 2, generator=source)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions, self.slots = torch.zeros(MOST, dtype=torch.int64), torch.zeros(MOST, dtype=torch.int64)
        shape = (32, KV_HEADS, BLOCK, DIM)
        self.kv = PagedKV(torch.randn(shape, generator=source), torch.randn(shape, generator=source))
        self.plan = None

    def fill(self, rows: int, first: int, seed: int) -> None:
        """New contents: `rows` rows of one sequence, at positions from `first` on."""
        self.rows = rows
        self.x[:rows] = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
        self.positions[:rows] = torch.arange(first, first + rows)
        self.slots[:rows] = self.positions[:rows]
        zeros, stop = torch.zeros(rows, dtype=torch.int32), (self.positions[:rows] + 1).to(torch.int32)
        visible = Rows(torch.arange(32, dtype=torch.int32)[None], zeros, zeros, stop)
        self.plan = self.kernels.plan(visible, Q_HEADS, KV_HEADS, DIM, self.plan)

    def run(self) -> None:
        rows, kernels = self.rows, self.kernels
        normed = kernels.add_rms_norm(self.x[:rows], None, self.weight, 1e-5, self.normed[:rows])
        qkv = self.project(normed, self.qkv[:rows])
        kernels.rotate_store(qkv, self.cos, self.sin, self.positions[:rows], self.kv, self.slots[:rows], self.q[:rows])
        assert self.plan is not None
        kernels.attend(self.q[:rows], self.kv, self.plan, scale=0.2, out=self.out[:rows])

    def results(self) -> list[Tensor]:
        return [self.out[: self.rows].clone(), self.kv.k.clone(), self.kv.v.clone()]


def test_a_replay_computes_what_the_calls_would(kernels: NativeKernels) -> None:
    eager, captured, graph = Step(kernels), Step(kernels), kernels.graph()
    captured.fill(3, 0, seed=0)
    graph.piece(captured.run)
    eager.fill(3, 0, seed=0)
    eager.run()
    for seed, (rows, first) in enumerate([(1, 3), (40, 4), (2, 44), (1, 300)], 1):
        eager.fill(rows, first, seed)
        eager.run()
        captured.fill(rows, first, seed)
        graph.replay(0, rows)
        for was, is_ in zip(eager.results(), captured.results(), strict=True):
            assert torch.equal(was, is_)


def test_replays_are_counted_like_calls(kernels: NativeKernels) -> None:
    step, graph = Step(kernels), kernels.graph()
    step.fill(5, 0, seed=0)
    graph.piece(lambda: [step.run() for _ in range(2)])
    step.fill(7, 100, seed=1)
    before = Counters(**asdict(kernels.counters))
    graph.replay(0, 7)
    replayed = {name: value - getattr(before, name) for name, value in asdict(kernels.counters).items()}
    before = Counters(**asdict(kernels.counters))
    step.run()
    step.run()
    assert replayed == {name: value - getattr(before, name) for name, value in asdict(kernels.counters).items()}
    assert replayed["positions"] == 2 * KV_HEADS * sum(range(101, 108))


def test_pieces_are_replayed_alone(kernels: NativeKernels) -> None:
    graph, x, out = kernels.graph(), torch.randn(4, 32), torch.zeros(4, 32)
    weights = torch.full((32,), 1.0), torch.full((32,), 2.0)
    for weight in weights:
        assert graph.piece(partial(kernels.add_rms_norm, x, None, weight, 1e-5, out)) is out
    twice = out.clone()
    graph.replay(0, 4)
    assert torch.equal(2 * out, twice)
    out.zero_()
    graph.replay(1, 3)
    assert torch.equal(out[:3], twice[:3]) and not out[3].any(), "a replay touches no row past its own"


def test_a_plan_of_another_number_of_rows_is_refused(kernels: NativeKernels) -> None:
    step, graph = Step(kernels), kernels.graph()
    step.fill(5, 0, seed=0)
    graph.piece(step.run)
    with pytest.raises(ValueError, match="6 rows are replayed, but the plan of a captured call has 5"):
        graph.replay(0, 6)


def test_a_plan_is_made_anew_for_the_same_heads_only(kernels: NativeKernels) -> None:
    step = Step(kernels)
    step.fill(5, 0, seed=0)
    assert step.plan is not None
    before = step.plan
    step.fill(6, 0, seed=0)
    assert step.plan is before and before.rows.size == 6
    with pytest.raises(ValueError, match="6 and 2 heads of 32 cannot be made anew for others"):
        kernels.plan(step.plan.rows, Q_HEADS, 3, DIM, step.plan)


def test_what_fails_leaves_no_piece_and_no_capture(kernels: NativeKernels) -> None:
    graph, x = kernels.graph(), torch.randn(2, 64)
    outs = torch.empty(2, 32), torch.empty(2, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError):
        graph.piece(lambda: [kernels.silu_mul(x, out) for out in outs])
    assert kernels.library.capture is None
    with pytest.raises(IndexError):
        graph.replay(0, 2)


def test_another_threads_calls_are_not_captured(kernels: NativeKernels) -> None:
    graph, x, mine, others = kernels.graph(), torch.randn(2, 64), torch.empty(2, 32), torch.empty(2, 32)

    def both() -> None:
        thread = threading.Thread(target=kernels.silu_mul, args=(x, others))
        thread.start()
        thread.join()
        kernels.silu_mul(x, mine)

    graph.piece(both)
    wanted = mine.clone()
    mine.zero_(), others.zero_()
    graph.replay(0, 2)
    assert torch.equal(mine, wanted) and not others.any()
