"""HTTP that is written beside uvicorn's own: answers where no application is asked, answers that have begun, and bodies without
chunks."""

from __future__ import annotations

import asyncio
import http
import uuid
from typing import Any

from starlette.types import Message

from kvloom.server.errors import WireError

BEGINNING = b"HTTP/1.1 "
"""With which every answer begins."""


def raw_answer(error: WireError) -> bytes:
    """A whole answer, after which the connection is closed."""
    response = error.response({"Connection": "close", "X-Request-Id": uuid.uuid4().hex})
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    status = f"{error.status} {http.HTTPStatus(error.status).phrase}\r\n"
    return BEGINNING + status.encode() + head + b"\r\n" + bytes(response.body)


class BegunTransport:
    """A transport on which the first bytes of the next answer have been sent already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0

    def begin(self) -> bool:
        """Send one byte more of what every answer begins with; False once there is none left."""
        byte = BEGINNING[self._sent : self._sent + 1]
        self._sent += len(byte)
        self._transport.write(byte)
        return bool(byte)

    def write(self, data: bytes) -> None:
        """Send the answer, but for what has been sent of it."""
        self._transport.write(data[self._sent :])
        self._sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def without_chunks(cycle: Any) -> None:
    """Let the answer of a request (uvicorn's cycle) be one that HTTP/1.0 knows: a body of unknown length ends with the
    connection."""
    send, unknown = cycle.send, False

    async def send_plain(message: Message) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            unknown = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if unknown else None
        elif unknown:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain
