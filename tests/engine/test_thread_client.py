"""The engine behind its client: concurrency, disconnects, refusals and death."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvloom.engine import LLM, SamplingParams, ThreadEngineClient
from kvloom.engine.client import Health, TenantStats
from kvloom.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    InternalError,
    InvalidRequestError,
    ModelError,
    OverloadedError,
)
from kvloom.engine.requests.isolation import INTERNAL
from kvloom.engine.requests.request import KVOptions, Request, RequestOutput
from kvloom.engine.startup.build import Built
from kvloom.engine.thread.client import DIED, STALL_SECONDS

MakeLLM = Callable[..., LLM]
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def client_of(llm: LLM, **options: Any) -> ThreadEngineClient:
    return ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer), **options)


async def collect(outputs: AsyncIterator[RequestOutput], limit: int | None = None) -> list[RequestOutput]:
    """Outputs of a request; with a limit, walk away after so many."""
    got = []
    async for output in outputs:
        got.append(output)
        if limit is not None and len(got) >= limit:
            break
    await outputs.aclose()  # type: ignore[attr-defined]
    return got


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


async def idle(client: ThreadEngineClient) -> None:
    for _ in range(500):
        stats = await client.stats()
        if stats.running == stats.waiting == 0 and stats.groups[0].in_use == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"blocks did not come back: {(await client.stats())}")


def test_survivors_of_a_storm_of_disconnects_say_what_they_say_alone(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=16, kv_memory="1MiB", max_model_len=200, max_batched_tokens=64)
    source = random.Random(0)
    system = [source.randrange(3, 300) for _ in range(40)]
    prompts = [
        system[: source.randint(0, 40)] + [source.randrange(3, 300) for _ in range(source.randint(1, 60))] for _ in range(64)
    ]
    limits = [source.choice([None, None, 1, 5, 20]) for _ in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = [llm.generate(prompt, sampling)[0].tokens for prompt in prompts]
    client = client_of(llm)

    async def storm() -> list[list[RequestOutput]]:
        streams = [client.generate(prompt, sampling, request_id=str(i)) for i, prompt in enumerate(prompts)]
        results = await asyncio.gather(*(collect(stream, limit) for stream, limit in zip(streams, limits)))
        await idle(client)
        return results

    for outputs, limit, expected in zip(asyncio.run(storm()), limits, alone):
        assert tokens_of(outputs) == expected[:limit]
        assert (outputs[-1].finish_reason == "length") == (limit is None)
    client.close()


def test_leaving_frees_the_blocks_and_keeps_the_full_ones_findable(make_llm: MakeLLM) -> None:
    client = client_of(make_llm())

    async def leave_and_return() -> int:
        await collect(client.generate([5] * 50, LONG, request_id="a"), limit=3)
        await idle(client)
        again = await collect(client.generate([5] * 50, SamplingParams(max_tokens=1), request_id="b"))
        return again[-1].usage.cached_tokens

    assert asyncio.run(leave_and_return()) == 48
    client.close()


def test_refusals_come_before_the_first_output_and_disturb_nobody(make_llm: MakeLLM) -> None:
    client = client_of(make_llm(max_model_len=100), max_queued_tokens=150)

    async def scenario() -> None:
        fine = asyncio.ensure_future(
            collect(client.generate([5] * 50, SamplingParams(max_tokens=50, ignore_eos=True), request_id="a"))
        )
        await asyncio.sleep(0)
        with pytest.raises(ContextLengthError):
            await collect(client.generate([5] * 100, LONG, request_id="b"))
        with pytest.raises(InvalidRequestError, match="already in use"):
            await collect(client.generate([5] * 10, SamplingParams(max_tokens=1), request_id="a"))
        assert len(tokens_of(await fine)) == 50

    asyncio.run(scenario())
    client.close()


def test_a_full_queue_refuses(make_llm: MakeLLM) -> None:
    client = client_of(make_llm(), max_queued_tokens=150)

    async def scenario() -> None:
        running = [
            asyncio.ensure_future(collect(client.generate([5] * 100, SamplingParams(max_tokens=2), request_id=str(i))))
            for i in range(1)
        ]
        await asyncio.sleep(0)  # let it reach the inbox: 100 tokens wait
        with pytest.raises(OverloadedError, match="150"):
            await collect(client.generate([5] * 100, LONG, request_id="late"))
        await asyncio.gather(*running)
        assert tokens_of(await collect(client.generate([5] * 200, SamplingParams(max_tokens=1), request_id="big")))

    asyncio.run(scenario())
    client.close()


def test_the_death_of_the_engine_reaches_everyone(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    client = client_of(llm)
    real, steps = llm.core.step, iter(range(5))

    def step() -> list[RequestOutput]:
        if next(steps, None) is None:
            raise RuntimeError("the disk is on fire")
        return real()

    monkeypatch.setattr(llm.core, "step", step)

    async def scenario() -> None:
        streams = [collect(client.generate([5] * 9, LONG, request_id=str(i))) for i in range(3)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) and str(result) == DIED for result in results)
        with pytest.raises(EngineDeadError):
            await collect(client.generate([5], LONG, request_id="late"))

    assert asyncio.run(client.health()).ok
    asyncio.run(scenario())
    health = asyncio.run(client.health())
    assert not health.ok and health.reason == DIED, "what failed is for the log alone"
    client.close()
    for name in "012":  # so that the fixture may prove that nothing else was lost
        llm.core.abort(name)


def test_the_model_is_built_on_the_thread_that_runs_it(make_llm: MakeLLM) -> None:
    llm, threads = make_llm(), []

    def make() -> Built:
        threads.append(threading.current_thread().name)
        return Built(llm.core, llm.model, llm.tokenizer)

    client = ThreadEngineClient(make)
    assert threads == ["kvloom-engine"]
    client.close()

    def fail() -> Built:
        raise ModelError("the weights are gone")

    with pytest.raises(ModelError, match="gone"):
        ThreadEngineClient(fail)


def test_close_aborts_what_runs_and_is_idempotent(make_llm: MakeLLM) -> None:
    client = client_of(make_llm())

    async def scenario() -> list[RequestOutput]:
        stream = asyncio.ensure_future(collect(client.generate([5] * 9, LONG, request_id="a")))
        while (await client.stats()).running == 0:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(client.close)
        return await stream

    assert asyncio.run(scenario())[-1].finish_reason == "abort"
    client.close()
    assert not asyncio.run(client.health()).ok


def test_stats_count_what_happened(make_llm: MakeLLM) -> None:
    client = client_of(make_llm())
    for name in "ab":
        asyncio.run(
            collect(client.generate([5] * 40, SamplingParams(max_tokens=3, ignore_eos=True), request_id=name, tenant="t"))
        )
    deadline = time.monotonic() + 5
    while asyncio.run(client.stats()).running and time.monotonic() < deadline:
        time.sleep(0.005)
    stats = asyncio.run(client.stats())
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens, stats.hit_rate) == (80, 32, 0.4)
    assert (stats.prompt_tokens, stats.generation_tokens) == (80, 6)
    assert asyncio.run(client.tenants()) == {"t": TenantStats(in_use_blocks=0, cached_blocks=2)}
    assert all(g.free + g.cached + g.in_use == g.total for g in stats.groups)
    assert stats.kv_bytes_read > 0
    client.close()


def test_questions_are_answered_between_steps(make_llm: MakeLLM) -> None:
    client = client_of(make_llm())

    async def scenario() -> None:
        running = asyncio.ensure_future(collect(client.generate([5] * 50, LONG, request_id="a"), limit=20))
        while (await client.stats()).prefix_query_tokens == 0:
            await asyncio.sleep(0.005)
        told = await client.explain([5] * 50)
        assert told["prompt_tokens"] == 50 and told["runs"] == []
        assert await client.purge("") == 0
        await running
        await idle(client)
        assert (await client.explain([5] * 50))["cached_tokens"] == 48
        assert (await client.explain([5] * 50, tenant="other"))["cached_tokens"] == 0
        assert (await client.explain([5] * 50, cache_salt="s"))["cached_tokens"] == 0

    asyncio.run(scenario())
    client.close()


def test_reset_forgets_what_nobody_uses(make_llm: MakeLLM) -> None:
    llm = make_llm()
    llm.generate([6] * 50, SamplingParams(max_tokens=1))
    llm.core.add(Request(id="runs", prompt=(5,) * 50, sampling=LONG))
    llm.core.step()
    assert (llm.core.peek([6] * 50, "", ""), llm.core.peek([5] * 50, "", "")) == (48, 48)
    client = client_of(llm)

    async def scenario() -> None:
        told = await client.reset()
        assert told["segments"] == 0 and told["blocks"] >= 3 and await client.peek([6] * 50) == 0
        await client.abort("runs")
        await idle(client)
        assert await client.peek([5] * 50) == 48, "what ran is cached once it has ended"
        await client.reset()
        assert await client.peek([5] * 50) == 0
        assert all(group.free == group.total for group in (await client.stats()).groups)

    asyncio.run(scenario())
    client.close()


def test_a_question_that_fails_or_is_dropped_harms_nobody(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    client = client_of(llm)
    asked, go_on = threading.Event(), threading.Event()

    def slow(tenant: str) -> int:
        asked.set()
        assert go_on.wait(10)
        raise RuntimeError("the index is torn")

    monkeypatch.setattr(llm.core, "purge", slow)

    async def scenario() -> None:
        first = asyncio.ensure_future(client.purge("a"))
        await asyncio.to_thread(asked.wait, 10)
        dropped = asyncio.ensure_future(client.purge("b"))
        await asyncio.sleep(0.01)
        dropped.cancel()
        go_on.set()
        with pytest.raises(InternalError, match=INTERNAL):
            await first
        with pytest.raises(asyncio.CancelledError):
            await dropped
        assert len(tokens_of(await collect(client.generate([5] * 9, SamplingParams(max_tokens=2), request_id="c")))) == 2

    asyncio.run(scenario())
    client.close()
    with pytest.raises(EngineDeadError):
        asyncio.run(client.explain([5]))


def test_questions_that_wait_when_the_engine_dies_are_answered(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    client = client_of(llm)
    stepping, go_on = threading.Event(), threading.Event()

    def step() -> list[RequestOutput]:
        stepping.set()
        assert go_on.wait(10)
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(llm.core, "step", step)

    async def scenario() -> None:
        running = asyncio.ensure_future(collect(client.generate([5] * 9, LONG, request_id="a")))
        await asyncio.to_thread(stepping.wait, 10)
        waiting = [asyncio.ensure_future(client.explain([5])) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()  # must not keep the others from being told
        go_on.set()
        results = await asyncio.gather(running, *waiting[1:], return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) and str(result) == DIED for result in results)

    asyncio.run(scenario())
    client.close()
    llm.core.abort("a")


def test_requests_go_before_the_engines_own_work(make_llm: MakeLLM) -> None:
    """Prompts that reused KV are healed once nobody asks for anything; a request that comes meanwhile puts that off."""
    options = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0}'
    llm = make_llm(kvshare_options=options, segment_memory="64MiB", max_batched_tokens=32, max_num_seqs=4)
    client = client_of(llm)
    source = random.Random(0)
    document = [source.randrange(3, 300) for _ in range(200)]

    def prompt(seed: int) -> list[int]:
        own = random.Random(seed)
        return [*(own.randrange(3, 300) for _ in range(60)), *document, *(own.randrange(3, 300) for _ in range(80))]

    kv, one = KVOptions(reuse="approx"), SamplingParams(max_tokens=1)

    async def scenario() -> None:
        for i in range(4):
            outputs = await collect(client.generate(prompt(i), one, request_id=str(i), kv=kv))
            assert outputs[-1].finish_reason and (outputs[-1].usage.reused_tokens > 0) == (i > 0)
        for _ in range(1000):
            if (await client.stats()).share.healed_tokens == 3 * 340:
                break
            await asyncio.sleep(0.01)
        assert (await client.stats()).share.healed_tokens == 3 * 340 and (await client.stats()).share.errands == 0
        again = await collect(client.generate([*prompt(3), 7], one, request_id="again"))
        assert again[-1].usage.cached_tokens == 336

    asyncio.run(scenario())
    assert asyncio.run(client.health()).ok
    client.close()


def test_many_requests_at_once_are_added_between_steps_not_before_one(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.engine.thread.client.RECEIVE_SECONDS", 0.0)  # a message and no more
    monkeypatch.setattr("kvloom.engine.thread.client.RECEIVE_SHARE", 0.0)
    llm = make_llm()
    added, step = [0], llm.core.step
    add = llm.core.add

    def count(request: Any) -> None:
        added[-1] += 1
        add(request)

    def mark() -> list[RequestOutput]:
        added.append(0)
        return step()

    monkeypatch.setattr(llm.core, "add", count)
    monkeypatch.setattr(llm.core, "step", mark)

    async def scenario() -> None:
        client = client_of(llm)
        requests = [client.generate([5, 6, i], SamplingParams(max_tokens=2), request_id=str(i)) for i in range(40)]
        stream = asyncio.ensure_future(collect(client.generate([7, 8], LONG, request_id="stream")))
        found = await asyncio.gather(*map(collect, requests))
        assert all(tokens_of(outputs) for outputs in found)
        client.close()
        await asyncio.gather(stream, return_exceptions=True)

    asyncio.run(scenario())
    assert sum(added) == 41 and max(added) == 1


def test_health_tells_of_silence_that_is_too_long(make_llm: MakeLLM) -> None:
    client = client_of(make_llm())
    client._watchdog.close()
    client._watchdog.silence = STALL_SECONDS
    assert asyncio.run(client.health()).ok
    client._watchdog.silence = STALL_SECONDS + 5
    assert asyncio.run(client.health()) == Health(ok=False, reason="no step has ended for 125 s")
    client._watchdog.beat()
    assert asyncio.run(client.health()).ok
    client.close()


def test_questions_do_not_keep_the_engine_from_its_own_work(make_llm: MakeLLM) -> None:
    """Somebody who looks at /v1/kv again and again, more often than the engine waits before it calls itself idle."""
    options = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0}'
    client = client_of(make_llm(kvshare_options=options, segment_memory="64MiB"))
    source = random.Random(0)
    document = [source.randrange(3, 300) for _ in range(200)]
    kv, one = KVOptions(reuse="approx"), SamplingParams(max_tokens=1)

    async def scenario() -> bool:
        for i in range(2):
            await collect(client.generate([*([7 + i] * 60), *document, *([9 + i] * 80)], one, request_id=str(i), kv=kv))
        for _ in range(2000):
            await client.tenants()
            if (await client.stats()).share.healed_tokens:
                return True
            await asyncio.sleep(0.005)
        return False

    assert asyncio.run(scenario())
    client.close()
