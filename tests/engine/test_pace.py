"""Streams beside prompts, in simulated time: how long a step takes, and what another tenant's prompts may cost a stream."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvloom.engine.requests.request import Request, Status
from kvloom.engine.scheduling.pace import BURST_SECONDS, FAVOUR, LEAST_ROWS, PROBE_STEPS, StepCost
from kvloom.loadtest.simulate_scheduler import Job, Machine, Simulation

MACHINE = Machine(rows_per_second=1000, step_seconds=0.02, blocks=8192, max_tokens=512, longest_step=0.1)
FRESH = itertools.count(10_000)


def prompt(length: int) -> list[int]:
    return [next(FRESH) for _ in range(length)]


def served(simulation: Simulation, request: Request, seconds: float, flood: Iterator[Job] | None = None) -> tuple[int, float]:
    """Tokens of a request within a time, and the longest step, while a tenant always has something waiting."""
    begin, tokens, longest = simulation.now, request.generated, 0.0
    while simulation.now - begin < seconds:
        if flood is not None and simulation.scheduler.waiting < 3:
            simulation.submit(next(flood))
        before = simulation.now
        simulation.step()
        longest = max(longest, simulation.now - before)
    return request.generated - tokens, longest


def begun(machine: Machine = MACHINE, weights: dict[str, float] | None = None) -> tuple[Simulation, Request]:
    """A stream of tenant a that decodes, on a machine whose speed has been measured."""
    simulation = Simulation("fcfs", machine, weight=lambda tenant: (weights or {}).get(tenant, 1.0))
    simulation.run([Job(0.0, prompt(200), 1, "warm")])
    stream = simulation.submit(Job(0.0, prompt(20), 10**6, "a"))
    for _ in range(5):
        simulation.step()
    return simulation, stream


def test_without_streams_a_step_is_as_large_as_its_budget() -> None:
    simulation = Simulation("fcfs", MACHINE)
    simulation.submit(Job(0.0, prompt(1500), 1))
    assert [simulation.step().rows for _ in range(3)] == [512, 512, 476]


def test_a_slow_machine_makes_no_step_of_many_seconds() -> None:
    simulation = Simulation("fcfs", replace(MACHINE, rows_per_second=100))
    simulation.submit(Job(0.0, prompt(1500), 1))
    assert simulation.step().rows == 512, "nothing is known yet"
    assert simulation.step().rows == pytest.approx(100, abs=5), "ten times as long as beside streams"


def test_a_prompt_beside_a_stream_of_the_same_tenant_takes_what_a_step_has_time_for() -> None:
    simulation, stream = begun()
    simulation.submit(Job(0.0, prompt(2000), 1, "a"))
    tokens, longest = served(simulation, stream, 2.0)
    assert 0.09 < longest < 0.11
    assert 19 <= tokens <= 24, "a token a step"
    rows = 2000 - sum(request.pending for request in simulation.scheduler.running if request is not stream)
    assert rows > 1500, "and the prompt has nearly all of the rest"


def test_a_prompt_beside_more_streams_than_were_measured_gets_half_of_the_time() -> None:
    simulation, _ = begun(replace(MACHINE, stream_seconds=0.02))
    for _ in range(20):
        simulation.submit(Job(0.0, prompt(20), 10**6, "a"))
    long = simulation.submit(Job(0.0, prompt(60_000), 1, "a"))
    while not long.computed:
        simulation.step()
    for _ in range(2 * PROBE_STEPS):  # some steps to find out that decoding takes longer now
        simulation.step()
    rows, since = long.computed, simulation.now
    for _ in range(PROBE_STEPS):
        simulation.step()
    share = (long.computed - rows) / MACHINE.rows_per_second / (simulation.now - since)
    assert 0.4 < share < 0.55


@pytest.mark.parametrize(
    "length", [pytest.param(14, id="short"), pytest.param(3000, id="long"), pytest.param(1, id="of one token")]
)
def test_a_flood_of_anothers_prompts_slows_a_stream_by_its_share_and_no_more(length: int) -> None:
    simulation, stream = begun()
    alone, _ = served(simulation, stream, 4.0)
    flood = (Job(0.0, prompt(length), 1, "b") for _ in itertools.count())
    served(simulation, stream, 3.0, flood)  # what was saved up is used up
    under, longest = served(simulation, stream, 4.0, flood)
    assert under / alone > 1 / (1 + FAVOUR) - 0.06
    assert longest < 0.13
    assert under < alone, "the flood does get its share"


def test_the_share_goes_by_weight() -> None:
    rows = []
    for weight in (1.0, 3.0):
        simulation, stream = begun(weights={"b": weight})
        flood = (Job(0.0, prompt(300), 1, "b") for _ in itertools.count())
        served(simulation, stream, 2.0, flood)
        tokens, _ = served(simulation, stream, 5.0, flood)
        rows.append(5.0 - tokens * MACHINE.step_seconds)  # what prompts took of the time
    shares = [seconds / 5.0 for seconds in rows]
    assert shares[0] == pytest.approx(FAVOUR / (1 + FAVOUR), abs=0.04)
    assert shares[1] == pytest.approx(3 * FAVOUR / (1 + 3 * FAVOUR), abs=0.04)


def test_the_smallest_weight_goes_on() -> None:
    simulation, _ = begun(weights={"a": 100.0, "b": 0.01})
    little = simulation.submit(Job(0.0, prompt(2000), 1, "b"))
    asked = simulation.now
    while little.computed < len(little.prompt):
        simulation.step()
    assert simulation.now - asked < 1.2 * 8 / FAVOUR * len(little.prompt) / MACHINE.rows_per_second


def test_a_prompt_in_large_pieces_has_its_turns_beside_another_tenants() -> None:
    simulation, _ = begun()
    simulation.submit(Job(0.0, prompt(60_000), 1, "a"))
    pieces = simulation.submit(Job(0.0, prompt(2048), 1, "c"))
    pieces.selector = SimpleNamespace(grid=512, tail=0, dense_until=0, prompts="sparse", budget=0, records=())  # type: ignore[assignment]
    since = simulation.now
    while pieces.computed < 2048 and simulation.now - since < 60:
        simulation.step()
    assert simulation.now - since < 1.3 * 2.048 / FAVOUR


def test_two_floods_share_what_floods_get() -> None:
    simulation, _ = begun()
    rows: Counter[str] = Counter()
    while simulation.now < 12.0:
        for tenant, length in (("b", 900), ("c", 40)):
            if sum(request.tenant == tenant for request in simulation.labels if request.status is Status.WAITING) < 2:
                simulation.submit(Job(0.0, prompt(length), 1, tenant))
        for chunk in simulation.step().chunks:
            rows[chunk.request.tenant] += chunk.count
    assert 0.7 < rows["b"] / rows["c"] < 1.4


def test_who_asks_for_little_does_not_wait() -> None:
    simulation, _ = begun()
    little = simulation.submit(Job(0.0, prompt(int(0.8 * BURST_SECONDS * MACHINE.rows_per_second)), 1, "b"))
    asked = simulation.now
    while little.computed < len(little.prompt):
        simulation.step()
    alone = len(little.prompt) / MACHINE.rows_per_second
    assert simulation.now - asked < 1.5 * alone + 0.1


def test_somebody_who_comes_back_for_the_next_answer_finds_no_long_step() -> None:
    simulation, stream = begun()
    simulation.scheduler.finish(stream)
    simulation.submit(Job(0.0, prompt(3000), 1, "b"))
    assert LEAST_ROWS <= simulation.step().rows <= 100
    simulation.now += 2.0  # nobody has come
    assert simulation.step().rows == 512


def test_a_stall_of_the_machine_is_not_taken_for_its_speed() -> None:
    simulation, stream = begun()
    flood = (Job(0.0, prompt(3000), 1, "a") for _ in itertools.count())
    served(simulation, stream, 2.0, flood)
    usual = simulation.step().rows
    plan = simulation.scheduler.schedule()
    simulation.now += 20.0  # something else had the cores
    for chunk in plan.chunks:
        samples = chunk.samples
        simulation.scheduler.completed(chunk)
        if samples:
            chunk.request.tokens.append(1)
    simulation.scheduler.stepped()
    assert simulation.step().rows > usual / 2


def test_what_a_row_costs_is_told_from_what_it_sees() -> None:
    cost = StepCost()
    cost.plain(0.01, 1)
    for rows, start in ((200, 0), (50, 3000), (100, 1000), (30, 6000)):
        pairs = rows * (start + rows / 2)
        cost.prompts(rows, pairs, 0.01 + 1e-3 * rows + 5e-7 * pairs, beside=True)
    assert cost.per_row == pytest.approx(1e-3, rel=0.01) and cost.per_pair == pytest.approx(5e-7, rel=0.01)
    for start in (0, 4000):
        rows = cost.rows(0.1, start)
        assert cost.seconds(rows, start) == pytest.approx(0.1)
    assert cost.rows(0.1, 4000) < 0.4 * cost.rows(0.1, 0)


def test_a_few_rows_that_are_only_looked_at_hardly_change_how_fast_prompts_are() -> None:
    cost = StepCost()
    for _ in range(30):
        cost.prompts(500, 500 * 250, 0.25, beside=False)
        cost.prompts(0.4, 0.4 * 800, 0.005, beside=False)
    assert cost.rows_per_second > 1800
