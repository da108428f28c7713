"""GET /v1/kv: what the KV cache holds and what it was good for. Beneath it: segments and explanations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import EngineStats, MethodStats, ShareStats, TenantStats
from kvloom.server.context import context_of, sees_all, tenant_of
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
        return _own_body(client.stats(), tenant, (await client.tenants([tenant]))[tenant])
    told = _body(client.stats(), await client.tenants())
    return {**told, "settings": {name: value for name, value in client.model.settings.items() if name != "tenants"}}


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


def _body(stats: EngineStats, tenants: Mapping[str, TenantStats]) -> dict[str, Any]:
    """tenants: those of which to tell."""
    blocks = {group.name: {key: value for key, value in asdict(group).items() if key != "name"} for group in stats.groups}
    return {
        "capacity_tokens": stats.capacity_tokens,
        "block_size": stats.block_size,
        "blocks": blocks,
        "usage": stats.kv_usage,
        "hit_rate": stats.hit_rate,
        "prefix": {"query_tokens": stats.prefix_query_tokens, "hit_tokens": stats.prefix_hit_tokens},
        "evicted_blocks": stats.evicted_blocks,
        "requests": {
            "running": stats.running,
            "waiting": stats.waiting,
            "preemptions": stats.preemptions,
            "replayed_tokens": stats.replayed_tokens,
        },
        "read_bytes": dict(stats.kv_bytes),
        "selection": {name: _method(method) for name, method in stats.selection.items() if method.decode_rows},
        "selection_state": {"bytes": stats.selection_bytes, "capacity_bytes": stats.selection_capacity},
        "drafts": {"made": stats.drafts, "drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens},
        "kvshare": _share(stats.share),
        "tenants": {name: asdict(tenant) for name, tenant in tenants.items()},
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
