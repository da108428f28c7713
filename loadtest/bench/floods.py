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
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from kvloom.loadtest.bench import flood_kinds
from kvloom.loadtest.bench.flood_kinds import FLOODS, Target
from kvloom.loadtest.bench.neighbour import KEY, Figures, Neighbour
from kvloom.loadtest.client.servers import Server, StartError, running
from kvloom.loadtest.figures import add_publish, publish
from kvloom.loadtest.study.flags import need

FLOOD = "flood-key"
TENANTS = f"tenants:\n  neighbour: {{api_keys: [{KEY}]}}\n  flood: {{api_keys: [{FLOOD}]}}\n"
SETTLE_SECONDS = 1.0
"""At the beginning of a window, not measured."""


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


HEAD = ("flood", "tok/s", "under it", "times slower", "/health p95, ms", "under it, ms", "times longer")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown."""
    tokens, health = row["tokens_per_second"], row["health_p95_ms"]
    figures = (*tokens, row["tokens_ratio"], *health, row["health_ratio"])
    return [row["flood"], *(f"{value:.{digits}f}" for value, digits in zip(figures, (1, 1, 2, 1, 1, 2)))]


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """The table: without, under, and how many times worse."""
    table = Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    need("aiohttp")
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
    if arguments.publish:
        publish(arguments.publish, HEAD, list(map(cells, rows)), f"Medians of {arguments.rounds} rounds.")
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
    add_publish(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
