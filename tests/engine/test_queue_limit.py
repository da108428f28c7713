"""What waits is bounded, in all and per tenant, and the count is exact whatever happens to a request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable

import pytest

from kvloom.engine import LLM, SamplingParams, ThreadEngineClient
from kvloom.engine.errors import ContextLengthError, OverloadedError
from kvloom.engine.requests.request import RequestOutput, Usage
from kvloom.engine.startup.build import Built
from kvloom.engine.thread.backlog import MAX_OUTPUTS, Backlog
from kvloom.engine.thread.questions import STEPS_SHARE, WAITING, WAITING_OF_TENANT, Question, Questions
from kvloom.engine.thread.queue_limit import QUEUED_CAPACITIES, QUEUED_REQUESTS, Place, QueueLimit


def fill(limit: QueueLimit, tenant: str, tokens: int) -> int:
    """Requests of so many tokens that get in."""
    for count in range(100_000):
        try:
            limit.enter(tenant, tokens)
        except OverloadedError:
            return count
    raise AssertionError("no bound")


def test_no_tenant_fills_the_queue() -> None:
    limit = QueueLimit(1000)
    assert [fill(limit, name, 10) for name in "abc"] == [50, 25, 13], "each leaves as much as it takes"
    assert limit.tokens == 880 and fill(limit, "", 10) == 12, "who has no tenant may take what is left"


def test_weights_share_the_queue() -> None:
    limit = QueueLimit(1000, {"heavy": 4.0, "light": 0.25}.__getitem__)
    assert fill(limit, "heavy", 10) == 80 and fill(limit, "light", 10) == 4


def test_what_is_larger_than_the_queue_goes_alone() -> None:
    limit = QueueLimit(100)
    place = limit.enter("a", 5000)
    with pytest.raises(OverloadedError, match="5000 prompt tokens are waiting"):
        limit.enter("b", 1)
    place.leave()
    limit.enter("b", 60)
    limit.enter("c", 40)  # nothing of its own waits: what fits gets in


def test_requests_are_counted_too() -> None:
    limit = QueueLimit(10**9)
    assert fill(limit, "a", 1) == QUEUED_REQUESTS // 2


def test_the_count_comes_back_to_nothing() -> None:
    limit, source = QueueLimit(2000), random.Random(0)
    places: list[Place] = []
    for _ in range(5000):
        if places and source.random() < 0.5:
            place = places.pop(source.randrange(len(places)))
            place.leave()
            place.leave()  # changes nothing
            continue
        with contextlib.suppress(OverloadedError):
            places.append(limit.enter(source.choice(["", "a", "b"]), source.randrange(100)))
        assert limit.requests == len(places) and limit.tokens <= 2000
    for place in places:
        place.leave()
    assert (limit.tokens, limit.requests) == (0, 0) and not limit._tokens and not limit._requests


def test_the_engine_counts_exactly(make_llm: Callable[..., LLM]) -> None:
    """Finished, aborted while waiting, aborted while running, refused: nothing stays counted."""
    llm = make_llm(max_num_seqs=2)
    client = ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer))
    assert client._queue_limit.most_tokens == QUEUED_CAPACITIES * llm.core.cache.capacity_tokens

    async def one(i: int) -> None:
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        stream = client.generate([5 + i] * (600 if i % 7 == 6 else 60), sampling, request_id=str(i), tenant="ab"[i % 2])
        try:
            async for _ in stream:
                if i % 3 == 0:
                    break
        except ContextLengthError:
            assert i % 7 == 6
        await stream.aclose()  # type: ignore[attr-defined]

    async def scenario() -> None:
        tasks = [asyncio.ensure_future(one(i)) for i in range(24)]
        await asyncio.sleep(0)
        assert client._queue_limit.requests == 24
        for task in tasks[20:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    assert (client._queue_limit.tokens, client._queue_limit.requests) == (0, 0)
    client.close()


def test_questions_leave_steps_their_time() -> None:
    now, answered = [0.0], list[str]()
    questions = Questions(clock=lambda: now[0])

    def asked(name: str) -> Question:
        def answer() -> None:
            answered.append(name)
            now[0] += 1.0

        return Question(name[0], answer)

    for name in ("a1", "a2", "a3", "b1"):
        questions.put(asked(name))
    assert questions.answer_one(busy=True) == ("a", 1.0)
    assert questions.answer_one(busy=True) is None, "steps first"
    now[0] += STEPS_SHARE
    assert questions.answer_one(busy=True) == ("b", 1.0), "in turns"
    assert questions.answer_one(busy=False) == ("a", 1.0), "nobody else wants the time"
    assert questions.answer_one(busy=False) and questions.answer_one(busy=False) is None
    assert answered == ["a1", "b1", "a2", "a3"]


def test_questions_that_wait_are_bounded() -> None:
    questions = Questions()
    for tenant in range(WAITING // WAITING_OF_TENANT):
        for _ in range(WAITING_OF_TENANT):
            questions.put(Question(str(tenant), lambda: None))
        with pytest.raises(OverloadedError):
            questions.put(Question(str(tenant), lambda: None))
    with pytest.raises(OverloadedError, match="in all"):
        questions.put(Question("another", lambda: None))
    while questions.answer_one(busy=False):
        pass
    assert len(questions) == 0 and not questions._waiting


def test_a_flood_of_questions_gets_one_per_step_at_most(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    client = ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer))
    events: list[str] = []
    step, explain, charge = llm.core.step, llm.core.explain, llm.core.charge
    charged: list[str] = []
    monkeypatch.setattr(llm.core, "step", lambda: (events.append("step"), step())[1])
    monkeypatch.setattr(llm.core, "explain", lambda *a: (events.append("explain"), explain(*a))[1])
    monkeypatch.setattr(llm.core, "charge", lambda tenant, seconds: (charged.append(tenant), charge(tenant, seconds))[1])

    async def scenario() -> int:
        refused = 0

        async def ask() -> None:
            nonlocal refused
            while not done.is_set():
                try:
                    await client.explain([5] * 50, tenant="flood")
                except OverloadedError:
                    refused += 1
                    await asyncio.sleep(0.001)

        done = asyncio.Event()
        floods = [asyncio.ensure_future(ask()) for _ in range(16)]
        sampling = SamplingParams(max_tokens=60, ignore_eos=True)
        async for _ in client.generate([5] * 50, sampling, request_id="a", tenant="quiet"):
            pass
        done.set()
        await asyncio.gather(*floods)
        return refused

    assert asyncio.run(scenario()) > 0
    busy = events[events.index("step") : len(events) - events[::-1].index("step")]
    assert all(pair != ("explain", "explain") for pair in itertools.pairwise(busy)), "never two between the same steps"
    assert set(charged) == {"flood"}
    client.close()


def test_what_is_not_read_is_bounded() -> None:
    async def scenario() -> None:
        ended: list[int] = []
        backlog = Backlog(lambda: ended.append(1))
        output = RequestOutput(id="a", usage=Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0))
        for _ in range(3 * MAX_OUTPUTS):
            backlog.put_nowait(output)
        assert ended == [1]
        assert isinstance(await backlog.get(), OverloadedError) and backlog._queue.empty()

    asyncio.run(scenario())


def test_work_beside_requests_is_charged() -> None:
    from kvloom.engine.requests.request import Request
    from kvloom.engine.scheduling.fairness import Fairness

    fairness = Fairness(100.0, lambda tenant: 1.0)
    fairness.charge("a", 50.0, contended=False)
    assert fairness.credit("a") == 0, "nobody was kept waiting"
    fairness.arrived(Request(id="b", prompt=(1,), sampling=SamplingParams(), tenant="b"))
    fairness.charge("a", 50.0, contended=True)
    assert fairness.credit("a") == -50.0
    fairness.arrived(Request(id="a", prompt=(1,), sampling=SamplingParams(), tenant="a"))
    assert fairness.credit("a") == -50.0
