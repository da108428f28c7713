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

import aiohttp
from rich.console import Console
from rich.table import Table

from kvloom.loadtest import flood_kinds
from kvloom.loadtest.flood_kinds import FLOODS, Target
from kvloom.loadtest.servers import Server, StartError, running

NEIGHBOUR, FLOOD = "neighbour-key", "flood-key"
TENANTS = f"tenants:\n  neighbour: {{api_keys: [{NEIGHBOUR}]}}\n  flood: {{api_keys: [{FLOOD}]}}\n"
HEALTH_PAUSE = 0.02
SETTLE_SECONDS = 1.0
"""At the beginning of a window, not measured."""


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
        body = {"prompt": "Once upon a time", "max_tokens": 256, "ignore_eos": True, "stream": True, "temperature": 0}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {NEIGHBOUR}"}) as session:
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


async def _window(neighbour: Neighbour, seconds: float) -> Figures:
    await asyncio.sleep(SETTLE_SECONDS)
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    return neighbour.between(begin, begin + seconds)


async def measure(url: str, names: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
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


def _row(name: str, without: Sequence[Figures], under: Sequence[Figures]) -> dict[str, Any]:
    calm = Figures(*(statistics.median(values) for values in zip(*without)))
    flooded = Figures(*(statistics.median(values) for values in zip(*under)))
    return {
        "flood": name,
        "rounds": len(under),
        "tokens_per_second": [calm.tokens_per_second, flooded.tokens_per_second],
        "health_p95_ms": [calm.health_p95_ms, flooded.health_p95_ms],
        "tokens_ratio": calm.tokens_per_second / flooded.tokens_per_second if flooded.tokens_per_second else float("inf"),
        "health_ratio": flooded.health_p95_ms / calm.health_p95_ms,
    }


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """The table: without, under, and how many times worse."""
    table = Table("flood", "tok/s", "under", "ratio", "/health p95 ms", "under", "ratio")
    for row in rows:
        tokens, health = row["tokens_per_second"], row["health_p95_ms"]
        cells = (*(f"{v:.1f}" for v in tokens), f"{row['tokens_ratio']:.2f}", *(f"{v:.1f}" for v in health))
        table.add_row(row["flood"], *cells, f"{row['health_ratio']:.2f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    names = arguments.flood or list(FLOODS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants.yaml"
        tenants.write_text(TENANTS)
        command = f"{sys.executable} -m kvloom.server.cli serve {arguments.model} --port {{port}} --tenants {tenants}"
        try:
            with running(Server("floods", f"{command} --no-access-log --kv-memory 1GiB"), arguments.out) as started:
                rows = asyncio.run(measure(started.url, names, arguments.rounds, arguments.seconds))
        except StartError as error:
            print(f"kvloom bench floods: {error}", file=sys.stderr)
            return 1
    with (arguments.out / "floods.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    show(Console(), rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvloom bench floods", description="What a neighbour feels of each flood.")
    parser.add_argument("--model", default="smollm2", help="model to serve (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, choices=range(1, 21), metavar="N", help="1 to 20 (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per window (default: %(default)s)")
    parser.add_argument("--flood", action="append", choices=list(FLOODS), help="only this one; repeat it for several")
    parser.add_argument("--out", type=Path, default=Path("floods"), help="folder for floods.jsonl and the server's log")
    return parser


if __name__ == "__main__":
    sys.exit(main())
