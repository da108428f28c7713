"""Errors as Anthropic's clients read them, on the paths that these clients ask:

    {"type": "error", "error": {"type": ..., "message": ...}, "request_id": ...}

These are the paths of messages, and those of models for whoever sends anthropic-version, as Anthropic's clients do. Whoever
refuses a request, be it a route or a layer in front of all routes, does so in the one shape of `errors`; here it is
translated on its way out, and every answer gets the header request-id.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.server.errors import WireError, wire_error
from kvloom.server.field_names import Names, renamed

PATH, MODELS = "/v1/messages", "/v1/models"
OVERLOADED = 529
"""Anthropic's status for a server that cannot answer anybody for now; 503 elsewhere."""
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error(error: Exception, names: Names, request_id: str) -> dict[str, Any]:
    """An error inside a stream."""
    wire = wire_error(renamed(error, names))
    return _translated(wire.status, wire.body()["error"], request_id)


def _translated(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": _message(error)}, "request_id": request_id}


def _message(error: Mapping[str, Any]) -> str:
    """The message, with the name of the field to blame, for which there is no place of its own."""
    message, param = str(error["message"]), str(error["param"] or "")
    if error["code"] == "context_length_exceeded":
        return f"prompt is too long: {message}"  # by which clients know it
    return message if not param or param in message else f"{param}: {message}"


class MessageErrorMiddleware:
    """Translates errors of these paths, and names every answer of theirs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _asks_as_anthropic(scope):
            await self.app(scope, receive, send)
            return
        translator = _Translator(send, scope.setdefault("state", {}))
        try:
            await self.app(scope, receive, translator.send)
        except Exception as error:
            if not translator.begun:
                await translator.response(wire_error(error))
            raise  # to be counted and logged


def _asks_as_anthropic(scope: Scope) -> bool:
    """Whether the client reads errors as Anthropic writes them."""
    paths = [PATH]
    if any(name == b"anthropic-version" for name, _ in scope["headers"]):
        paths.append(MODELS)
    return any(scope["path"] == path or scope["path"].startswith(path + "/") for path in paths)


class _Translator:
    """Sends one answer."""

    def __init__(self, send: Send, state: dict[str, Any]) -> None:
        self.begun = False
        self._send = send
        self._state = state
        self._held: Message | None = None
        """The beginning of an error, until its body is there."""

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        self.begun = True
        if message["type"] == "http.response.start":
            message = {**message, "headers": self._named(message)}
            if message["status"] >= 400 and _is_json(message):
                self._held = message
                return
        elif self._held is not None:
            held, self._held = self._held, None
            body = _retold(held["status"], message.get("body", b""), self._name(held))
            await self._send(_sized(held, len(body)))
            message = {**message, "body": body}
        await self._send(message)

    async def response(self, error: WireError) -> None:
        """A whole answer of an error."""
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})

    def _named(self, message: Message) -> list[tuple[bytes, bytes]]:
        headers = list(message.get("headers", ()))
        own = _header(message, b"x-request-id").decode("latin-1")
        name = own or self._state.setdefault("request_id", uuid.uuid4().hex)
        return [*headers, (b"request-id", name.encode("latin-1"))]

    def _name(self, message: Message) -> str:
        return _header(message, b"request-id").decode("latin-1")


def _header(message: Message, name: bytes) -> bytes:
    return next((bytes(value) for key, value in message["headers"] if key.lower() == name), b"")


def _is_json(message: Message) -> bool:
    return _header(message, b"content-type").startswith(b"application/json")


def _sized(start: Message, size: int) -> Message:
    status = OVERLOADED if start["status"] == 503 else start["status"]
    kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
    return {**start, "status": status, "headers": [*kept, (b"content-length", str(size).encode())]}


def _retold(status: int, body: bytes, request_id: str) -> bytes:
    if not body:  # of a HEAD
        return body
    error = json.loads(body)["error"]
    return json.dumps(_translated(status, error, request_id), separators=(",", ":")).encode()
