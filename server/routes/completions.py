"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.engine.requests.request import TokenLogprob
from kvloom.server.context import ServerContext, context_of
from kvloom.server.echo import Echo
from kvloom.server.logprobs import Echoed, LegacyLogprobs, prompt_logprobs
from kvloom.server.pieces import Choice
from kvloom.server.replies import COMPLETION
from kvloom.server.respond import Job, arrive, make_job, respond
from kvloom.server.schema.completions import CompletionBody

router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue texts or token ids."""
    context = context_of(request)
    context.check_model(body.model)
    arrival, sampling = arrive(request, COMPLETION.id_prefix), body.params(context.client.model.sampling)
    prompts = await _encoded(context, body)
    echo = Echo(await _echoed(context, body, prompts), body.n, only=body.echo_only) if body.echo else None
    job = make_job(request, arrival, body, sampling, prompts, adjust=echo)
    writers = [_writer(job, body, echo, index) for index in range(job.work.completions)]

    def written(index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return writers[index].take(tokens, logprobs)

    def whole(choices: Sequence[Choice]) -> dict[str, Any]:
        bodies = [_choice(job, body, index, choice, writers[index]) for index, choice in enumerate(choices)]
        return job.whole(COMPLETION, choices, bodies)

    return await respond(request, job, job.chunks(COMPLETION, None if body.logprobs is None else written), whole)


def _choice(job: Job, body: CompletionBody, index: int, choice: Choice, writer: LegacyLogprobs) -> dict[str, Any]:
    written: dict[str, Any] = {
        "index": index,
        "text": choice.text,
        "logprobs": None if body.logprobs is None else writer.take(choice.tokens, choice.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if body.prompt_logprobs is not None and choice.prompt_logprobs is not None:
        tokenizer = job.context.client.tokenizer
        written["prompt_logprobs"] = prompt_logprobs(tokenizer, choice.prompt_logprobs, body.prompt_logprobs)
    return written


async def _encoded(context: ServerContext, body: CompletionBody) -> list[list[int]]:
    """Token ids of all prompts. Lengths are checked before anything is made of them."""
    prompts = body.prompts()
    encoder = context.prompts.truncating(body.truncate_prompt_tokens, body.truncation_side, body.token_limit)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await encoder.texts(texts, add_special_tokens=body.add_special_tokens)
    ids = [encoder.cut(prompt) for prompt in prompts if not isinstance(prompt, str)]
    for prompt in ids:
        context.prompts.check_length(len(prompt))
    return ids


def _writer(job: Job, body: CompletionBody, echo: Echo | None, index: int) -> LegacyLogprobs:
    return LegacyLogprobs(
        job.context.client.tokenizer,
        body.told_logprobs,
        prompt=job.work.prompt_of(index),
        echoed=None if echo is None else echo.prompt_of(index),
        skip_special_tokens=body.skip_special_tokens,
        as_ids=body.return_tokens_as_token_ids,
    )


async def _echoed(context: ServerContext, body: CompletionBody, prompts: list[list[int]]) -> list[Echoed]:
    """What is put in front: a text as it was given, token ids decoded as the completion will be."""
    given: list[Any] = list(body.prompts())
    return [await _echoed_one(context, body, prompt, tokens) for prompt, tokens in zip(given, prompts)]


async def _echoed_one(context: ServerContext, body: CompletionBody, prompt: str | list[int], tokens: list[int]) -> Echoed:
    if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
        return Echoed(prompt, tokens, given=True)
    text = await context.prompts.decode(tokens, skip_special_tokens=body.skip_special_tokens, open_end=not body.echo_only)
    return Echoed(text, tokens, given=False)
