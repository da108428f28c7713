"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.engine.requests.request import TokenLogprob
from kvloom.server.answers.choose import shown_tokens
from kvloom.server.context import context_of
from kvloom.server.logprobs import chat_logprobs, prompt_logprobs
from kvloom.server.replies import CHAT, Choice, whole_body
from kvloom.server.respond import Job, arrive, make_job, respond
from kvloom.server.schema.chat import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Continue a conversation."""
    context = context_of(request)
    context.check_model(body.model)
    arrival, sampling = arrive(request, CHAT), body.params(context.client.model.sampling)
    encoder = context.prompts.truncating(body.truncate_prompt_tokens, body.truncation_side, body.token_limit)
    prompt = await encoder.chat(body.conversation(body.messages))
    expected = context.answers.expected(body, prompt.end)
    if expected is not None:
        tokenizer = context.client.tokenizer
        asked = sampling.structured
        structured = context.answers.constraint(body, tokenizer, prompt.end, asked)
        if asked is not None and structured is asked:
            expected = None
        else:
            sampling = replace(sampling, shown_special_tokens=shown_tokens(tokenizer, expected), structured=structured)
    job = make_job(request, arrival, body, sampling, [prompt.tokens], expected=expected)

    def written(index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return _logprobs(context.client.tokenizer, body, logprobs)

    def whole(choices: Sequence[Choice]) -> dict[str, Any]:
        return _whole(job, body, choices)

    return await respond(request, job, written if body.logprobs else None, whole)


def _logprobs(tokenizer: Any, body: ChatBody, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return chat_logprobs(tokenizer, logprobs, body.told_logprobs, as_ids=body.return_tokens_as_token_ids)


def _whole(job: Job, body: ChatBody, choices: Sequence[Choice]) -> dict[str, Any]:
    tokenizer = job.context.client.tokenizer
    written = [
        {
            "index": index,
            "message": choice.message(),
            "logprobs": _logprobs(tokenizer, body, choice.logprobs) if body.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        for index, choice in enumerate(choices)
    ]
    more = {}
    if body.prompt_logprobs is not None and choices[0].prompt_logprobs is not None:
        more["prompt_logprobs"] = prompt_logprobs(tokenizer, choices[0].prompt_logprobs, body.prompt_logprobs)
    return whole_body(job.envelope, written, job.usage, **more)
