"""The outermost layer: a name for every request, on every answer, and a line in the log for each that is refused.

    X-Request-Id    what the client sent, if that is harmless, else one that is made here
    the log         abc1 POST /v1/completions status=400 error=context_length_exceeded
                    the path without its query, never a part of a body or a message: those quote what clients send

A slash at the end of a path means nothing: no redirect, which clients follow without their body, or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.server.logs import fields

HEADER = b"x-request-id"
MAX_PATH = 200
"""Characters of a path that are logged."""
GONE = 499
"""The status of answers that nobody reads."""
_HARMLESS = re.compile(rb"[A-Za-z0-9._:-]{1,64}\Z")

log = logging.getLogger("kvloom.access")


def client_id(scope: Scope) -> str:
    """The client's own name of a request; "" if there is none that may stand in headers and logs."""
    given: bytes = next((value for name, value in scope["headers"] if name == HEADER), b"")
    return given.decode() if _HARMLESS.match(given) else ""


class RequestIdMiddleware:
    """Names requests (`scope["state"]["request_id"]`) and tells of those that are refused."""

    def __init__(self, app: ASGIApp, *, logs: bool = True) -> None:
        """logs: whether refusals are logged."""
        self.app = app
        self._logs = logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = client_id(scope) or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        path = scope["path"]
        if path.endswith("/"):
            scope["path"] = path.rstrip("/") or "/"
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status, name
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                own = next((value for key, value in headers if key.lower() == HEADER), None)
                if own is None:
                    name = scope["state"]["request_id"]  # generation has given it that of its answer
                    message = {**message, "headers": [*headers, (HEADER, name.encode())]}
                else:
                    name = own.decode()
            elif status >= 400 and status != GONE:
                self._refused(name, scope["method"], path, status, message.get("body", b""))
                status = 0
            await send(message)

        await self.app(scope, receive, send_named)

    def _refused(self, name: str, method: str, path: str, status: int, body: bytes) -> None:
        if self._logs:
            level = logging.INFO if status < 500 else logging.WARNING
            method, path, kind = method[:16], quote(path)[:MAX_PATH], _kind(body)
            told = fields(request_id=name, method=method, path=path, status=status, error=kind)
            log.log(level, "%s %s %s status=%d error=%s", name, method, path, status, kind, extra=told)


def _kind(body: bytes) -> str:
    """The code of an error, or its type where it has none."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "-"
