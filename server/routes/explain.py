"""/v1/kv/explain: what a prompt of the caller's would reuse now, and why no more. Runs nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from kvloom.server.context import ServerContext, context_of, tenant_of
from kvloom.server.schema.segments import ExplainBody

router = APIRouter()
SHOWN_TOKENS = 6
"""Tokens at either end of a run that are shown as text."""


@router.post("/v1/kv/explain")
async def explain(body: ExplainBody, request: Request) -> dict[str, Any]:
    """What a prompt of the caller's would reuse now, from which kind of donor, and why no more. Runs nothing."""
    context, tenant = context_of(request), tenant_of(request)
    context.check_model(body.model)
    with context.question(tenant):
        return await _explain(context, await _encoded(context, body), tenant, body.cache_salt)


@router.get("/v1/kv/explain")
async def explain_text(request: Request, prompt: Annotated[str, Query(min_length=1)]) -> dict[str, Any]:
    """The same for a short text in the address."""
    context, tenant = context_of(request), tenant_of(request)
    with context.question(tenant):
        return await _explain(context, await context.prompts.text(prompt), tenant, "")


async def _encoded(context: ServerContext, body: ExplainBody) -> list[int]:
    """Token ids of the prompt or the conversation, as the endpoints for generation encode them."""
    special = body.add_special_tokens
    if body.messages is not None:
        return (await context.prompts.chat(body.conversation(body.messages))).tokens
    if isinstance(body.prompt, str):
        return await context.prompts.text(body.prompt, add_special_tokens=special is not False)
    return list(body.prompt or [])


async def _explain(context: ServerContext, tokens: Sequence[int], tenant: str, salt: str) -> dict[str, Any]:
    context.prompts.check_length(len(tokens))  # nobody could run it, and looking for its segments takes time from everybody
    context.prompts.check(tokens)
    told = dict(await context.client.explain(tokens, tenant=tenant, cache_salt=salt))
    for run in told["runs"]:
        ends = tokens[run["start"] :][:SHOWN_TOKENS], tokens[: run["stop"]][-SHOWN_TOKENS:]
        run["text"] = " ... ".join([await context.prompts.decode(list(end)) for end in ends])
    return told
