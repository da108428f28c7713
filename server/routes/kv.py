"""GET /v1/kv: what the KV cache holds and what it was good for. Beneath it: segments and explanations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import EngineStats, MethodStats, ShareStats
from kvloom.server.context import ServerContext, context_of, tenant_of
from kvloom.server.routes import explain, segments

router = APIRouter()
router.include_router(segments.router)
router.include_router(explain.router)


@router.get("/v1/kv")
async def kv(request: Request) -> dict[str, Any]:
    """Capacity, blocks per head group, prefix hits, what approximate reuse did, and what tenants hold."""
    context = context_of(request)
    stats, tenant = context.client.stats(), tenant_of(request)
    everybody = sorted({*stats.tenants, *stats.share.tenant_tokens, *stats.share.segment_bytes_by})
    return _body(stats, [tenant] if _told_apart(context) else everybody)


def _told_apart(context: ServerContext) -> bool:
    """Whether callers have tenants of their own: then each is told of its own alone, beside the totals."""
    options = context.options
    return bool(options.api_key or options.tenant_keys or options.trusted_proxies)


def _body(stats: EngineStats, tenants: Sequence[str]) -> dict[str, Any]:
    """tenants: of which to tell."""
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
        "tenants": {name: _tenant(name, stats) for name in tenants},
    }


def _tenant(name: str, stats: EngineStats) -> dict[str, Any]:
    nothing = {"in_use_blocks": 0, "cached_blocks": 0}
    return {
        **nothing,
        **stats.tenants.get(name, {}),
        "segment_bytes": stats.share.segment_bytes_by.get(name, 0),
        "reuse_checks": {"more": "recomputes more", "off": "off"}.get(stats.share.failed_tenants.get(name, ""), "passed"),
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
