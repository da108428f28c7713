"""From a chat's body to a job: the conversation written out, and what is looked for in its answers.

Every endpoint that speaks of conversations translates its own body to a `ChatBody` and goes through here, so that templates,
calls, thoughts, constraints and limits are the same for all.
"""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request

from kvloom.server.answers.choose import shown_tokens
from kvloom.server.context import context_of
from kvloom.server.respond import Arrival, Job, make_job
from kvloom.server.schema.chat import ChatBody


async def chat_job(request: Request, arrival: Arrival, body: ChatBody) -> Job:
    """A conversation, ready to run with `respond`. Raises InvalidRequestError for what cannot be served, and what
    `PromptEncoder.chat` does."""
    context = context_of(request)
    sampling = body.params(context.client.model.sampling)
    encoder = context.prompts.truncating(body.truncate_prompt_tokens, body.truncation_side, body.token_limit)
    prompt = await encoder.chat(body.conversation(body.messages))
    expected = context.answers.expected(body, prompt.end)
    if expected is not None:
        tokenizer, asked = context.client.tokenizer, sampling.structured
        structured = context.answers.constraint(body, tokenizer, prompt.end, asked)
        if asked is not None and structured is asked:
            expected = None
        else:
            sampling = replace(sampling, shown_special_tokens=shown_tokens(tokenizer, expected), structured=structured)
    return make_job(request, arrival, body, sampling, [prompt.tokens], expected=expected)
