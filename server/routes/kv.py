"""GET /v1/kv: what the KV cache holds and what it was good for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import EngineStats, MethodStats
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
        "read_bytes": dict(stats.kv_bytes),
        "selection": {name: _method(method) for name, method in stats.selection.items() if method.decode_rows},
        "drafts": {"made": stats.drafts, "drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens},
        "tenants": {name: dict(counts) for name, counts in stats.tenants.items()},
    }


def _method(stats: MethodStats) -> dict[str, Any]:
    """What a selection method did, with its two shares; null before there is anything to divide by."""
    return {
        **asdict(stats),
        "attended_share": stats.attended / stats.held if stats.held else None,
        "covered_mass": stats.mass / stats.mass_samples if stats.mass_samples else None,
    }
