"""Tenants share by weight: the counters alone, and under the real scheduler in simulated time."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.scheduling import ORDERS
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.loadtest.simulate_scheduler import BLOCK, Job, Machine, Simulation

SMALL = Machine(max_tokens=64, max_seqs=8, blocks=2048)


def request(tenant: str, tokens: int = 10) -> Request:
    return Request(id="x", prompt=[0] * tokens, sampling=SamplingParams(), tenant=tenant, tokens=[0] * tokens)


def two_tenants(quantum: float = 100.0, **weights: float) -> tuple[Fairness, Request, Request]:
    fairness = Fairness(quantum, lambda tenant: weights.get(tenant, 1.0))
    a, b = request("a"), request("b")
    fairness.arrived(a)
    fairness.arrived(b)
    return fairness, a, b


def test_credit_is_granted_by_weight_when_nobody_has_any() -> None:
    fairness, a, _ = two_tenants(a=2.0)
    assert fairness.entitled(["a", "b"]) == ["a", "b"]
    assert (fairness.credit("a"), fairness.credit("b")) == (200.0, 100.0)
    fairness.admitted(a, 250)
    assert fairness.entitled(["a", "b"]) == ["b"], "b still has credit, so nobody gets more"
    assert fairness.credit("a") == -50.0


def test_a_large_request_takes_as_many_rounds_as_it_is_worth() -> None:
    fairness, a, b = two_tenants()
    fairness.entitled(["a", "b"])
    fairness.admitted(a, 1050)  # -950
    fairness.admitted(b, 450)  # -350
    assert fairness.entitled(["a", "b"]) == ["b"]
    assert (fairness.credit("a"), fairness.credit("b")) == (-550.0, 50.0)


def test_what_was_charged_and_not_computed_comes_back_once() -> None:
    fairness, a, _ = two_tenants(quantum=1000)
    fairness.entitled(["a"])
    fairness.admitted(a, 10)
    fairness.computed(a, 0, 4)
    assert fairness.credit("a") == 990.0
    fairness.stopped(a)  # preempted: six rows were not computed
    assert fairness.credit("a") == 996.0
    fairness.stopped(a)
    assert fairness.credit("a") == 996.0
    fairness.admitted(a, 10)
    fairness.computed(a, 0, 3)  # the rest came from elsewhere
    fairness.computed(a, 10, 1)  # a decode row
    assert fairness.credit("a") == 996.0 - 3 - 2
    fairness.computed(a, 11, 1)
    fairness.computed(a, 2, 5)  # prompt rows that nobody had foreseen
    assert fairness.credit("a") == 991.0 - 2 - 5


def test_idle_tenants_save_nothing_up_and_a_debt_is_paid_by_the_rounds_of_others() -> None:
    fairness, a, b = two_tenants()
    fairness.entitled(["a", "b"])
    fairness.left(a, contended=True)
    assert fairness.credit("a") == 0.0
    fairness.admitted(b, 350)
    fairness.stopped(b)
    other = request("c")
    fairness.arrived(other)
    fairness.admitted(other, 150)
    fairness.computed(other, 0, 150)
    fairness.stopped(other)
    fairness.left(other, contended=True)  # c leaves with a debt of at least 150
    debt = fairness.credit("c")
    assert debt <= -150.0
    for _ in range(4):
        fairness.admitted(b, fairness.credit("b") + 1)
        fairness.entitled(["b"])
    assert debt < fairness.credit("c") <= 0.0


def test_a_newcomer_starts_with_those_who_are_here_and_debts_end_with_the_queue() -> None:
    fairness = Fairness(100, lambda tenant: 1.0)
    a, b = request("a"), request("b")
    fairness.arrived(a)
    fairness.admitted(a, 40)
    fairness.computed(a, 0, 40)
    fairness.arrived(b)
    assert fairness.credit("b") == -40.0, "nobody is made to wait for what was used while nobody else was here"
    fairness.stopped(a)
    fairness.left(a, contended=True)
    assert fairness.credit("a") == -40.0
    fairness.calm()
    assert fairness.credit("a") == 0.0 and fairness.credit("b") == -40.0


def load(tenant: str, count: int, rng: random.Random, *, output: int = 4) -> list[Job]:
    return [Job(0.0, [rng.randrange(2**30) for _ in range(rng.randint(20, 120))], output, tenant) for _ in range(count)]


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("weights", [{"busy": 1.0, "quiet": 1.0}, {"busy": 2.0, "quiet": 1.0}, {"busy": 1.0, "quiet": 2.0}])
def test_ten_times_the_load_gets_no_more_than_its_share(order: str, weights: dict[str, float]) -> None:
    rng = random.Random(1)
    simulation = Simulation(order, SMALL, weight=weights.__getitem__, max_wait=0.5)
    simulation.run([*load("busy", 600, rng), *load("quiet", 60, rng)])
    total, share = sum(simulation.contended.values()), weights["busy"] / sum(weights.values())
    assert total > 20 * 4 * SMALL.max_tokens, "long enough to say something"
    for tenant, due in (("busy", share), ("quiet", 1 - share)):
        assert simulation.contended[tenant] / total <= 1.2 * due
    assert len(simulation.admitted) == 660


def test_a_tenant_with_long_answers_pays_for_them() -> None:
    rng = random.Random(2)
    simulation = Simulation("fcfs", SMALL)
    simulation.run([*load("talks", 80, rng, output=60), *load("asks", 80, rng, output=1)])
    total = sum(simulation.contended.values())
    assert simulation.contended["talks"] / total <= 0.6


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_one_tenant_alone_is_served_in_the_order_itself(order: str) -> None:
    rng = random.Random(3)
    jobs = [job._replace(priority=i % 3) for i, job in enumerate(load("only", 60, rng))]
    simulation = Simulation(order, SMALL, max_wait=0.0)
    simulation.run(jobs)
    numbers = [int(request.id) for request in simulation.admitted]
    assert numbers == sorted(numbers, key=lambda i: (i % 3 if order == "priority" else 0, i))


def test_a_priority_takes_nothing_from_other_tenants() -> None:
    rng = random.Random(4)
    pushy = [job._replace(priority=-9) for job in load("pushy", 100, rng)]
    simulation = Simulation("priority", SMALL)
    requests = [simulation.submit(job) for job in [*load("modest", 100, rng), *pushy]]
    running = requests[:0]
    while len(simulation.scheduler):
        plan = simulation.step()
        running += [request for request in plan.preempted if request.tenant == "modest"]
    assert not running, "displaced by another tenant's priority"
    assert simulation.contended["pushy"] / sum(simulation.contended.values()) <= 0.6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 90), st.integers(1, 9), st.integers(-3, 3), st.integers(0, 20)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(sorted(ORDERS)),
    st.integers(1, 4),
    st.integers(8, 20),
    st.sets(st.integers(0, 39), max_size=5),
    st.sampled_from((math.inf, 0.03, 0.001)),
)
def test_every_request_is_admitted_in_the_end_whatever_comes(
    jobs: list[tuple[str, int, int, int, int]], order: str, seqs: int, blocks: int, aborts: set[int], longest: float
) -> None:
    machine = Machine(max_tokens=24, max_seqs=seqs, blocks=blocks, rows_per_second=1000, longest_step=longest)
    simulation = Simulation(order, machine, weight={"a": 1.0, "b": 3.0, "c": 0.1}.__getitem__, max_wait=0.1)
    made: list[Request] = []
    queue = sorted((when * 0.01, i, job) for i, (*job, when) in enumerate(jobs))
    for steps in range(4000):
        while queue and (queue[0][0] <= simulation.now or not len(simulation.scheduler)):
            _, i, (tenant, length, output, priority) = queue.pop(0)
            shared = [*range(length // 2), *range(1000 * i, 1000 * i + length - length // 2)]
            made.append(simulation.submit(Job(0.0, shared, output, tenant, priority)))
        if not len(simulation.scheduler):
            break
        if steps in aborts and simulation.scheduler.waiting:
            victim = next(r for r in made if r.status.value == "waiting")
            simulation.scheduler.finish(victim)
        simulation.step()
        simulation.cache.check()
    assert not queue and not len(simulation.scheduler), "somebody starves"
    assert (simulation.scheduler.waiting, simulation.scheduler.queued_tokens) == (0, 0)
    assert not simulation.scheduler._fairness._credit and not simulation.scheduler._fairness._bills, "tenants are remembered"


def order_of(tenant: str, *, warm_other: bool) -> list[str]:
    """The order in which `tenant`'s requests are admitted, beside another one whose prompts are cached or not."""
    rng = random.Random(5)
    texts = {name: [[rng.randrange(2**30) for _ in range(160)] for _ in range(3)] for name in ("mine", "theirs")}
    simulation = Simulation("cache_aware", SMALL, max_wait=1e9)
    warm = [*texts["mine"], *(texts["theirs"] if warm_other else [])]
    for text in warm:
        owner = "mine" if text in texts["mine"] else "theirs"
        simulation.submit(Job(0.0, [*text, 1], 1, owner))
        while len(simulation.scheduler):
            simulation.step()
    simulation.now = 100.0
    made = {}
    for i in range(60):
        owner = ("mine", "theirs")[i % 2]
        begin = rng.choice(texts[owner]) if rng.random() < 0.7 else [rng.randrange(2**30) for _ in range(rng.randint(1, 160))]
        prompt = [*begin, *(rng.randrange(2**30) for _ in range(rng.randint(1, 40)))]
        made[simulation.submit(Job(0.0, prompt, 2, owner, priority=rng.randint(-1, 1)))] = str(i)
    while len(simulation.scheduler):
        simulation.step()
    return [made[request] for request in simulation.admitted if request in made and request.tenant == tenant]


def test_the_order_within_a_tenant_does_not_tell_what_others_have_cached() -> None:
    warm, cold = order_of("mine", warm_other=True), order_of("mine", warm_other=False)
    assert warm == cold and len(warm) == 30
    assert warm != sorted(warm, key=int), "or first come would have passed as well"
    assert order_of("theirs", warm_other=True) != order_of("theirs", warm_other=False), "their own cache does count"


def test_the_counters_forget_who_is_gone() -> None:
    rng = random.Random(6)
    simulation = Simulation("fcfs", SMALL)
    simulation.run([job for i in range(40) for job in load(f"t{i}", 2, rng)])
    fairness = simulation.scheduler._fairness
    assert not fairness._credit and fairness._here == Counter()


# Slots, blocks and rows -------------------------------------------------------------------------------------------------------


def steps_until(simulation: Simulation, request: Request, most: int = 400) -> int:
    """Steps until it has its first token."""
    for step in range(most):
        if len(request.tokens) > len(request.prompt):
            return step
        simulation.step()
    raise AssertionError("it is kept waiting")


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(2**30) for _ in range(length)]


@pytest.mark.parametrize("weight", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("waiting", [0, 5])
def test_long_answers_keep_nobody_elses_request_waiting(weight: float, waiting: int) -> None:
    rng = random.Random(7)
    simulation = Simulation("fcfs", SMALL, weight={"long": 1.0, "short": weight}.__getitem__)
    long = [simulation.submit(Job(0.0, prompt(rng, 10), 500, "long")) for _ in range(8 + waiting)]
    for _ in range(10):
        simulation.step()
    assert len(simulation.scheduler.running) == 8
    short = simulation.submit(Job(0.0, prompt(rng, 10), 1, "short"))
    assert steps_until(simulation, short) <= 3
    assert simulation.scheduler.preemptions == 1 and sum(r.preemptions for r in long) == 1
    assert long[0].preemptions == 0, "the first in order stays"
    again = [r for r in long if r.preemptions]
    assert again == [long[7]], "the newest one goes"
    while len(simulation.scheduler):
        simulation.step()
    assert all(len(r.tokens) == r.token_limit for r in long)


def test_a_long_prompt_keeps_nobody_elses_request_waiting() -> None:
    rng = random.Random(8)
    simulation = Simulation("fcfs", SMALL)
    simulation.submit(Job(0.0, prompt(rng, 20_000), 1, "long"))
    simulation.submit(Job(0.0, prompt(rng, 5_000), 1, "long"))
    simulation.step()
    short = simulation.submit(Job(0.0, prompt(rng, 100), 1, "short"))
    assert steps_until(simulation, short) <= 6, "its share is 32 rows per step"


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}])
def test_slots_are_held_by_weight(weights: dict[str, float]) -> None:
    rng = random.Random(9)
    simulation = Simulation("fcfs", SMALL, weight=weights.__getitem__)
    for tenant in ("a", "b"):
        for _ in range(20):
            simulation.submit(Job(0.0, prompt(rng, 10), 2000, tenant))
        simulation.step()
    for _ in range(60):
        simulation.step()
    held = Counter(r.tenant for r in simulation.scheduler.running)
    assert held["b"] == 8 * weights["b"] / sum(weights.values())
    before = simulation.scheduler.preemptions
    for _ in range(500):
        simulation.step()
    assert simulation.scheduler.preemptions == before, "nothing goes back and forth"


def test_blocks_are_held_by_weight() -> None:
    rng = random.Random(10)
    machine = Machine(max_tokens=4096, max_seqs=64, blocks=400)
    simulation = Simulation("fcfs", machine)
    hers = [simulation.submit(Job(0.0, prompt(rng, 40 * BLOCK - 100), 200, "a")) for _ in range(12)]
    for _ in range(5):
        simulation.step()
    assert len(simulation.scheduler.running) >= 8
    his = [simulation.submit(Job(0.0, prompt(rng, 40 * BLOCK - 100), 200, "b")) for _ in range(12)]
    assert steps_until(simulation, his[0]) <= 4
    for _ in range(40):
        simulation.step()
    held = Counter(dict.fromkeys("ab", 0))
    for request in simulation.scheduler.running:
        held[request.tenant] += len(simulation.scheduler.table(request).blocks)
    assert abs(held["a"] - held["b"]) <= 80
    while len(simulation.scheduler):
        simulation.step()
        simulation.cache.check()
    assert all(len(r.tokens) == r.token_limit for r in (*hers, *his))


def test_a_large_request_is_not_passed_for_good() -> None:
    """It needs nearly all memory; small ones of others begin before it, but not for ever."""
    rng = random.Random(11)
    machine = Machine(max_tokens=512, max_seqs=8, blocks=64)
    simulation = Simulation("fcfs", machine)
    simulation.submit(Job(0.0, prompt(rng, 20 * BLOCK), 4, "other"))
    simulation.step()
    large = simulation.submit(Job(0.0, prompt(rng, 60 * BLOCK), 1, "large"))
    numbers = iter(range(10_000))
    for _ in range(3_000):
        if len(large.tokens) > len(large.prompt):
            break
        if simulation.scheduler.waiting < 3:
            simulation.submit(Job(0.0, prompt(rng, 3 * BLOCK), 3, f"small{next(numbers)}"))
        simulation.step()
    assert len(large.tokens) > len(large.prompt)


def test_a_large_request_stops_nobody_while_its_own_tenant_is_served() -> None:
    rng = random.Random(12)
    simulation = Simulation("fcfs", Machine(max_tokens=512, max_seqs=8, blocks=128))
    long = [simulation.submit(Job(0.0, prompt(rng, BLOCK), 900, "a")) for _ in range(2)]
    for _ in range(200):
        simulation.step()
    large = simulation.submit(Job(0.0, prompt(rng, 120 * BLOCK), 1, "a"))
    for number in range(90):
        short = simulation.submit(Job(0.0, prompt(rng, BLOCK), 1, f"t{number}"))
        assert steps_until(simulation, short) <= 6
    assert large.passed > 64 and not large.computed
    while len(simulation.scheduler):
        simulation.step()
    assert all(len(r.tokens) == r.token_limit for r in (*long, large))


@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.integers(0, 10**6), st.sampled_from(sorted(ORDERS)), st.integers(2, 5), st.integers(1, 8), st.integers(24, 90))
def test_everybody_finishes_with_few_preemptions(seed: int, order: str, tenants: int, seqs: int, blocks: int) -> None:
    rng = random.Random(seed)
    weights = {f"t{i}": rng.choice([0.01, 0.5, 1.0, 2.0, 100.0]) for i in range(tenants)}
    simulation = Simulation(order, Machine(max_tokens=32, max_seqs=seqs, blocks=blocks), weight=weights.__getitem__)
    coming = sorted((rng.randrange(120), rng.randrange(tenants)) for _ in range(40))
    made: list[Request] = []
    for step in range(6000):
        while coming and coming[0][0] <= step:
            job = Job(0.0, prompt(rng, rng.randint(1, 8 * BLOCK)), rng.choice([1, 1, 5, 60]), f"t{coming.pop(0)[1]}")
            made.append(simulation.submit(job))
        if not coming and not len(simulation.scheduler):
            break
        plan = simulation.step()
        simulation.cache.check()
        assert plan.rows <= 32 and len({chunk.request for chunk in plan.chunks}) == len(plan.chunks)
        assert not {chunk.request for chunk in plan.chunks} & set(plan.preempted), "what was given up is still computed"
    assert all(len(r.tokens) == r.token_limit for r in made) and len(made) == 40
    assert simulation.scheduler.preemptions <= 4 * len(made)
    assert not simulation.scheduler._room._served
