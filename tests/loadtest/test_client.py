"""The load client against a server that does exactly what it is told, and the figures made from its records."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from kvloom.loadtest.client.client import Client, Job, Record, Turn, _wait
from kvloom.loadtest.client.drive import closed_loop
from kvloom.loadtest.load.measures import summarise

Handler = Callable[[web.Request], "asyncio.Future[web.StreamResponse]"]


def sse(*events: object) -> Handler:
    """A handler that streams events: dicts as JSON, strings as they are."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            payload = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            await response.write(payload.encode())
            await asyncio.sleep(0.002)
        return response

    return handle  # type: ignore[return-value]


async def ask(handler: Handler, count: int = 1, concurrency: int = 1) -> list[Record]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with Client(f"http://127.0.0.1:{port}", "m") as client:
        records = await closed_loop(client, [Job(prompt=[1, 2], output_tokens=3)] * count, concurrency)
    await runner.cleanup()
    return records


def text(words: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"text": words, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}},
}


def test_instants_count_from_the_first_text() -> None:
    (record,) = asyncio.run(
        ask(sse(text(""), text("a"), ": ping\n\n", text("b"), text("c", "length"), USAGE, "data: [DONE]\n\n"))
    )
    assert record.ok, record.error
    assert (record.text, record.finish_reason, len(record.chunks)) == ("abc", "length", 3)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (2, 3, 1)
    assert record.first_byte is not None and record.sent < record.first_byte < record.chunks[0]
    assert record.ttft + sum(record.itl) == pytest.approx(record.e2e)
    assert record.tpot == pytest.approx(sum(record.itl) / 2)


@pytest.mark.parametrize(
    ("handler", "word"),
    [
        (sse(text("a"), {"error": {"message": "the engine has died"}}), "engine has died"),
        (sse(text("a"), {"object": "error", "message": "a flat error"}), "a flat error"),
        (sse(text("a"), {"error": "a bare error"}), "a bare error"),
        (sse(text("a")), "without a finish_reason"),
        (sse("data: [1]\n\n"), "no JSON object"),
        (sse("data: [DONE]\n\n"), "without text"),
        (sse("data: {broken\n\n"), "JSON"),
    ],
)
def test_failures_are_recorded_not_raised(handler: Handler, word: str) -> None:
    (record,) = asyncio.run(ask(handler))
    assert not record.ok and word in (record.error or "")
    summary = summarise([record])
    assert (summary.completed, summary.failed) == (0, 1)
    assert math.isnan(summary.ttft.p50)


def test_error_statuses_and_dead_servers_are_recorded() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "slow down"}}, status=429)

    (record,) = asyncio.run(ask(refuse))  # type: ignore[arg-type]
    assert record.error is not None and "429" in record.error and "slow down" in record.error

    async def nobody() -> Record:
        async with Client("http://127.0.0.1:9", "m") as client:
            return await client.send(Job(prompt=[1], output_tokens=1), Record(index=0))

    record = asyncio.run(nobody())
    assert "Connect" in (record.error or "") and record.error_kind == "connect"


def send(server: Any, job: Job, history: tuple[Turn, ...] = (), **settings: Any) -> Record:
    """One job to a fake server."""

    async def work() -> Record:
        async with Client(server.url + "/v1", "fake", **settings) as client:
            return await client.send(job, Record.of(0, job), history)

    return asyncio.run(work())


def test_several_tokens_in_a_chunk_count_as_usage_says(server: Any) -> None:
    server.tokens_per_chunk, server.cached = 4, 7
    record = send(server, Job(prompt=[1, 2, 3], output_tokens=10))
    assert record.ok and (len(record.chunks), record.output_tokens, record.tokens_from) == (3, 10, "usage")
    assert (record.prompt_tokens, record.cached_tokens, record.kv) == (3, 7, {"reused": {"a": 2}})
    assert record.tpot == pytest.approx((record.e2e - record.ttft) / 9)
    assert record.text == "".join(f"w{i} " for i in range(10))


def test_without_usage_chunks_are_counted_and_said_to_be(server: Any) -> None:
    server.usage = False
    record = send(server, Job(prompt="x", output_tokens=5))
    assert record.ok and (record.output_tokens, record.tokens_from) == (5, "chunks")


def test_what_is_sent(server: Any) -> None:
    job = Job(prompt=[1], output_tokens=2, extra={"kv": {"reuse": "off"}}, tenant="acme")
    server.keys = ("main", "theirs")
    assert send(server, job, api_key="main", tenant_keys={"acme": "theirs"}, extra_body={"top_k": 1}).ok
    assert send(server, Job(prompt="x", output_tokens=2), api_key="main", tenant_keys={"acme": "theirs"}).ok
    body, plain = server.seen
    headers = body.pop("headers")
    assert body == {"model": "fake", "prompt": [1], "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True,
                    "stream_options": {"include_usage": True}, "user": "acme", "top_k": 1, "kv": {"reuse": "off"}}  # fmt: skip
    assert (headers["Authorization"], headers["X-KVLoom-Tenant"]) == ("Bearer theirs", "acme")
    assert plain["headers"]["Authorization"] == "Bearer main" and "X-KVLoom-Tenant" not in plain["headers"]


def test_the_chat_endpoint_and_history(server: Any) -> None:
    history = (Turn("hello ", "w0 w1 "),)
    record = send(server, Job(prompt="again", output_tokens=2), history, endpoint="chat")
    assert record.ok and record.text == "w0 w1 "
    assert [(m["role"], m["content"]) for m in server.seen[-1]["messages"]] == [
        ("user", "hello "), ("assistant", "w0 w1 "), ("user", "again"),
    ]  # fmt: skip
    assert send(server, Job(prompt="again", output_tokens=2), history).ok
    assert server.seen[-1]["prompt"] == "hello w0 w1 again"
    with pytest.raises(ValueError, match="text prompt"):
        send(server, Job(prompt=[1], output_tokens=2), endpoint="chat")


def test_a_busy_server_is_a_failure_unless_retries_are_asked_for(server: Any) -> None:
    server.refusals = [(429, {"Retry-After": "0.05"})]
    record = send(server, Job(prompt="x", output_tokens=2))
    assert (record.error_kind, record.status, record.retries) == ("http_429", 429, 0)
    server.refusals = [(429, {"Retry-After": "9", "retry-after-ms": "60"}), (503, {"Retry-After": "0.05"})]
    record = send(server, Job(prompt="x", output_tokens=2), retries=2)
    assert record.ok and (record.status, record.retries) == (200, 2)
    assert record.ttft > 0.11, "the waits are the user's"
    server.refusals = [(429, {"Retry-After": "0"})] * 3
    record = send(server, Job(prompt="x", output_tokens=2), retries=2)
    assert (record.error_kind, record.retries, record.error) == ("http_429", 2, "HTTP 429: status 429, as told")


@pytest.mark.parametrize(
    ("headers", "tries", "seconds"),
    [
        ({"Retry-After": "3"}, 0, 3),
        ({"retry-after-ms": "250", "Retry-After": "3"}, 0, 0.25),
        ({"Retry-After": "86400"}, 0, 120),
        ({"Retry-After": "-5"}, 0, 0),
        ({"Retry-After": "soon"}, 0, 0.5),
        ({}, 3, 4),
    ],
)
def test_the_wait_that_a_busy_server_asks_for(headers: dict[str, str], tries: int, seconds: float) -> None:
    assert _wait(headers, tries) == seconds


def test_the_wait_can_be_a_date() -> None:
    date = datetime.now(UTC) + timedelta(seconds=60)
    assert 0 < _wait({"Retry-After": format_datetime(date)}, 0) <= 60


def test_other_statuses_are_not_tried_again(server: Any) -> None:
    server.refusals = [(500, {"Retry-After": "0"})]
    record = send(server, Job(prompt="x", output_tokens=2), retries=3)
    assert (record.error_kind, record.retries, len(server.seen)) == ("http_500", 0, 1)


def test_a_stream_cut_in_the_middle(server: Any) -> None:
    server.break_after = 3
    record = send(server, Job(prompt="x", output_tokens=8))
    assert (record.error_kind, len(record.chunks), record.output_tokens) == ("stream", 3, 3)
    assert record.ended is not None


def test_a_job_that_is_cancelled_is_neither_complete_nor_failed(server: Any) -> None:
    server.delay = 0.02
    record = send(server, Job(prompt="x", output_tokens=500, cancel_after=0.15))
    assert record.cancelled and record.error is None and not record.ok
    assert 0 < record.output_tokens == len(record.chunks) < 500
    assert (summarise([record]).completed, summarise([record]).failed) == (0, 0)
    early = send(server, Job(prompt="x", output_tokens=2, cancel_after=5.0))
    assert early.ok and not early.cancelled


def test_a_request_that_takes_too_long(server: Any) -> None:
    server.delay = 0.5
    record = send(server, Job(prompt="x", output_tokens=3), timeout=0.1)
    assert record.error_kind == "timeout" and "0.1 s" in (record.error or "")


def test_expected_text_is_looked_for_whatever_its_case(server: Any) -> None:
    assert send(server, Job(prompt="x", output_tokens=3, expect="W1 w2")).correct is True
    assert send(server, Job(prompt="x", output_tokens=3, expect="w7")).correct is False
    server.refusals = [(500, {})]
    assert send(server, Job(prompt="x", output_tokens=3, expect="w1")).correct is None


def test_the_closed_loop_keeps_its_concurrency() -> None:
    under_way, most = 0, 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return await sse(text("a", "length"), USAGE)(request)

    records = asyncio.run(ask(count, count=9, concurrency=3))  # type: ignore[arg-type]
    assert all(record.ok for record in records)
    assert most == 3
    summary = summarise(records)
    assert (summary.completed, summary.output_tokens) == (9, 27)
    assert summary.output_throughput == pytest.approx(27 / summary.wall)
