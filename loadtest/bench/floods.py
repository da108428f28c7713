"""`kvloom bench floods`: what a neighbour feels of each flood. Starts a server of its own on this machine.

A neighbour with a key of its own streams answers one after the other and asks for /health every few milliseconds, all the time.
Windows without and under a flood take turns; the table shows medians and their ratio. Rows also go to floods.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvloom.loadtest.bench import flood_kinds
from kvloom.loadtest.bench.flood_kinds import FLOODS, Target
from kvloom.loadtest.client.servers import Server, StartError, running
from kvloom.loadtest.figures import publish
from kvloom.loadtest.study.flags import add_publish, need
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

KEY = "neighbour-key"
HEALTH_PAUSE = 0.02


class Figures(NamedTuple):
    """What the neighbour got in one window."""

    tokens_per_second: float
    health_p95_ms: float


class Neighbour:
    """Streams and looks at /health until it is cancelled, and notes when what came."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._tokens: list[float] = []
        self._health: list[tuple[float, float]] = []  # when asked, seconds to the answer

    async def stream(self) -> None:
        """One answer after the other; a token is an event."""
        import aiohttp  # an extra: help is read without it

        body = {"prompt": "Once upon a time", "max_tokens": 256, "ignore_eos": True, "stream": True, "temperature": 0}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
            while True:
                try:
                    async with session.post(f"{self._url}/v1/completions", json=body) as reply:
                        async for line in reply.content:
                            if line.startswith(b"data: {"):
                                self._tokens.append(time.monotonic())
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)

    async def look(self) -> None:
        """Ask for /health, on a new connection each time as probes do. A refused connection counts as a second."""
        import aiohttp

        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(10)) as session:
            while True:
                began = time.monotonic()
                seconds = 1.0
                try:
                    async with session.get(f"{self._url}/health") as reply:
                        await reply.read()
                        seconds = time.monotonic() - began
                except (TimeoutError, aiohttp.ClientError):
                    seconds = max(seconds, time.monotonic() - began)
                self._health.append((began, seconds))
                await asyncio.sleep(HEALTH_PAUSE)

    def between(self, begin: float, end: float) -> Figures:
        """What came in a window."""
        tokens = sum(begin <= moment < end for moment in self._tokens)
        health = sorted(seconds for asked, seconds in self._health if begin <= asked < end) or [end - begin]
        return Figures(tokens / (end - begin), 1000 * health[min(len(health) - 1, int(0.95 * len(health)))])


FLOOD = "flood-key"
TENANTS = f"tenants:\n  neighbour: {{api_keys: [{KEY}]}}\n  flood: {{api_keys: [{FLOOD}]}}\n"
SETTLE_SECONDS = 1.0
"""At the beginning of a window, not measured."""


async def _window(neighbour: Neighbour, seconds: float) -> Figures:
    await asyncio.sleep(SETTLE_SECONDS)
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    return neighbour.between(begin, begin + seconds)


async def measure(url: str, names: Sequence[str], rounds: int, seconds: float) -> list[Row]:
    """A row per flood: medians without and under it."""
    neighbour = Neighbour(url)
    tasks = [asyncio.ensure_future(work) for work in (neighbour.stream(), neighbour.look())]
    spawn = multiprocessing.get_context("spawn")
    rows = []
    try:
        for name in names:
            without, under = [], []
            for _ in range(rounds):
                without.append(await _window(neighbour, seconds))
                # The process needs a moment to start, which counts as settling.
                target = Target(urlsplit(url).port or 0, FLOOD, time.monotonic() + 2 * SETTLE_SECONDS + seconds)
                process = spawn.Process(target=flood_kinds.run, args=(name, target), daemon=True)
                process.start()
                try:
                    await asyncio.sleep(SETTLE_SECONDS)
                    under.append(await _window(neighbour, seconds))
                finally:
                    await asyncio.to_thread(process.join, 3.0)
                    process.kill()
            rows.append(_row(name, without, under))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return rows


def _row(name: str, without: Sequence[Figures], under: Sequence[Figures]) -> Row:
    calm, flooded = (Figures(*map(statistics.median, zip(*part))) for part in (without, under))
    return {
        "flood": name,
        "rounds": len(under),
        "tokens_per_second": [calm.tokens_per_second, flooded.tokens_per_second],
        "health_p95_ms": [calm.health_p95_ms, flooded.health_p95_ms],
        "tokens_ratio": calm.tokens_per_second / flooded.tokens_per_second if flooded.tokens_per_second else float("inf"),
        "health_ratio": flooded.health_p95_ms / calm.health_p95_ms,
    }


COLUMNS = (
    Column("flood", "flood"),
    Column("tok/s", "tokens_per_second", ".1f"),
    Column("under it", "tokens_under", ".1f"),
    Column("times slower", "tokens_ratio", ".2f"),
    Column("/health p95, ms", "health_p95_ms", ".1f"),
    Column("under it, ms", "health_under", ".1f"),
    Column("times longer", "health_ratio", ".2f"),
)


def shown(row: Row) -> Row:
    """A row with a value per column, of those that hold one without the flood and one under it."""
    (calm, under), (health, longer) = row["tokens_per_second"], row["health_p95_ms"]
    return {**row, "tokens_per_second": calm, "tokens_under": under, "health_p95_ms": health, "health_under": longer}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    made = argparse.ArgumentParser(prog="kvloom bench floods", description="What a neighbour feels of each flood.")
    made.add_argument("--model", default="smollm2", help="model to serve (default: %(default)s)")
    rounds: dict[str, Any] = {"choices": range(1, 21), "metavar": "N", "help": "1 to 20 (default: %(default)s)"}
    made.add_argument("--rounds", type=int, default=3, **rounds)
    made.add_argument("--seconds", type=float, default=4.0, help="per window (default: %(default)s)")
    made.add_argument("--flood", action="append", choices=list(FLOODS), help="only this one; repeat it for several")
    made.add_argument("--out", type=Path, default=Path("floods"), help="folder for floods.jsonl and the server's log")
    add_publish(made)
    args = made.parse_args(argv)
    need("aiohttp")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants.yaml"
        tenants.write_text(TENANTS)
        command = f"{sys.executable} -m kvloom.server.cli serve {args.model} --port {{port}} --tenants {tenants}"
        try:
            with running(Server("floods", f"{command} --no-access-log --kv-memory 1GiB"), args.out) as started:
                rows = asyncio.run(measure(started.url, args.flood or list(FLOODS), args.rounds, args.seconds))
        except StartError as error:
            print(f"kvloom bench floods: {error}", file=sys.stderr)
            return 1
    (args.out / "floods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = cells(COLUMNS, list(map(shown, rows)))
    console.print(console_table(*table))
    if args.publish:
        publish(args.publish, *table, f"Medians of {args.rounds} rounds.")
    return 0
