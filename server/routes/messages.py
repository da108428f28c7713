"""POST /v1/messages and /v1/messages/count_tokens, for Anthropic's clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.server.context import ServerContext, context_of
from kvloom.server.conversations import chat_job, chat_prompt
from kvloom.server.field_names import called
from kvloom.server.messages.chats import chat_body
from kvloom.server.messages.replies import PING, MessageWriter, whole_message
from kvloom.server.pieces import Choice
from kvloom.server.respond import arrive, respond
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.messages import MessagesBody, MessagesFields

router = APIRouter()
ID_PREFIX = "msg_"


@router.post("/v1/messages")
async def messages(body: MessagesBody, request: Request) -> Response:
    """Continue a conversation, as Anthropic's API does."""
    context, arrival = context_of(request), arrive(request, ID_PREFIX)
    context.check_model(body.model)
    with called(body.names):
        job = await chat_job(request, arrival, _chat(context, body), body.max_tokens)

        def whole(choices: Sequence[Choice]) -> dict[str, Any]:
            return whole_message(job, choices[0], omits=body.omits_thoughts)

        writer = MessageWriter(job, body.names, omits=body.omits_thoughts)
        return await respond(request, job, writer, whole, PING)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesFields, request: Request) -> dict[str, int]:
    """How many tokens the prompt of a conversation has, those in the cache included. Runs nothing."""
    context = context_of(request)
    context.check_model(body.model)
    return {"input_tokens": len((await chat_prompt(context, _chat(context, body))).tokens)}


def _chat(context: ServerContext, body: MessagesFields) -> ChatBody:
    return chat_body(body, context.prompts.template.variables, reasons=context.answers.reasoning is not None)
