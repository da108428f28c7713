"""/v1/kv/segments: texts to compile alone, so that prompts that hold them can reuse their KV; and to forget them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.server.context import ServerContext, context_of, new_id, tenant_of
from kvloom.server.errors import GenerationError, ServerClosingError
from kvloom.server.schema.segments import SegmentsBody
from kvloom.server.sse import ClientGoneError, unless_gone

router = APIRouter()


@router.post("/v1/kv/segments")
async def compile_segments(body: SegmentsBody, request: Request) -> Response:
    """Compile texts alone and keep their KV for prompts that hold them. Answers once that is done.

    Counts are of what is new: text that is known already, or too short to be found, is not stored.
    """
    context = context_of(request)
    context.check_model(body.model)
    given = await _texts(context, body)
    try:
        stored = await unless_gone(request.receive, _compile_all(context, given, body, tenant_of(request)))
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it
    totals = {name: sum(int(one.get(name, 0)) for one in stored) for name in ("segments", "tokens", "bytes")}
    return JSONResponse({"object": "kv.segments", "scope": body.scope, "given_tokens": sum(map(len, given.values())), **totals})


@router.delete("/v1/kv/segments")
async def purge_segments(request: Request) -> dict[str, Any]:
    """Forget every segment that the caller's tenant owns, whatever its scope."""
    return {"object": "kv.segments", "deleted": await context_of(request).client.purge(tenant_of(request))}


async def _texts(context: ServerContext, body: SegmentsBody) -> dict[str, list[int]]:
    """Token ids of every text, under the name of its field. Raises InvalidRequestError."""
    if body.tokens is not None:
        context.prompts.check_length(len(body.tokens), "tokens")
        context.prompts.check(body.tokens, "tokens")
        return {"tokens": body.tokens}
    texts = {"text": body.text} if body.text is not None else {f"texts[{i}]": text for i, text in enumerate(body.texts or ())}
    for name, text in texts.items():
        context.prompts.check_text(text, name)
    return dict(zip(texts, await context.prompts.texts(list(texts.values()), add_special_tokens=False)))


async def _compile_all(
    context: ServerContext, given: Mapping[str, Sequence[int]], body: SegmentsBody, tenant: str
) -> list[dict[str, Any]]:
    """One after the other: what is compiled should not crowd out requests. An error names the text."""
    stored = []
    for name, tokens in given.items():
        try:
            stored.append(await _compile(context, tokens, body, tenant))
        except InvalidRequestError as error:
            error.param = name if error.param == "prompt" else error.param
            raise
    return stored


async def _compile(context: ServerContext, tokens: Sequence[int], body: SegmentsBody, tenant: str) -> dict[str, Any]:
    """Returns what was stored."""
    stream = context.client.generate(
        tokens,
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        request_id=new_id(),
        kv=KVOptions(segment=body.scope),
        tenant=tenant,
        cache_salt=body.cache_salt,
    )
    stored: dict[str, Any] = {}
    async with aclosing(cast(Any, stream)) as outputs:
        async for output in outputs:
            if output.finish_reason == "error":
                raise GenerationError(f"compiling failed: {output.error or 'the engine gives no reason'}")
            if output.finish_reason == "abort":
                raise ServerClosingError("the text was not compiled: the server is shutting down; try again")
            if output.finish_reason is not None:
                stored = dict(output.usage.explanation or {})
                break
    return stored
