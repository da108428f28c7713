"""The load client: one streamed request against any OpenAI-compatible server, with every instant kept in its record.

Reading a stream runs once per chunk beside the server under test, on the same cores more often than not: one clock reading per
piece that the network gave, one `json.loads` per event, and nothing else.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import aiohttp
from multidict import CIMultiDict

from kvloom.loadtest.client.record import PATHS, Endpoint, Job, Record

__all__ = ["Client", "Endpoint", "Job", "Record", "Turn", "words"]

RETRIED = (429, 503)
LONGEST_WAIT = 120.0
"""Seconds beyond which a Retry-After is cut short, as openai-python does."""
CONNECT_SECONDS = 10.0


class Turn(NamedTuple):
    """What was said before, for a job that follows another."""

    prompt: str
    reply: str


class Client:
    """Sends jobs to one server. Use as an async context manager."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        tenant_keys: Mapping[str, str] | None = None,
        endpoint: Endpoint = "completions",
        extra_body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 0,
        timeout: float = 1800.0,
    ) -> None:
        """`base_url` without /v1, such as http://127.0.0.1:8000; `timeout` in seconds for each try of a request.

        `headers`: sent with every request. `retries`: how often a 429 or 503 is tried again after the time that the server asks
        for.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._url = self.base_url + PATHS[endpoint]
        self.model = model
        self._endpoint = endpoint
        self._extra = dict(extra_body or {})
        self._retries = retries
        self._headers = CIMultiDict({"Content-Type": "application/json", **_bearer(api_key)})
        self._headers.update(headers or {})  # a header of one's own replaces ours, in any case of letters
        self._tenant_headers = {tenant: _bearer(key) for tenant, key in (tenant_keys or {}).items()}
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)

    async def __aenter__(self) -> Client:
        # A connection per request: llama-server closes kept-alive ones without a word, and on loopback a new one costs nothing.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def get(self, path: str, timeout: float) -> tuple[int, str]:
        """Status and text of a GET. Raises OSError, TimeoutError or aiohttp.ClientError."""
        async with self._session.get(self.base_url + path, timeout=aiohttp.ClientTimeout(total=timeout)) as reply:
            return reply.status, await reply.text()

    async def reachable(self) -> bool:
        """Whether anything listens there at all."""
        try:
            await self.get("/health", 5.0)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return False
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass
        return True

    async def send(self, job: Job, record: Record, history: Sequence[Turn] = ()) -> Record:
        """Run one job into its record. Never raises for what the server does: failures are in the record.

        Cancelling the task closes the connection and marks the record.
        """
        body = json.dumps(self.body(job, history), separators=(",", ":")).encode()
        headers = {"X-KVLoom-Tenant": job.tenant, **self._tenant_headers.get(job.tenant, {})} if job.tenant else {}
        record.sent = time.perf_counter()
        record.scheduled = record.scheduled or record.sent
        try:
            async with asyncio.timeout(job.cancel_after):
                await self._tries(body, headers, record)
        except TimeoutError:  # the job's own: a server's slowness is caught below
            record.cancelled = True
        except asyncio.CancelledError:
            record.cancelled = True
            raise
        finally:
            record.ended = time.perf_counter()
        if record.ok and not record.chunks:
            record.fail("empty", "the stream ended without text")
        if record.ok and job.expect is not None:
            record.correct = job.expect.casefold() in record.text.casefold()
        return record

    def body(self, job: Job, history: Sequence[Turn] = ()) -> dict[str, Any]:
        """The JSON of a request."""
        body = {"model": self.model, **self._prompt(job, history), "max_tokens": job.output_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        if job.tenant:
            body["user"] = job.tenant
        return body | self._extra | job.extra

    def _prompt(self, job: Job, history: Sequence[Turn]) -> dict[str, Any]:
        if self._endpoint == "completions" and not history:
            return {"prompt": job.prompt if isinstance(job.prompt, str) else list(job.prompt)}
        if self._endpoint == "chat" and job.messages:
            return {"messages": list(job.messages)}
        if not isinstance(job.prompt, str):
            raise ValueError("token ids can neither be sent to the chat endpoint nor follow a reply; use a text prompt")
        if self._endpoint == "completions":
            return {"prompt": "".join(turn.prompt + turn.reply for turn in history) + job.prompt}
        turns = (({"role": "user", "content": t.prompt}, {"role": "assistant", "content": t.reply}) for t in history)
        return {"messages": [*(message for turn in turns for message in turn), {"role": "user", "content": job.prompt}]}

    async def _tries(self, body: bytes, headers: dict[str, str], record: Record) -> None:
        for left in range(self._retries, -1, -1):
            wait = await self._once(body, headers, record)
            if wait is None or not left:
                return
            await asyncio.sleep(wait)
            record.retries += 1
            record.error = record.error_kind = None

    async def _once(self, body: bytes, headers: dict[str, str], record: Record) -> float | None:
        """One try; the seconds to wait before another if the server is too busy."""
        try:
            async with self._session.post(self._url, data=body, headers=headers) as reply:
                record.status = reply.status
                if reply.status == 200:
                    await read_stream(reply.content, record)
                    return None
                record.fail(f"http_{reply.status}", f"HTTP {reply.status}: {_message(await reply.text())}")
                return _wait(reply.headers, record.retries) if reply.status in RETRIED else None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            record.fail("connect", words(error))
        except TimeoutError as error:
            record.fail("timeout", f"no end after {self._timeout.total:g} s ({words(error)})")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.fail("stream", words(error))
        return None


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def words(error: Exception) -> str:
    """An error of the network in one line."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"Connection failed: {error.os_error}"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _message(text: str) -> str:
    try:
        return message_of(json.loads(text))[:300]
    except ValueError:
        return " ".join(text.split())[:300]


def _wait(headers: Mapping[str, str], tries: int) -> float:
    """Seconds that a busy server asks for: `retry-after-ms`, else Retry-After in seconds or as a date, else doubling."""
    wait = 0.5 * 2**tries
    try:
        if "retry-after-ms" in headers:
            wait = float(headers["retry-after-ms"]) / 1e3
        elif after := headers.get("Retry-After"):
            try:
                wait = float(after)
            except ValueError:
                wait = (email.utils.parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # neither a number nor a date
        pass
    return min(max(wait, 0.0), LONGEST_WAIT)


DATA = b"data:"
DONE = b"[DONE]"


async def read_stream(content: aiohttp.StreamReader, record: Record) -> None:
    """Take a stream down to its end. Raises aiohttp's errors, and ValueError for what is no JSON object."""
    parts: list[str] = []
    rest, done = b"", False
    try:
        while piece := await content.readany():
            now = time.perf_counter()
            if record.first_byte is None:
                record.first_byte = now
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                done = _line(line, record, parts, now) or done
        done = _line(rest, record, parts, time.perf_counter()) or done
    finally:
        record.text = "".join(parts)
        if record.tokens_from != "usage":
            record.output_tokens = len(record.chunks)
    if record.error is None and not done and record.finish_reason is None:
        record.fail("stream", "the stream ended without a finish_reason" if record.chunks else "the stream ended without text")


def _line(line: bytes, record: Record, parts: list[str], now: float) -> bool:
    """Take one line down; true for the mark of the end. Anything but data is a comment, or an event's name."""
    if not line.startswith(DATA):
        return False
    payload = line[len(DATA) :].strip()
    if payload == DONE:
        return True
    event = json.loads(payload)
    if not isinstance(event, dict):
        raise ValueError(f"an event is no JSON object: {payload[:80]!r}")
    _event(event, record, parts, now)
    return False


def _event(event: dict[str, Any], record: Record, parts: list[str], now: float) -> None:
    if event.get("error") or event.get("object") == "error":
        record.fail("stream", message_of(event))
        return
    for choice in event.get("choices") or ():
        if reason := choice.get("finish_reason"):
            record.finish_reason = reason
        if text := choice.get("text") or _delta_text(choice.get("delta")):
            record.last = now
            record.chunks.append(now)
            parts.append(text)
    if usage := event.get("usage"):
        _usage(usage, record)


def _delta_text(delta: dict[str, Any] | None) -> str | None:
    """Text of a chat chunk; thinking counts, since the reader sees it come."""
    if not delta:
        return None
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")


def _usage(usage: dict[str, Any], record: Record) -> None:
    record.prompt_tokens = usage.get("prompt_tokens") or 0
    if usage.get("completion_tokens") is not None:
        record.output_tokens, record.tokens_from = usage["completion_tokens"], "usage"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    record.cached_tokens = record.cached_tokens if cached is None else cached
    record.kv = usage.get("kv") or record.kv


def message_of(body: Any) -> str:
    """The message of an error body, in any of the shapes that servers use."""
    if not isinstance(body, dict):
        return str(body)
    error = body.get("error") or body
    found = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    return " ".join(str(found).split())
