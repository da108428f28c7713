"""The comparison of servers: what is sent, what its table and picture say, and prompts that arrive beside streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from aiohttp import web

from kvloom.loadtest.bench.peers import (
    CASES,
    LEAD,
    OWN_PRECISION,
    Run,
    Server,
    arrivals,
    busy,
    cells,
    gaps,
    jobs,
    known_of,
    main,
    measure_arriving,
    note,
    parse,
    plot,
    recorded,
    servers,
    table,
)
from kvloom.loadtest.bench.peers_table import ARRIVING, BESIDE
from kvloom.loadtest.client.client import Client, Job, Record
from kvloom.loadtest.load.measures import Spread, Summary, summarise

Handler = Callable[[web.Request], "asyncio.Future[web.StreamResponse]"]


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
    page = tmp_path / "page.md"
    assert main(["--from", str(file), "--out", str(tmp_path), "--markdown", str(page)]) == 0
    assert "c1: 1 x 512" in page.read_text() and "c8:" not in page.read_text(), "only what was run has rows"
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
            event = {"choices": [{"text": "x", "finish_reason": "length" if i == body["max_tokens"] - 1 else None}]}
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


def test_a_picture_of_other_loads_is_refused_before_anything_runs() -> None:
    with pytest.raises(SystemExit, match="--plot draws c1,c8,c16,long; none of them is among --cases"):
        main(["--cases", "arrive1,beside0", "--plot", "p.png"])


def test_commands_are_shown_as_a_user_types_them() -> None:
    args = parse(["--also", "kvloom-bf16=--weights bf16"])
    shown = [about.command for about in known_of(args, servers(args)).values()]
    assert shown == ["kvloom serve smollm2 --port {port}", "kvloom serve smollm2 --port {port} --weights bf16"]
