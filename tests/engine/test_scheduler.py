"""The scheduler without a model: budgets, orders, admission, preemption, and progress under a cache of a few blocks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.cache import CacheManager, GroupSpec, Storage
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.requests.isolation import Blamed
from kvloom.engine.requests.request import Request, Status
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.scheduling import ORDERS, Chunk, Scheduler, StepPlan

SIZE = 4
DOMAINS = DomainFactory("test")


class Engine:
    """A scheduler with a model that always samples token 7."""

    def __init__(self, blocks: int = 64, *, order: str = "fcfs", max_seqs: int = 8, max_tokens: int = 16) -> None:
        self.cache = CacheManager(Storage(GroupSpec.everything(1, 1), blocks, SIZE, 8, torch.float32))
        self.scheduler = Scheduler(self.cache, ORDERS[order], max_seqs=max_seqs, max_tokens=max_tokens)
        self.budget = max_tokens
        self.numbers = itertools.count()
        self.done: list[Request] = []

    def add(self, length: int, output: int = 1, *, first: int = 0, priority: int = 0) -> Request:
        number = next(self.numbers)
        prompt = [first + i for i in range(length)]
        request = Request(
            id=str(number),
            prompt=prompt,
            sampling=SamplingParams(),
            priority=priority,
            tokens=list(prompt),
            sequence=number,
            token_limit=length + output,
        )
        self.scheduler.add(request, self.cache.open(DOMAINS.domain("", "")))
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan.rows <= self.budget
        assert len({chunk.request for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            assert chunk.request.status is Status.RUNNING
            assert chunk.start == chunk.request.computed
            assert self.cache.missing(chunk.table, chunk.stop) == 0
            samples = chunk.samples
            self.scheduler.completed(chunk)
            if samples:
                chunk.request.tokens.append(7)
                if len(chunk.request.tokens) == chunk.request.token_limit:
                    self.scheduler.finish(chunk.request)
                    self.done.append(chunk.request)
        self.cache.check()
        return plan

    def run(self, limit: int = 2000) -> int:
        for steps in range(limit):
            if not len(self.scheduler):
                return steps
            plan = self.step()
            assert plan.chunks or plan.preempted, "a step did nothing although requests are here"
        raise AssertionError("no progress")


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    engine = Engine()
    short = engine.add(3, output=5, first=100)
    engine.step()
    engine.add(40, first=200)
    plans = [engine.step() for _ in range(3)]
    assert [[(c.request.id, c.start, c.count) for c in plan.chunks] for plan in plans] == [
        [("0", 3, 1), ("1", 0, 15)],
        [("0", 4, 1), ("1", 15, 15)],
        [("0", 5, 1), ("1", 30, 10)],
    ]
    assert short.generated == 4
    engine.run()
    assert engine.cache.pool.in_use == 0


def test_a_prefix_hit_is_not_computed_again() -> None:
    engine = Engine()
    engine.add(12)
    engine.run()
    again = engine.add(12)
    plan = engine.step()
    assert [(c.start, c.count) for c in plan.chunks] == [(8, 4)]
    assert again.cached == 8
    assert (engine.cache.query_tokens, engine.cache.hit_tokens) == (24, 8)


def test_requests_that_come_together_compute_a_shared_beginning_once() -> None:
    engine = Engine(max_tokens=64)
    for _ in range(3):
        engine.add(18)
    plan = engine.step()
    assert [(c.start, c.count) for c in plan.chunks] == [(0, 18), (16, 2), (16, 2)]
    engine.run()


def test_admission_reserves_the_whole_prompt() -> None:
    engine = Engine(blocks=6, max_tokens=4)
    engine.add(16, first=0)
    late = engine.add(16, first=50)
    engine.step()
    assert late.status is Status.WAITING  # 4 + 4 blocks do not fit into 6, though the first step needs only 2
    engine.run()
    assert [request.id for request in engine.done] == ["0", "1"]
    assert engine.scheduler.preemptions == 0


def test_preempted_requests_come_back_and_all_finish() -> None:
    engine = Engine(blocks=6)
    requests = [engine.add(7, output=14, first=10 * i) for i in range(4)]
    engine.run()
    assert engine.scheduler.preemptions > 0
    assert {request.id for request in engine.done} == {"0", "1", "2", "3"}
    assert requests[0].preemptions == 0  # the first in order is never sent back
    assert engine.cache.pool.in_use == 0


def test_what_is_computed_again_counts_neither_as_a_query_nor_as_a_hit() -> None:
    """Eight prompts of 40 tokens that share nothing: nobody was ever served from the cache."""
    engine = Engine(blocks=48, max_seqs=8)
    requests = [engine.add(40, output=24, first=1000 * i) for i in range(8)]
    engine.run()
    assert sum(request.preemptions for request in requests) > 0
    assert (engine.cache.query_tokens, engine.cache.hit_tokens) == (320, 0)


def test_priority_orders_the_queue_and_displaces_the_least_urgent() -> None:
    engine = Engine(order="priority", max_seqs=2)
    low, lower = engine.add(4, output=9, priority=5), engine.add(4, output=9, first=20, priority=6)
    engine.step()
    urgent, mild = engine.add(4, output=3, first=40, priority=0), engine.add(4, output=3, first=60, priority=6)
    engine.step()
    assert (low.status, lower.status) == (Status.RUNNING, Status.WAITING)
    assert (urgent.status, mild.status) == (Status.RUNNING, Status.WAITING)
    engine.run()
    assert engine.done[0] is urgent
    assert engine.done.index(urgent) < engine.done.index(low) < engine.done.index(lower)


def test_first_come_order_ignores_priority() -> None:
    engine = Engine(max_seqs=1)
    for priority in (5, 0):
        engine.add(4, output=2, first=20 * priority, priority=priority)
    engine.run()
    assert [request.id for request in engine.done] == ["0", "1"]


def test_a_waiting_request_can_be_finished() -> None:
    engine = Engine(max_seqs=1)
    engine.add(4, output=3)
    waiting = engine.add(4, first=20)
    engine.step()
    assert engine.scheduler.queued_tokens == 4
    engine.scheduler.finish(waiting)
    assert (engine.scheduler.waiting, engine.scheduler.queued_tokens) == (0, 0)
    engine.run()
    assert [request.id for request in engine.done] == ["0"]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=10),
    st.integers(6, 12),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from(sorted(ORDERS)),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_everything_finishes_under_a_cache_of_a_few_blocks(
    sizes: list[tuple[int, int, int, int]], blocks: int, seqs: int, budget: int, order: str, aborts: list[int]
) -> None:
    engine = Engine(blocks, order=order, max_seqs=seqs, max_tokens=budget)
    requests = [engine.add(n, out, first=10 * shared, priority=prio) for n, out, shared, prio in sizes]
    engine.step()
    for i in aborts:
        if i < len(requests) and requests[i].status is not Status.FINISHED:
            engine.scheduler.finish(requests[i])
            engine.cache.check()
    engine.run()
    assert all(request.status is Status.FINISHED for request in requests)
    assert (engine.cache.pool.in_use, engine.scheduler.queued_tokens, engine.scheduler.waiting) == (0, 0, 0)


def turns(engine: Engine, steps: int) -> list[set[str]]:
    return [{chunk.request.id for chunk in engine.step().chunks} for _ in range(steps)]


def test_decode_rows_that_do_not_fit_a_step_take_turns() -> None:
    engine = Engine(max_tokens=4, max_seqs=12)
    for i in range(12):
        engine.add(1, output=40, first=100 + i)
    while engine.scheduler.waiting:
        engine.step()
    served = turns(engine, 30)
    counts = {str(i): sum(str(i) in step for step in served) for i in range(12)}
    assert min(counts.values()) >= 9 and max(counts.values()) <= 11, counts
    engine.run()


def test_prompts_and_the_queue_have_their_share_of_steps_full_of_decode_rows() -> None:
    """Eight rows a step, and eight requests that decode for long: one that comes later must not wait for their end."""
    engine = Engine(blocks=400, max_tokens=8, max_seqs=16)
    for i in range(8):
        engine.add(2, output=150, first=100 * i)
    while any(request.pending > 1 for request in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    late = [engine.add(30, output=2, first=900 + 50 * i) for i in range(2)]
    for _ in range(60):
        engine.step()
    assert engine.done == late
    engine.run(4000)


def test_one_row_a_step_is_enough_for_all() -> None:
    engine = Engine(blocks=100, max_tokens=1, max_seqs=8)
    for i in range(4):
        engine.add(3, output=30, first=100 * i)
    late = engine.add(3, output=1, first=900)
    for _ in range(60):
        engine.step()
    assert engine.done == [late]
    engine.run()
    assert len(engine.done) == 5


def test_prompts_are_computed_one_after_the_other() -> None:
    """Turns are for those that others keep from running: a prompt behind an earlier prompt waits for its end."""
    engine = Engine(blocks=100, max_tokens=16)
    engine.add(120)
    engine.add(40, first=300)
    plans = [engine.step() for _ in range(7)]
    assert [[(chunk.request.id, chunk.count) for chunk in plan.chunks] for plan in plans] == [[("0", 16)]] * 7
    engine.run()


class Greedy:
    """A `Reuse` that claims impossible work, and brings more rows than it was asked for."""

    def __init__(self, work: float) -> None:
        self.work = work

    def begin(self, request: Request, table: object) -> float:
        return self.work

    def refresh(self, plan: StepPlan, rows: int) -> list[Chunk]:
        positions = np.arange(rows + 1)
        return [Chunk(c.request, c.table, 0, rows + 1, positions, refresh=True) for c in plan.chunks[:1]]


@pytest.mark.parametrize("work", [-1e9, -1.0, 0.0, 3.7, 1e300, math.nan, math.inf])
def test_a_step_never_has_more_rows_than_its_buffers_whatever_reuse_says(work: float) -> None:
    engine = Engine(max_tokens=16)
    engine.scheduler._reuse = engine.scheduler._progress._reuse = Greedy(work)
    for i in range(4):
        engine.add(30, output=3, first=100 * i).approximate = True
    engine.run()  # which looks at every plan's rows
    assert len(engine.done) == 4


def test_a_plan_that_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request begins with blocks that the first computes in that very step; the third one's admission fails."""
    engine = Engine(max_tokens=64)
    requests = [engine.add(18), engine.add(18), engine.add(9, first=500)]
    real = engine.scheduler._progress.chunk

    def chunk(request: Request, budget: int) -> Chunk | None:
        if request is requests[2]:
            raise ZeroDivisionError
        return real(request, budget)

    monkeypatch.setattr(engine.scheduler._progress, "chunk", chunk)
    with pytest.raises(Blamed) as blamed:
        engine.scheduler.schedule()
    assert blamed.value.request is requests[2] and isinstance(blamed.value.__cause__, ZeroDivisionError)
    assert engine.cache.pool.in_use == engine.cache.pool.cached == 0 and len(engine.cache.index) == 0
    assert [request.status for request in requests] == [Status.WAITING] * 3
    engine.scheduler.finish(requests[2])
    engine.cache.check()
    assert [(c.request.id, c.start) for c in engine.step().chunks] == [("0", 0), ("1", 16)]
    engine.run()
