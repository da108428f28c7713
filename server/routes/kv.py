"""/v1/kv: what the KV cache holds and what it was good for; texts to compile for reuse; what a prompt would reuse."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request

from kvloom.engine.client import EngineStats, MethodStats, ShareStats
from kvloom.engine.request import KVOptions, SamplingParams
from kvloom.server.context import ServerContext, context_of, new_id, tenant_of
from kvloom.server.errors import GenerationError
from kvloom.server.schema.segments import ExplainBody, SegmentsBody

router = APIRouter()
SHOWN_TOKENS = 6
"""Tokens at either end of a run that an explanation shows as text."""


@router.get("/v1/kv")
async def kv(request: Request) -> dict[str, Any]:
    """Capacity, blocks per head group, prefix hits, and blocks per tenant."""
    return _body(context_of(request).client.stats())


@router.post("/v1/kv/segments")
async def compile_segments(body: SegmentsBody, request: Request) -> dict[str, Any]:
    """Compile texts alone and keep their KV for prompts that hold them. Answers once that is done."""
    context = context_of(request)
    context.check_model(body.model)
    texts = body.texts if body.texts is not None else [body.text] if body.text is not None else []
    given = [await context.prompts.text(text, add_special_tokens=False) for text in texts] or [body.tokens or []]
    for tokens in given:
        context.prompts.check(tokens, "tokens")
    stored = [await _compile(context, tokens, body, tenant_of(request)) for tokens in given]
    totals = {name: sum(int(one.get(name, 0)) for one in stored) for name in ("segments", "tokens", "bytes")}
    return {"object": "kv.segments", "scope": body.scope, "given_tokens": sum(map(len, given)), **totals}


@router.delete("/v1/kv/segments")
async def purge_segments(request: Request) -> dict[str, Any]:
    """Forget every segment that the caller's tenant owns, whatever its scope."""
    return {"object": "kv.segments", "deleted": await context_of(request).client.purge(tenant_of(request))}


@router.post("/v1/kv/explain")
async def explain(body: ExplainBody, request: Request) -> dict[str, Any]:
    """What a prompt of the caller's would reuse now, from which kind of donor, and why no more. Runs nothing."""
    context = context_of(request)
    context.check_model(body.model)
    if body.messages is not None:
        tokens = await context.prompts.chat(body.messages)
    elif isinstance(body.prompt, str):
        tokens = await context.prompts.text(body.prompt)
    else:
        tokens = list(body.prompt or [])
    return await _explain(context, tokens, tenant_of(request), body.cache_salt)


@router.get("/v1/kv/explain")
async def explain_text(request: Request, prompt: Annotated[str, Query(min_length=1)]) -> dict[str, Any]:
    """The same for a short prompt in the address."""
    context = context_of(request)
    return await _explain(context, await context.prompts.text(prompt), tenant_of(request), "")


async def _explain(context: ServerContext, tokens: Sequence[int], tenant: str, salt: str) -> dict[str, Any]:
    context.prompts.check(tokens)
    told = dict(await context.client.explain(tokens, tenant=tenant, cache_salt=salt))
    for run in told["runs"]:
        ends = tokens[run["start"] :][:SHOWN_TOKENS], tokens[: run["stop"]][-SHOWN_TOKENS:]
        run["text"] = " ... ".join([await context.prompts.decode(list(end)) for end in ends])
    return told


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
            if output.finish_reason in ("error", "abort"):
                raise GenerationError(f"compiling failed: {output.error or 'the server is shutting down'}")
            if output.finish_reason is not None:
                stored = dict(output.usage.explanation or {})
                break
    return stored


def _body(stats: EngineStats) -> dict[str, Any]:
    blocks = {group.name: {key: value for key, value in asdict(group).items() if key != "name"} for group in stats.groups}
    return {
        "capacity_tokens": stats.capacity_tokens,
        "block_size": stats.block_size,
        "blocks": blocks,
        "usage": stats.kv_usage,
        "hit_rate": stats.hit_rate,
        "prefix": {"query_tokens": stats.prefix_query_tokens, "hit_tokens": stats.prefix_hit_tokens},
        "evicted_blocks": stats.evicted_blocks,
        "requests": {"running": stats.running, "waiting": stats.waiting, "preemptions": stats.preemptions},
        "read_bytes": dict(stats.kv_bytes),
        "selection": {name: _method(method) for name, method in stats.selection.items() if method.decode_rows},
        "drafts": {"made": stats.drafts, "drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens},
        "kvshare": _share(stats.share),
        "tenants": {name: _tenant(name, stats) for name in sorted({*stats.tenants, *stats.share.segment_bytes_by})},
    }


def _tenant(name: str, stats: EngineStats) -> dict[str, Any]:
    nothing = {"in_use_blocks": 0, "cached_blocks": 0}
    return {
        **nothing,
        **stats.tenants.get(name, {}),
        "segment_bytes": stats.share.segment_bytes_by.get(name, 0),
        "tokens": dict(stats.share.tenant_tokens.get(name, {})),
    }


def _share(stats: ShareStats) -> dict[str, Any]:
    """What approximate reuse did."""
    reused = stats.tokens["stale"] + stats.tokens["boundary"] + stats.tokens["ranked"] + stats.tokens["rejected"]
    return {
        "enabled": stats.enabled,
        "segments": {
            "count": stats.segments,
            "bytes": stats.segment_bytes,
            "capacity_bytes": stats.segment_capacity,
            "evictions": stats.segment_evictions,
        },
        "tokens": dict(stats.tokens),
        "recomputed_share": (reused - stats.tokens["stale"]) / reused if reused else None,
        "requests": [
            {"path": path, "reason": reason or None, "count": count} for (path, reason), count in sorted(stats.requests.items())
        ],
        "runs": dict(stats.runs),
        "deviation": stats.deviation_sum / stats.deviation_runs if stats.deviation_runs else None,
        "rejected_runs": stats.rejected_runs,
        "identity_failures": stats.identity_failures,
        "refreshed_tokens": stats.refreshed_tokens,
        "left": {
            "captured_tokens": stats.captured_tokens,
            "compiled_tokens": stats.compiled_tokens,
            "healed_tokens": stats.healed_tokens,
        },
        "shadow": {
            "checks": stats.shadow_checks,
            "kl": stats.shadow_kl / stats.shadow_tokens if stats.shadow_tokens else None,
            "top1": stats.shadow_agree / stats.shadow_tokens if stats.shadow_tokens else None,
        },
        "seconds": {"match": stats.match_seconds, "copy": stats.copy_seconds, "scan": stats.scan_seconds},
        "errands": stats.errands,
    }


def _method(stats: MethodStats) -> dict[str, Any]:
    """What a selection method did, with its two shares; null before there is anything to divide by."""
    return {
        **asdict(stats),
        "attended_share": stats.attended / stats.held if stats.held else None,
        "covered_mass": stats.mass / stats.mass_samples if stats.mass_samples else None,
    }
