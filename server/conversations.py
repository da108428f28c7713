"""From a chat's body to a job: the conversation written out, and what is looked for in its answers.

Every endpoint that speaks of conversations translates its own body to a `ChatBody` and goes through here, so that templates,
calls, thoughts, constraints and limits are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.server.answers.choose import shown_tokens
from kvloom.server.context import ServerContext, context_of
from kvloom.server.errors import validation_error
from kvloom.server.prompts import ChatPrompt
from kvloom.server.respond import Arrival, Job, make_job
from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.chat_messages import Message


def checked_chat(fields: Mapping[str, Any]) -> ChatBody:
    """A chat's body from another endpoint's. Raises InvalidRequestError in the chat's words."""
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        found = validation_error([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])
        raise InvalidRequestError(found.message, found.param) from None


async def chat_prompt(context: ServerContext, body: ChatBody) -> ChatPrompt:
    """A conversation written out and encoded, as every endpoint that counts or runs it does. Raises what `PromptEncoder.chat`
    does."""
    encoder = context.prompts.truncating(body.truncate_prompt_tokens, body.truncation_side, body.token_limit)
    return await encoder.chat(body.conversation(body.messages))


async def chat_job(request: Request, arrival: Arrival, body: ChatBody, most_tokens: int | None = None) -> Job:
    """A conversation, ready to run with `respond`. most_tokens: of an answer without max_tokens, where the context has room for
    so many. Raises InvalidRequestError for what cannot be served, and what `PromptEncoder.chat` does."""
    context = context_of(request)
    defaults = context.client.model.sampling
    sampling = body.params(defaults)
    if most_tokens is not None:
        sampling = replace(sampling, default_tokens=defaults.limited(most_tokens))
    prompt = await chat_prompt(context, body)
    asked = sampling.structured
    expected = context.answers.expected(body, prompt.end, constrained=asked is not None)
    if expected is not None:
        tokenizer = context.client.tokenizer
        structured = context.answers.constraint(body, tokenizer, prompt.end, asked)
        if asked is not None and structured is asked:
            expected = None
        else:
            sampling = replace(sampling, shown_special_tokens=shown_tokens(tokenizer, expected), structured=structured)
    return make_job(request, arrival, body, sampling, [prompt.tokens], expected=expected)


async def fitted(request: Request, body: ChatBody) -> ChatBody:
    """The conversation without as many of its oldest turns as make it longer than the context, the answer's `max_tokens`
    included. What the system says at the beginning stays, and so does the last turn of a user and what follows it."""
    prompts, limit = context_of(request).prompts, context_of(request).prompts.max_model_len - (body.token_limit or 1)
    heads = next((i for i, one in enumerate(body.messages) if one.role not in ("system", "developer")), len(body.messages))
    starts = [i for i, one in enumerate(body.messages) if i >= heads and one.role == "user"]

    async def fits(messages: list[Message]) -> bool:
        try:
            return len((await prompts.chat(body.conversation(messages))).tokens) <= limit
        except ContextLengthError:
            return False

    if not starts or await fits(body.messages):
        return body
    fewest, most = 0, len(starts) - 1  # that many turns are left out
    while fewest < most:
        middle = (fewest + most) // 2
        if await fits(body.messages[:heads] + body.messages[starts[middle] :]):
            most = middle
        else:
            fewest = middle + 1
    return body.model_copy(update={"messages": body.messages[:heads] + body.messages[starts[most] :]})
