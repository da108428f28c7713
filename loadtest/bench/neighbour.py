"""The neighbour of a flood: streams answers with a key of its own and asks for /health all the time, and notes what it got."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

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
