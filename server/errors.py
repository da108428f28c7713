"""Every error on the wire, in the one shape that OpenAI clients understand, also inside a stream:

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Validation is 400, never 422: clients are built for that. Messages never hold a whole body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvloom.engine.bounds import shown
from kvloom.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    KVLoomError,
    ModelNotFoundError,
    OverloadedError,
)
from kvloom.server.methods import methods_of
from kvloom.server.refusals import Refusals
from kvloom.server.schema.problem import KIND
from kvloom.server.unserved import HEADERS, unserved

log = logging.getLogger("kvloom.server")

MAX_MESSAGE = 600
"""Characters of a message; the rest is cut, since it may quote what the client sent."""

MAX_PARAM = 200

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_BOUNDS = {"greater_than_equal": "ge", "less_than_equal": "le"}
_WAYS = {"greater_than_equal": "more", "less_than_equal": "less"}
"""By pydantic's name of an error: where it says the bound, and which way allowed numbers lie."""


class GenerationError(KVLoomError):
    """The engine could not finish a request: an error of its own, not of the caller."""


class ServerClosingError(KVLoomError):
    """The request was ended because the server is shutting down, or by an operator."""


class OperatorOnlyError(KVLoomError):
    """What is asked for concerns all tenants, and the caller is one of them."""


class NotStoredError(KVLoomError):
    """No response of this id is stored for whoever asks. `param` names the field that held the id; `status` is 404, or 400
    where OpenAI says so."""

    def __init__(self, message: str, param: str = "", code: str = "", status: int = 404) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def _encodable(text: str) -> str:
    """Text with halves of surrogate pairs, which JSON can write and UTF-8 cannot, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class WireError(NamedTuple):
    """An error as clients see it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    kind: str | None = None
    """Its type, where that is not the one of its status."""

    def body(self) -> dict[str, Any]:
        """The JSON object, without its status. It can be encoded whatever the client sent."""
        kind = self.kind or _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[: MAX_MESSAGE - 3] + "..."
        param = None if self.param is None else _encodable(self.param[:MAX_PARAM])
        return {"error": {"message": _encodable(message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up, where a retry makes sense."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status, headers={**self.headers(), **(headers or {})})


def wire_error(error: BaseException) -> WireError:
    """How an exception is told to clients. What was not raised on purpose is a 500 that gives nothing away."""
    match error:
        case InvalidRequestError():
            code = error.code if isinstance(error, ContextLengthError) else None
            return WireError(400, str(error), error.param, code)
        case OperatorOnlyError():
            return WireError(403, str(error), code="admin_only")
        case ModelNotFoundError():
            return WireError(404, str(error), "model", "model_not_found", kind="invalid_request_error")
        case NotStoredError():
            return WireError(error.status, str(error), error.param, error.code)
        case OverloadedError():
            return WireError(429, str(error), code="overloaded", retry_after=error.retry_after)
        case EngineDeadError():
            return WireError(503, str(error), code="engine_dead")
        case ServerClosingError():
            return WireError(503, str(error), code="shutting_down")
        case GenerationError():
            return WireError(500, str(error), code="generation_failed")
    return WireError(500, "internal error; the server's log says more", code="internal_error")


def sse_error(error: BaseException) -> bytes:
    """An error as an event of a stream that has begun."""
    return b"data: " + json.dumps(wire_error(error).body(), separators=(",", ":")).encode() + b"\n\n"


def install(app: FastAPI) -> None:
    """Answer every exception of `app` in the one shape."""
    app.state.refusals = Refusals()
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(KVLoomError, _on_known)
    app.add_exception_handler(Exception, _on_unknown)


def _answer(request: Request, error: WireError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    request.app.state.context.metrics.refused(error.status)
    return error.response(headers)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(request, validation_error(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = methods_of(request.app.routes, request.scope) if error.status_code == 405 else []
    if request.method == "OPTIONS" and allowed:
        return Response(status_code=204, headers={"Allow": ", ".join(allowed)})
    if error.status_code == 404:
        why = unserved(request.app.routes, request.scope)
        return _answer(request, WireError(why.status, why.message, code=why.code), HEADERS if why.status == 501 else None)
    headers = {**(error.headers or {}), "Allow": ", ".join(allowed)} if allowed else error.headers
    what = f"this path has no such method: {request.method} {request.url.path}" if allowed else error.detail
    return _answer(request, WireError(error.status_code, str(what)), headers)


async def _on_known(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OverloadedError):
        await asyncio.sleep(request.app.state.refusals.delay(getattr(request.state, "tenant", "")))
    return _answer(request, wire_error(error))


async def _on_unknown(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, and uvicorn logs it with its traceback. It stands outside all middleware.
    name = getattr(request.state, "request_id", "")
    return _answer(request, wire_error(error), {"Connection": "close", "X-Request-Id": name})


def validation_error(errors: Sequence[Mapping[str, Any]]) -> WireError:
    """One error for what pydantic found: its first finding, in the caller's terms."""
    first = errors[0]
    path = [part for part in first["loc"][1:] if not (isinstance(part, str) and part.startswith("<"))]
    param = _dotted(path)
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        where = first["loc"][-1]
        return WireError(400, f"the body is not JSON: {first['ctx']['error']} at character {where}", code="invalid_json")
    if not path and kind in ("model_attributes_type", "model_type", "missing"):
        return WireError(400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    if kind == KIND:
        param = _dotted([*path, first["ctx"]["param"]])
        return WireError(400, message, param)
    if kind == "missing":
        message = "this field is required"
    elif kind == "extra_forbidden":
        message = "unknown key"
    elif kind == "literal_error":
        message = f"is {shown(first['input'])}; allowed: {first['ctx']['expected']}"
    elif kind in _BOUNDS and param:
        bound = first["ctx"][_BOUNDS[kind]]
        return WireError(400, f"{param} is {first['input']}; allowed: {bound} or {_WAYS[kind]}", param)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    colon = "" if message.startswith("is ") else ":"
    return WireError(400, f"{param}{colon} {message}{more}" if param else message, param or None)


def _dotted(path: Sequence[str | int]) -> str:
    """messages[0].content from ("messages", 0, "content")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
