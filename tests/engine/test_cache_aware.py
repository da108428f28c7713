"""The cache-aware order: what comes first, what bounds it, what is held, and how long anybody waits, in simulated time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvloom.engine.cache import BlockTable
from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling import cache_aware
from kvloom.engine.scheduling.cache_aware import Estimate, PrefixEstimator, hit_level
from kvloom.loadtest.simulate_scheduler import Job, Machine, Simulation, hot_and_cold

ONE = Machine(max_seqs=1, max_tokens=4096, step_seconds=0.001, rows_per_second=1e6)
TEXT = list(range(160))


class Told:
    """An estimator that is told what every request costs, and counts its calls."""

    def __init__(self) -> None:
        self.of: dict[str, Estimate] = {}
        self.calls = 0

    def estimate(self, request: Request, table: BlockTable, tokens: Sequence[int]) -> Estimate:
        self.calls += 1
        return self.of.get(request.id, Estimate(100.0, 0.0))


def fresh(count: int, seed: int) -> list[int]:
    return [1000 * (seed + 1) + i for i in range(count)]


def drain(simulation: Simulation) -> list[int]:
    """Numbers of all requests in the order in which they are admitted."""
    while len(simulation.scheduler):
        simulation.step()
    return [int(request.id) for request in simulation.admitted]


def told(*work_and_hit: tuple[float, float], max_wait: float = 1e9) -> tuple[Simulation, Told]:
    """Requests of the given cost, all waiting, served one at a time."""
    estimator = Told()
    estimator.of = {str(i): Estimate(work, hit) for i, (work, hit) in enumerate(work_and_hit)}
    simulation = Simulation("cache_aware", ONE, max_wait=max_wait, estimator=estimator)
    for i in range(len(work_and_hit)):
        simulation.submit(Job(0.0, fresh(20, i)))
    return simulation, estimator


def test_hits_come_first_by_the_real_cache() -> None:
    simulation = Simulation("cache_aware", ONE)
    simulation.run([Job(0.0, TEXT)])
    simulation.submit(Job(0.0, fresh(161, 1)))
    simulation.submit(Job(0.0, [*TEXT, 1]))
    assert drain(simulation) == [0, 2, 1]


def test_whoever_waits_ages_faster_the_less_work_it_is() -> None:
    # 0 is served first in any case. By then 1 has waited for 100 rows: 1 + 100/400 + 1/2 against 1 + 100/50 of request 2.
    simulation, _ = told((100, 0.9), (400, 0.9), (50, 0.3), (50, 0.3))
    assert drain(simulation) == [0, 2, 3, 1]


def test_priority_and_levels() -> None:
    assert [hit_level(hit) for hit in (0, 0.39, 0.4, 0.74, 0.75, 1)] == [0, 0, 0.5, 0.5, 1, 1]
    simulation, _ = told((10, 0.8), (10, 0.9))
    urgent = simulation.submit(Job(0.0, fresh(20, 9), priority=-1))
    assert drain(simulation)[0] == int(urgent.id), "its own priority outweighs a hit"
    simulation, _ = told((10, 0.8), (10, 0.99), (10, 0.5))
    assert drain(simulation) == [0, 1, 2], "0.8 and 0.99 are one level: first come decides"


def test_who_has_waited_too_long_goes_first() -> None:
    simulation, _ = told((900, 0.5), (900, 0.5), (1, 0.9), (1, 0.9), max_wait=1.0)
    assert drain(simulation) == [2, 3, 0, 1], "not yet"
    simulation, _ = told((900, 0.5), (900, 0.5), (1, 0.9), (1, 0.9), max_wait=1.0)
    simulation.now = 1.0
    assert drain(simulation) == [0, 1, 2, 3]


def test_nobody_is_overtaken_by_score_more_than_eight_times() -> None:
    simulation, _ = told((1e6, 0.5), *[(1, 0.9)] * 30)
    order = drain(simulation)
    assert order.index(0) == cache_aware.MAX_OVERTAKES
    simulation, _ = told((1e6, 0.5), (1e6, 0.5), *[(1, 0.9)] * 30)
    assert drain(simulation)[8:10] == [0, 1]


def test_a_fifth_of_the_work_is_reserved_for_cold_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_aware, "MAX_OVERTAKES", 10**9)
    hot, cold = [(10.0, 0.9)] * 400, [(100.0, 0.1)] * 10
    simulation, estimator = told(*hot, *cold)
    order = drain(simulation)
    last_cold = max(order.index(400 + i) for i in range(10))
    works = np.array([estimator.of[str(number)].work for number in order[: last_cold + 1]])
    cold_work, total = np.cumsum(works * (works == 100.0)), np.cumsum(works)
    assert (cold_work >= 0.2 * (total - 10)).all(), "a fifth at any time, but for the request that is being served"
    assert cold_work[-1] <= 0.25 * total[-1], "and not much more: cold ones are not preferred"
    monkeypatch.setattr(cache_aware, "RESERVE", 0.0)
    simulation, _ = told(*hot, *cold)
    assert drain(simulation)[:400] == list(range(400)), "without it, they would all have come last"


def test_a_duplicate_in_the_queue_waits_for_the_one_that_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation("cache_aware", ONE, max_wait=1e9)
    for prompt in (fresh(200, 0), [*fresh(200, 0), 5], fresh(201, 50)):
        simulation.submit(Job(0.0, prompt))
    assert drain(simulation)[0] == 0
    first = Simulation("cache_aware", ONE, max_wait=1e9)
    blocker = first.submit(Job(0.0, fresh(20, 90), output=5))
    first.step()
    assert blocker in first.scheduler.running
    for prompt in (fresh(200, 0), [*fresh(200, 0)[:100], *fresh(100, 7)], fresh(200, 50)):
        first.submit(Job(0.0, prompt))
    lane = first.scheduler._waiting._lanes[""]
    lane.head()
    notes = [lane._notes[request].duplicate for request in lane._requests]  # type: ignore[attr-defined]
    assert notes == [False, True, False]


def chunked() -> tuple[Simulation, Request]:
    """A long prompt that takes ten steps beside another request that decodes; the speed has been measured."""
    simulation = Simulation("cache_aware", Machine(max_tokens=128, rows_per_second=1000, step_seconds=0), max_wait=1e9)
    simulation.run([Job(0.0, fresh(64, 99))])
    producer = simulation.submit(Job(0.0, fresh(1280, 0)))
    simulation.step()
    return simulation, producer


def test_what_is_about_to_be_computed_is_waited_for() -> None:
    simulation, producer = chunked()
    follower = simulation.submit(Job(0.0, [*fresh(1280, 0), 5]))
    simulation.scheduler._max_tokens = 256  # there would be room for it beside the producer
    while producer in simulation.scheduler.running:
        assert follower not in simulation.scheduler.running
        simulation.step()
    simulation.step()
    assert follower.cached == 1280, "all of it was found in the end"


def test_nobody_is_held_for_another_tenant_or_another_text_or_longer_than_a_prefill() -> None:
    for prompt, tenant in ((fresh(1280, 0), "else"), (fresh(1280, 5), ""), ([*fresh(40, 0), *fresh(90, 6)], "")):
        simulation, producer = chunked()
        other = simulation.submit(Job(0.0, prompt, 3, tenant))
        assert simulation.scheduler._waiting.head() is other and producer in simulation.scheduler.running
    simulation, producer = chunked()
    follower = simulation.submit(Job(0.0, [*fresh(1280, 0), 5]))
    assert simulation.scheduler._waiting.head() is None
    simulation.now += 1280 / 1000 + 0.01  # the producer should have been done by now, but something slowed it down
    assert simulation.scheduler._waiting.head() is follower


def test_a_hold_ends_with_its_producer() -> None:
    simulation, producer = chunked()
    follower = simulation.submit(Job(0.0, [*fresh(1280, 0), 5]))
    assert simulation.scheduler._waiting.head() is None
    simulation.scheduler.finish(producer)
    assert simulation.scheduler._waiting.head() is follower


def test_estimates_are_made_once_until_something_can_be_found_and_time_has_passed() -> None:
    simulation, estimator = told(*[(10, 0.9)] * 100)
    assert estimator.calls == 100
    for _ in range(5):
        simulation.scheduler._waiting.head()
    assert estimator.calls == 100
    simulation.now = 1.0
    simulation.scheduler._waiting.head()
    assert estimator.calls == 100, "nothing can be found that could not before"
    simulation.step()  # publishes
    simulation.scheduler._waiting.head()
    assert estimator.calls == 100 + cache_aware.WINDOW
    simulation.step()
    simulation.scheduler._waiting.head()
    assert estimator.calls <= 100 + cache_aware.WINDOW + 2, "too soon; only those that come into the window"


def test_peeking_leaves_no_trace() -> None:
    simulation = Simulation("cache_aware", ONE)
    simulation.run([Job(0.0, TEXT)])
    cache = simulation.cache
    table = cache.open(simulation._domains.domain("", ""))
    stranger = cache.open(simulation._domains.domain("x", ""))
    before = (cache.query_tokens, cache.hit_tokens, list(cache.pool._cached), cache.pool.in_use)
    assert (cache.peek(table, [*TEXT, 1]), cache.peek(table, TEXT), cache.peek(stranger, [*TEXT, 1])) == (160, 144, 0)
    assert PrefixEstimator(cache).estimate(Request(id="", prompt=[], sampling=None), table, TEXT)[:3] == (16, 0.9, 144)  # type: ignore[arg-type]
    assert before == (cache.query_tokens, cache.hit_tokens, list(cache.pool._cached), cache.pool.in_use)
    cache.check()


def test_cold_requests_wait_no_longer_than_the_bound_while_hot_ones_overrun_the_machine() -> None:
    """90% hits; hot requests alone are 1.3 times what the machine can do. One cold prefill takes 50 ms."""
    jobs = hot_and_cold(20, 1.3 * 4000 / 64, 1.6)
    hits = sum(960 for job in jobs if job.label == "hot") / sum(len(job.prompt) for job in jobs)
    assert hits > 0.9
    p99 = {}
    for order in ("cache_aware", "fcfs"):
        simulation = Simulation(order, max_wait=2.0)
        simulation.run(jobs, until=21)
        p99[order] = float(np.percentile(simulation.waits("cold"), 99))
    assert p99["cache_aware"] <= 2.0 + 200 / 4000
    assert p99["fcfs"] > 2.0 + 200 / 4000, "or the load would prove nothing"


def test_cold_requests_wait_no_longer_than_the_bound_when_they_are_most_of_the_work() -> None:
    """One request in ten is cold, of the same length: two thirds of the work. Without hits it were five times too much."""
    jobs = hot_and_cold(20, 21, 2.3, cold=1024, seed=3)
    assert sum(len(job.prompt) for job in jobs) / 20 / 4000 > 5
    waits = {}
    for order in ("cache_aware", "fcfs"):
        simulation = Simulation(order, max_wait=2.0)
        simulation.run(jobs)
        waits[order] = [simulation.waits("hot"), simulation.waits("cold")]
    assert float(np.percentile(waits["cache_aware"][1], 99)) <= 2.0 + 1024 / 4000
    assert np.mean(waits["cache_aware"][0]) < 0.9 * np.mean(waits["fcfs"][0]), "and hot ones, nine in ten, wait less for it"
