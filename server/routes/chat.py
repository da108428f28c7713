"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.engine.requests.request import TokenLogprob
from kvloom.server.context import context_of
from kvloom.server.conversations import chat_job
from kvloom.server.logprobs import chat_logprobs, prompt_logprobs
from kvloom.server.pieces import Choice
from kvloom.server.replies import CHAT
from kvloom.server.respond import Job, arrive, respond
from kvloom.server.schema.chat import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Continue a conversation."""
    context = context_of(request)
    context.check_model(body.model)
    job = await chat_job(request, arrive(request, CHAT.id_prefix), body)

    def written(index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return _logprobs(context.client.tokenizer, body, logprobs)

    def whole(choices: Sequence[Choice]) -> dict[str, Any]:
        return _whole(job, body, choices)

    return await respond(request, job, job.chunks(CHAT, written if body.logprobs else None), whole)


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
    return job.whole(CHAT, choices, written, **more)
