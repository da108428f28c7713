"""A small OpenAI-compatible server in a thread, which misbehaves in the way a test asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web


@dataclass
class FakeServer:
    """Answers each request with `max_tokens` tokens "w0 ", "w1 ", ... and notes what it was sent."""

    models: tuple[str, ...] = ("fake",)
    keys: tuple[str, ...] = ()
    """Bearer tokens that are let in; none lets all in."""
    trusting: bool = True
    """Whether it takes tenants' names from us."""
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of refusals, used up one by one by generation requests."""
    delay: float = 0.001
    """Seconds before each chunk."""
    hold: int = 0
    """Nobody gets text until so many requests are or were under way at once."""
    tokens_per_chunk: int = 1
    usage: bool = True
    cached: int = 1
    break_after: int | None = None
    """Chunks after which the connection is cut."""
    die_after: int | None = None
    """Generation requests after which nothing listens any more and open connections are cut."""
    on_request: Callable[[int], None] = lambda number: None
    """Called with the number of requests so far."""
    metrics: str | None = None
    """Prometheus text, with {n} for the number of requests so far."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of generation requests, with their headers under `headers`."""
    under_way: int = 0
    most: int = 0

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return self._refused(request) or web.json_response({"data": [{"id": name} for name in self.models]})

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.metrics is None:
            return web.Response(status=404)
        return web.Response(text=self.metrics.replace("{n}", str(len(self.seen))))

    def _refused(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.keys and given not in self.keys:
            return web.json_response({"error": {"message": "the API key is not known here"}}, status=401)
        return None

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.seen.append({**body, "headers": dict(request.headers)})
        self.on_request(len(self.seen))
        if not self.trusting and "X-KVLoom-Tenant" in request.headers:
            message = "X-KVLoom-Tenant is taken from trusted proxies only"
            return web.json_response({"error": {"message": message}}, status=403)
        if self.refusals:
            status, headers = self.refusals.pop(0)
            return web.json_response({"error": {"message": f"status {status}, as told"}}, status=status, headers=headers)
        if body["model"] not in self.models:
            return web.json_response({"error": {"message": f"no model {body['model']} here"}}, status=404)
        if self.die_after is not None and len(self.seen) > self.die_after:
            await self._site.stop()
            for connection in list(self._runner.server.connections if self._runner.server else ()):
                if connection.transport:
                    connection.transport.abort()
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self._stream(request, body)
        finally:
            self.under_way -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat, count = request.path.endswith("chat/completions"), body["max_tokens"]
        while self.most < self.hold:
            await asyncio.sleep(0.005)
        for sent, begin in enumerate(range(0, count, self.tokens_per_chunk)):
            await asyncio.sleep(self.delay)
            if sent == self.break_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            end = min(begin + self.tokens_per_chunk, count)
            text = "".join(f"w{i} " for i in range(begin, end))
            choice = {"delta": {"content": text}} if chat else {"text": text}
            await self._event(response, {"choices": [choice | {"finish_reason": "length" if end == count else None}]})
        if self.usage:
            size = len(body.get("prompt") or body["messages"])
            details = {"cached_tokens": self.cached}
            usage = {
                "prompt_tokens": size,
                "completion_tokens": count,
                "prompt_tokens_details": details,
                "kv": {"reused": {"a": 2}},
            }
            await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A running fake server; set its fields before sending."""
    fake = FakeServer()
    fake.start()
    yield fake
    fake.stop()
