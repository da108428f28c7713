"""GET /v1/kv: what the KV cache holds and what it was good for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import EngineStats
from kvloom.server.context import context_of

router = APIRouter()


@router.get("/v1/kv")
async def kv(request: Request) -> dict[str, Any]:
    """Capacity, blocks per head group, prefix hits, and blocks per tenant."""
    return _body(context_of(request).client.stats())


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
        "tenants": {name: dict(counts) for name, counts in stats.tenants.items()},
    }
