"""The load client against a server that does exactly what it is told, and the figures made from its records."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from aiohttp import web

from kvloom.loadtest.client import Client, Job, Record, closed_loop
from kvloom.loadtest.measures import summarise
from kvloom.loadtest.peers import CASES, Run, Server, jobs, parse, plot, recorded, servers, table

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

    assert "Connect" in (asyncio.run(nobody()).error or "")


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
    assert recorded(file) == runs
    assert "Medians of 2 rounds (peer c1: 1)" in table(recorded(file), CASES[:1])
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
