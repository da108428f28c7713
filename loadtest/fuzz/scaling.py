"""`python -m kvloom.loadtest.fuzz.scaling`: from one replica to two and back under load; no request may fail.

Ten clients ask for half a minute, so that prompts wait, then one goes on until the second replica is gone again.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from kvloom.loadtest.client.servers import Server, running
from kvloom.loadtest.fuzz.replicas import ask

CROWD, BUSY_SECONDS, MOST_SECONDS = 10, 30.0, 180.0


async def scale(url: str) -> tuple[int, list[tuple[float, int]]]:
    """Answers, and when there were how many replicas. Raises AssertionError for an error of the server's."""
    began, answered, seen, ended = time.monotonic(), 0, [(0.0, 1)], asyncio.Event()
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=180)) as session:

        async def client(number: int) -> None:
            nonlocal answered
            draw = random.Random(number)
            while not ended.is_set() and (number == 0 or time.monotonic() - began < BUSY_SECONDS):
                prompt = [draw.randrange(300, 40000) for _ in range(800)]
                await ask(session, {"prompt": prompt, "max_tokens": 40, "stream": True, "return_token_ids": True})
                answered += 1

        clients = [asyncio.ensure_future(client(number)) for number in range(CROWD)]
        while time.monotonic() - began < MOST_SECONDS and [count for _, count in seen] != [1, 2, 1]:
            await asyncio.sleep(0.5)
            there = len((await (await session.get("/v1/kv")).json())["replicas"])
            if there != seen[-1][1]:
                seen.append((time.monotonic() - began, there))
        ended.set()
        await asyncio.gather(*clients)
    return answered, seen


def main() -> int:
    """Returns 1 if there were not two replicas, or they did not become one again."""
    serve = f"{sys.executable} -m kvloom.server.cli serve smollm2 --port {{port}}"
    command = f"{serve} --replicas 1 --max-replicas 2 --kv-memory 256MiB"
    with tempfile.TemporaryDirectory() as logs, running(Server("replicas", command), Path(logs)) as started:
        answered, seen = asyncio.run(scale(started.url))
    print(f"{answered} answered, 0 failed; replicas: " + ", ".join(f"{count} after {seconds:.0f} s" for seconds, count in seen))
    return 0 if [count for _, count in seen] == [1, 2, 1] else 1


if __name__ == "__main__":
    sys.exit(main())
