"""Server-sent events as OpenAI clients read them, and the race against clients that leave.

An event is `data: ` (with the space: clients strip that very prefix), JSON on one line, and an empty line. There are no event
names, comments or keep-alives, since strict clients parse every line. The answer begins with the first token: until then an
error still has its HTTP status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING_SECONDS = 15.0
"""Of silence, after which a ping is sent where the protocol has one; it may be twice as long."""

log = logging.getLogger("kvloom.server")

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; nobody waits for an answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, `work` is cancelled and waited for, and ClientGoneError raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def waiting_told(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The items, with a None in front if the first one has not come in PING_SECONDS. Closes `items` however it ends."""
    first = asyncio.ensure_future(anext(items))
    try:
        if not (await asyncio.wait((first,), timeout=PING_SECONDS))[0]:
            yield None
        try:
            yield await first
        except StopAsyncIteration:
            return
        async for item in items:
            yield item
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await items.aclose()


class EventStream(Response):
    """A stream that has begun: its first events are there, the rest comes. Closes `events` however it ends.

    ping: events to send whenever none came for PING_SECONDS; empty for nothing."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], ping: bytes = b""
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._ping = ping
        self._silent = False
        """Whether nothing was sent since a ping was last thought of."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except ClientGoneError:
            log.debug("a client left its stream")
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        pinging = asyncio.ensure_future(self._pings(send)) if self._ping else None
        try:
            # Events that are ready together go out in one system call: no await below waits then, and uvloop joins the writes.
            async for data in self._events:
                self._silent = False
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            if pinging is not None:
                pinging.cancel()
                await asyncio.gather(pinging, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pings(self, send: Send) -> None:
        """Every message that is sent holds whole events, so a ping may stand between any two."""
        while True:
            self._silent = True
            await asyncio.sleep(PING_SECONDS)
            if self._silent:
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
