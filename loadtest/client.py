"""The load client: one streamed request against any OpenAI-compatible server, with every instant kept.

Owns the definitions of what is timed. Instants are `time.perf_counter()` seconds; a `Record` keeps raw ones, so that any
definition of TTFT or ITL can be computed afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

DATA = b"data: "


@dataclass(slots=True, kw_only=True)
class Record:
    """One request as the client saw it."""

    index: int
    scheduled: float = 0.0
    """When it should have been sent."""
    sent: float = 0.0
    first_byte: float | None = None
    chunks: list[float] = field(default_factory=list)
    """Arrival of every chunk that carried text."""
    last: float | None = None
    """Arrival of the last chunk that carried text."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    text: str = ""
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first non-empty text."""
        return self.chunks[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last text."""
        assert self.last is not None
        return self.last - self.sent

    @property
    def tpot(self) -> float:
        """(E2E - TTFT) / (output tokens - 1), seconds; 0 for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl(self) -> list[float]:
        """Gaps between chunks that carried text, seconds."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request to send: token ids in, how many tokens out."""

    prompt: Sequence[int]
    output_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


class Client:
    """Sends jobs to one server. Use as an async context manager."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 1800.0) -> None:
        """`base_url` without /v1, such as http://127.0.0.1:8000; timeout in seconds per request."""
        self._url = base_url.rstrip("/") + "/v1/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=10)

    async def __aenter__(self) -> Client:
        # A connection per request: llama-server closes kept-alive ones without a word, and on loopback a new one costs nothing.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def send(self, job: Job, record: Record) -> Record:
        """Run one job into its record. Never raises for what the server does: failures are in `record.error`."""
        body = {"model": self._model, "prompt": list(job.prompt), "max_tokens": job.output_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **job.extra}  # fmt: skip
        record.sent = time.perf_counter()
        record.scheduled = record.scheduled or record.sent
        try:
            async with self._session.post(self._url, json=body) as reply:
                if reply.status != 200:
                    record.error = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                    return record
                async for event in _events(reply.content, record):
                    _note(event, record)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
        if record.ok and not record.chunks:
            record.error = "the stream ended without text"
        return record


async def _events(content: aiohttp.StreamReader, record: Record) -> AsyncIterator[dict[str, Any]]:
    async for line in content:
        if record.first_byte is None:
            record.first_byte = time.perf_counter()
        if line.startswith(DATA) and (payload := line[len(DATA) :].strip()) != b"[DONE]":
            yield json.loads(payload)


def _note(event: dict[str, Any], record: Record) -> None:
    """Take one event down."""
    if event.get("error"):
        record.error = str(event["error"].get("message", event["error"]))
        return
    for choice in event.get("choices", ()):
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
        if choice.get("text"):
            record.last = time.perf_counter()
            record.chunks.append(record.last)
            record.text += choice["text"]
    if usage := event.get("usage"):
        record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", record.cached_tokens)


async def closed_loop(client: Client, jobs: Sequence[Job], concurrency: int) -> list[Record]:
    """Send jobs with at most `concurrency` under way; each starts when one before it ends."""
    records = [Record(index=i) for i in range(len(jobs))]
    queue = iter(zip(jobs, records))

    async def worker() -> None:
        for job, record in queue:
            await client.send(job, record)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(jobs)))))
    return records
