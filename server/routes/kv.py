"""GET /v1/kv: what the KV cache holds and what it was good for. Beneath it: segments and explanations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import EngineStats, TenantStats
from kvloom.engine.requests.figures import placed
from kvloom.server.context import context_of, operator_only, sees_all, tenant_of
from kvloom.server.routes import explain, segments

router = APIRouter()
router.include_router(segments.router)
router.include_router(explain.router)


@router.get("/v1/kv")
async def kv(request: Request) -> dict[str, Any]:
    """Capacity, blocks per head group, prefix hits, what approximate reuse did, and what tenants hold. A tenant among others is
    told of itself alone."""
    client = context_of(request).client
    if not sees_all(request):
        tenant = tenant_of(request)
        return _own_body(await client.stats(), tenant, (await client.tenants([tenant]))[tenant])
    return {
        **placed(await client.stats()),
        "tenants": {name: asdict(held) for name, held in (await client.tenants()).items()},
        "settings": {name: value for name, value in client.model.settings.items() if name != "tenants"},
    }


@router.post("/v1/kv/reset")
async def reset(request: Request) -> dict[str, Any]:
    """Forget all cached KV that no running request holds, of every tenant: prefixes, and segments of approximate reuse. For the
    operator."""
    operator_only(request, "forgetting everybody's KV is")
    return {"object": "kv.reset", **await context_of(request).client.reset()}


@router.post("/reset_prefix_cache", include_in_schema=False)
async def reset_prefix_cache(request: Request) -> dict[str, Any]:
    """The same, under vLLM's name and with its answer, which scripts look at."""
    return {"success": True, **await reset(request)}


def _own_body(stats: EngineStats, name: str, tenant: TenantStats) -> dict[str, Any]:
    """What does not depend on what others do."""
    seen = sum(tenant.tokens.values())
    return {
        "capacity_tokens": stats.capacity_tokens,
        "block_size": stats.block_size,
        "blocks": {group.name: {"total": group.total} for group in stats.groups},
        "hit_rate": tenant.tokens.get("prefix", 0) / seen if seen else None,
        "tenants": {name: asdict(tenant)},
    }
