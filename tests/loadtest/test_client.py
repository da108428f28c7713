"""The load client against a server that does exactly what it is told, and the figures made from its records."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kvloom.loadtest.arriving import LEAD, gaps, measure_arriving
from kvloom.loadtest.client import Client, Job, Record, Turn, _wait
from kvloom.loadtest.drive import closed_loop
from kvloom.loadtest.measures import Spread, Summary, summarise
from kvloom.loadtest.peers import (
    CASES,
    OWN_PRECISION,
    Run,
    Server,
    arrivals,
    busy,
    cells,
    jobs,
    known_of,
    note,
    parse,
    plot,
    recorded,
    servers,
    table,
)
from kvloom.loadtest.peers_table import ARRIVING, BESIDE

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


def test_every_server_gets_the_same_requests_and_every_round_others() -> None:
    case = CASES[0]
    assert [job.prompt for job in jobs(case, 1)] == [job.prompt for job in jobs(case, 1)]
    assert jobs(case, 1)[0].prompt != jobs(case, 2)[0].prompt
    assert len(jobs(case, 1)) == case.requests and len(jobs(case, 1)[0].prompt) == case.inputs


def test_the_table_holds_medians_and_ratios() -> None:
    def record(ttft: float) -> Record:
        return Record(index=0, sent=0.0, chunks=[ttft, ttft + 1.0], last=ttft + 1.0, output_tokens=2, prompt_tokens=5)

    runs = [
        Run(name, "c1", round_, start, summarise([record(ttft * factor)]))
        for name, factor, start in (("kvloom", 1.0, 2.0), ("peer", 4.0, 8.0))
        for round_, ttft in enumerate((0.1, 0.3, 0.2))
    ]
    lines = table(runs, CASES[:1]).splitlines()
    ttft = next(line for line in lines if "TTFT" in line)
    assert "| 200.0 | 800.0 | 0.25x |" in ttft
    assert "| 2.0 | 8.0 | 0.25x |" in next(line for line in lines if "start" in line)
    assert "Medians of 3 rounds; 0 failed" in lines[-1]


def test_recorded_runs_give_the_same_report(tmp_path: Path) -> None:
    record = Record(index=0, sent=0.0, chunks=[0.1, 0.2], last=0.2, output_tokens=2, prompt_tokens=5)
    runs = [
        Run(name, "c1", round_, 2.0, summarise([record]))
        for name, rounds in (("kvloom", 2), ("peer", 1))
        for round_ in range(rounds)
    ]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([asdict(run) for run in runs]))
    assert str(recorded(file)) == str((runs, {}))  # one request has no deviation, and NaN is not NaN
    assert "Medians of 2 rounds (peer c1: 1)" in table(recorded(file)[0], CASES[:1])
    plot(runs, CASES[:1], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    file.write_text("[1]")
    with pytest.raises(SystemExit, match="recorded runs"):
        recorded(file)


def test_peers_come_from_commands_and_urls() -> None:
    args = parse(["--start", "a=run {port}", "--url", "b=http://x", "--only", "a,b"])
    assert servers(args) == [Server("a", command="run {port}"), Server("b", url="http://x")]
    with pytest.raises(SystemExit, match="NAME"):
        servers(parse(["--url", "nonsense"]))


def test_every_column_of_a_comparison_says_its_precision_and_like_stands_beside_like(tmp_path: Path) -> None:
    def summary(t: float) -> Summary:
        return Summary(8, 0, t, 0, 0, 100 / t, *(Spread(t, t, t, t, 0.0, t) for _ in range(4)))

    seconds = {"kvloom": 1.0, "kvloom-bf16": 2.0, "vllm": 4.0, "llama": 8.0}
    runs = [Run(name, CASES[0].name, 0, None, summary(t)) for name, t in seconds.items()]
    given = {"start": ["vllm=run {port}"], "url": ["llama=http://x"], "also": ["kvloom-bf16=--weights bf16"],
             "precision": ["vllm=bf16", "kvloom-bf16=bf16", "llama=Q4_1"],
             "version": ["vllm=echo 'vLLM 0.32 (CPU)'"]}  # fmt: skip
    args = parse([word for flag, values in given.items() for value in values for word in (f"--{flag}", value)])
    about = known_of(args, servers(args))
    assert about["vllm"].precision == "bf16" and "--weights bf16" in about["kvloom-bf16"].command
    head, rows = cells(runs, CASES[:1], about)
    assert head[2:6] == [f"kvloom ({OWN_PRECISION})", "kvloom-bf16 (bf16)", "vllm (bf16)", "llama (Q4_1)"]
    assert head[6:] == ["kvloom / vllm", "kvloom / llama", "kvloom-bf16 / vllm"]
    assert rows[0][6:] == ["0.25x", "0.12x", "0.50x"] and rows[-1][2:] == ["-"] * 7
    said = note(runs, about)
    assert "- vllm (bf16): `run {port}`; vLLM 0.32 (CPU)" in said and "commit" in said
    content = {"about": {name: asdict(known) for name, known in about.items()}, "runs": [asdict(run) for run in runs]}
    (tmp_path / "runs.json").write_text(json.dumps(content))
    assert recorded(tmp_path / "runs.json") == (runs, about)
    for wrong in (["--precision", "nobody=bf16"], ["--also", "other=--x"], ["--version", "kvloom=x", "--version", "kvloom=y"]):
        with pytest.raises(SystemExit):
            known_of(one := parse(wrong), servers(one))
    of_its_own = parse(["--kvloom=--weights bf16"])
    assert known_of(of_its_own, servers(of_its_own))["kvloom"].precision == ""


def test_a_case_beside_busy_processes_runs_them_and_shows_means_and_tails() -> None:
    with busy(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.returncode for process in processes), "they end with the case"
    summary = replace(summarise([]), ttft=Spread(0.5, 0.1, 0.1, 0.1), itl=Spread(0.1, 0.2, 0.3, 0.4))
    runs = [Run("kvloom", "beside2", 0, 1.0, summary)]
    rows = cells(runs, BESIDE[2:], {})[1]
    assert rows[0] == ["beside2: 1 x 512 in / 64 out, 16 requests, beside 2 busy processes", "TTFT mean, ms", "500.0"]
    assert rows[3] == ["", "ITL p99, ms", "400.0"]


class Halting:
    """A server whose streams send a token every 2 ms, and none while it computes a prompt of some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free = seconds, asyncio.Event()
        self.free.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if body["max_tokens"] == 1:
            self.free.clear()
            await asyncio.sleep(self.seconds)
            self.free.set()
        for i in range(body["max_tokens"]):
            await self.free.wait()
            event = text("x", "length" if i == body["max_tokens"] - 1 else None)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.002)
        await response.write(b"data: [DONE]\n\n")
        return response


async def arriving_at(handle: Handler, streams: list[Job], prompts: list[Job]) -> Summary:
    app = web.Application()
    app.router.add_post("/v1/completions", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}", "m") as client:
            return await measure_arriving(client, streams, prompts)
    finally:
        await runner.cleanup()


def test_prompts_that_arrive_beside_streams_show_in_their_gaps() -> None:
    async def run(outputs: int) -> Summary:
        streams = [Job(prompt=[1], output_tokens=outputs) for _ in range(2)]
        return await arriving_at(Halting(0.3).handle, streams, [Job(prompt=[1, 2], output_tokens=1)])

    summary = asyncio.run(run(10_000))
    assert (summary.completed, summary.failed) == (1, 0)
    assert summary.itl.most >= 0.25 and 0.3 <= summary.ttft.p50 < 30
    assert asyncio.run(run(LEAD + 1)).failed >= 1, "a stream that ends meanwhile measures nothing"


def test_gaps_are_those_that_overlap_the_arrival() -> None:
    stream, prompt = Record(index=0, chunks=[0.0, 1.0, 2.0, 5.0, 6.0, 7.0]), Record(index=0, sent=1.5, chunks=[5.5])
    assert gaps([stream], [prompt]) == [1.0, 3.0, 1.0]
    assert gaps([Record(index=0, chunks=[0.0, 1.0])], [prompt]) == [4.5], "a stream that falls silent waits until the end"
    assert gaps([Record(index=0)], [prompt]) == []


def test_an_arriving_case_says_what_it_is_and_sends_it() -> None:
    summary = replace(summarise([]), ttft=Spread(2.0, 2.0, 2.0, 2.0), itl=Spread(0.1, 0.2, 0.3, 0.4, most=0.5))
    rows = cells([Run("kvloom", "arrive4", 0, 1.0, summary)], ARRIVING[1:], {})[1]
    assert rows[0] == ["arrive4: 4 x 7270 in, arriving beside 8 streams", "gap of streams p50, ms", "200.0"]
    assert [row[2] for row in rows[1:4]] == ["400.0", "500.0", "2000.0"]
    assert [len(job.prompt) for job in jobs(ARRIVING[1], 0)] == [120] * 8
    assert [(len(job.prompt), job.output_tokens) for job in arrivals(ARRIVING[1], 0)] == [(7270, 1)] * 4
    assert arrivals(ARRIVING[1], 0) != arrivals(ARRIVING[1], 1)
