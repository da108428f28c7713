"""/v1/responses: create a response, and retrieve, delete and list what was stored of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import Response

from kvloom.engine.errors import InvalidRequestError
from kvloom.server.context import context_of, owner_of
from kvloom.server.conversations import chat_job, chat_prompt, checked_chat, fitted
from kvloom.server.errors import NotStoredError
from kvloom.server.field_names import called
from kvloom.server.respond import arrive, respond
from kvloom.server.responses.answer import ResponseWriter
from kvloom.server.responses.history import History
from kvloom.server.responses.store import Record, listed
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.items import MAX_ID
from kvloom.server.schema.responses import ResponsesBody
from kvloom.server.sse import ClientGoneError


class _IdConvertor(StringConvertor):
    """Whatever may be an id: not the other paths of this module, and none that is OpenAI's and not served."""

    regex = "(?!(?:input_tokens|compact)$)[^/]+"


register_url_convertor("response_id", _IdConvertor())
router = APIRouter(prefix="/v1/responses")

ResponseId = Annotated[str, Path(max_length=MAX_ID)]
NO_CANCEL = "only responses in the background can be cancelled, of which there are none: close the connection to end one"


@router.post("")
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answer what is given, and what was before in the response that it continues."""
    context_of(request).check_model(body.model)
    arrival, history = arrive(request, "resp_"), History.of(request, body)
    try:
        with called(body.names):
            job = await chat_job(request, arrival, await _chat(request, body, history))
            writer = ResponseWriter(body, job, history.keep)
            return await respond(request, job, writer, writer.whole)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it


@router.post("/input_tokens")
async def count_input_tokens(body: ResponsesBody, request: Request) -> Response:
    """How many tokens a response would read. Nothing is generated or stored."""
    context = context_of(request)
    context.check_model(body.model)
    history = History.of(request, body)
    try:
        with called(body.names):
            chat = await _chat(request, body, history)
            prompt = await chat_prompt(context, chat)
    except ClientGoneError:
        return Response(status_code=499)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt.tokens)})


@router.get("/{response_id:response_id}")
async def retrieve_response(
    request: Request, response_id: ResponseId, stream: bool = False, starting_after: int | None = None
) -> Response:
    """A stored response."""
    if stream or starting_after is not None:
        name = "stream" if stream else "starting_after"
        raise InvalidRequestError(f"{name} is given, but a stored response is not streamed; leave it out", name)
    return Response(_stored(request, response_id).response, media_type="application/json")


@router.delete("/{response_id:response_id}")
async def delete_response(request: Request, response_id: ResponseId) -> dict[str, Any]:
    """Forget a stored response."""
    if not context_of(request).responses.delete(owner_of(request), response_id):
        raise _missing(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/{response_id:response_id}/cancel")
async def cancel_response(request: Request, response_id: ResponseId) -> Response:
    """Refused: see `NO_CANCEL`."""
    _stored(request, response_id)
    raise InvalidRequestError(NO_CANCEL, "response_id")


@router.get("/{response_id:response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: ResponseId,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=MAX_ID)] = None,
) -> Response:
    """The items that a stored response answered, those of the responses before it included."""
    entries = _stored(request, response_id).whole_input()
    if order == "desc":
        entries.reverse()
    if after is not None:
        # The last of this id, so that pages come to an end even where a client gave an id twice.
        place = max((index for index, entry in enumerate(entries) if entry.id == after), default=None)
        if place is None:
            raise InvalidRequestError(f"after is {after[:80]!r}, which is no item of this response's input", "after")
        entries = entries[place + 1 :]
    page = entries[:limit]
    ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    told = json.dumps({"object": "list", **ends, "has_more": len(entries) > limit}, separators=(",", ":")).encode()
    return Response(told[:-1] + b',"data":' + listed(page) + b"}", media_type="application/json")


async def _chat(request: Request, body: ResponsesBody, history: History) -> ChatBody:
    """The chat that a request stands for."""
    chat = checked_chat(body.chat(await history.messages(request)))
    return await fitted(request, chat) if body.truncation == "auto" else chat


def _stored(request: Request, response_id: str) -> Record:
    record = context_of(request).responses.find(owner_of(request), response_id)
    if record is None:
        raise _missing(response_id)
    return record


def _missing(response_id: str) -> NotStoredError:
    return NotStoredError(f"no response {response_id[:80]!r} is stored for this key", "response_id", "response_not_found")
