"""Bounds on what a client may send before anything looks at it: body bytes and header bytes.

A body that is too long is never held in memory. It is answered with 413 and then read and thrown away for a moment: a
connection closed under a client that is still sending would show it a reset instead of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvloom.server.errors import WireError

MAX_HEADER_BYTES = 64 * 1024
LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024**2


class BodyLimitMiddleware:
    """Refuses bodies above a limit: at once where Content-Length tells, else when the limit is passed."""

    def __init__(self, app: ASGIApp, limit: int, refused: Callable[[int], None]) -> None:
        self.app = app
        self._limit = limit
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = _header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > self._limit:
            await self._refuse(scope, receive, send)
        elif declared is not None or _header(scope, b"transfer-encoding") is None:
            await self.app(scope, receive, send)  # the parser holds a body to its Content-Length
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A chunked body has no stated length: read it here, within the limit, and replay it."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._limit:
                await self._refuse(scope, receive, send)
                return
        body: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = body, None
            return message

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = WireError(
            413, f"the body is larger than {self._limit} bytes; send less, or raise --max-body", code="body_too_large"
        )
        self._refused(error.status)
        response = error.response({"Connection": "close"})
        await send({"type": "http.response.start", "status": 413, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        if _header(scope, b"expect") is None:  # a client that asked first has not begun to send
            await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


async def _discard(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        pass


async def _refuse_headers(scope: Scope, receive: Receive, send: Send) -> None:
    await _HEADERS_TOO_LARGE.response({"Connection": "close"})(scope, receive, send)


_RAW_431 = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_HEADERS_TOO_LARGE = WireError(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes", code="headers_too_large")


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on the request line and headers, which httptools lacks."""

    _in_head = False
    _head_bytes = 0

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self.app: Any = _refuse_headers
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:  # still no end of the headers in sight
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self.transport.write(_RAW_431)
                self.transport.close()
                self._in_head = False
