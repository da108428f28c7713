"""Requests to an ASGI application in this process, by a client that may leave at any byte."""

from __future__ import annotations

import asyncio
import faulthandler
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message

WAITS = 4
"""A machine that is paused meanwhile lets one wait pass at once, which is no hang."""


class HangError(AssertionError):
    """A request did not end."""


@dataclass(slots=True)
class Reply:
    """What was received of an answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: bool = False
    """Whether the client left before its end."""

    @property
    def text(self) -> str:
        """The body; raises UnicodeDecodeError where it is none."""
        return self.body.decode()

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


async def ask(
    app: ASGIApp, method: str, url: str, body: Any = None, *, headers: Mapping[str, str] = {}, leave_after: int | None = None,
    seconds: float = 60.0,
) -> Reply:  # fmt: skip
    """One request. leave_after: the client leaves once so many messages came, 0 for before the first. Raises HangError where
    the application does not return in time, and says on stderr what every thread does."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = urlsplit(url)
    given = {"host": "localhost", "content-type": "application/json", "content-length": str(len(data)), **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "root_path": "",
        "path": parts.path, "raw_path": parts.path.encode(), "query_string": parts.query.encode(), "client": ("127.0.0.1", 1),
        "server": ("localhost", 80), "headers": [(name.lower().encode(), text.encode()) for name, text in given.items()],
    }  # fmt: skip
    reply, gone, sent, count = Reply(), asyncio.Event(), False, 0
    if leave_after == 0:
        gone.set()

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal count
        count += 1
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif not gone.is_set():
            reply.body += message.get("body", b"")
        if leave_after is not None and count >= leave_after:
            gone.set()
        await asyncio.sleep(0)

    task = asyncio.ensure_future(app(scope, receive, send))
    try:
        for _ in range(WAITS):
            if (await asyncio.wait([task], timeout=seconds / WAITS))[0]:
                break
        else:
            faulthandler.dump_traceback()
            raise HangError(f"{method} {url} does not end: {data[:300]!r}")
        await task
    finally:
        task.cancel()
    reply.cut = gone.is_set()
    return reply
