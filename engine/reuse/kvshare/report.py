"""What approximate reuse tells of itself: counters per request, and an explanation of one prompt."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvloom.engine.client import RUN_LENGTHS, SHARES, ShareStats
from kvloom.engine.request import Request
from kvloom.engine.reuse.kvshare.matching import Match, Run


def count(stats: ShareStats, request: Request, reason: str, kinds: Mapping[bytes, str]) -> None:
    """Add what became of a request's prompt. reason: why nothing was reused, "" if something was; kinds: of domain keys."""
    repair, prefix = request.repair, request.computed
    found = Counter(prefix=prefix, fresh=len(request.tokens) - prefix) if repair is None else repair.kinds
    stats.tokens.update(found)
    stats.tenant_tokens.setdefault(request.tenant, Counter()).update(found)
    if repair is None:
        stats.requests["prefix" if prefix else "full", reason] += 1
        return
    stats.requests["segment", ""] += 1
    reused = found["stale"] + found["boundary"] + found["ranked"] + found["rejected"]
    stats.recomputed_shares[bisect.bisect_left(SHARES, 1 - found["stale"] / max(1, reused))] += 1
    for run in repair.runs:
        stats.runs["isolated" if run.isolated else "context"] += 1
        stats.runs[kinds[run.domain.key]] += 1
        stats.run_lengths[bisect.bisect_left(RUN_LENGTHS, run.length)] += 1


def describe(match: Match, kinds: Mapping[bytes, str]) -> dict[str, Any]:
    """What was found in a prompt, and why no more. Positions are token indices; ranges are half-open."""
    return {
        "runs": [_run(run, kinds) for run in match.runs],
        "broken": [{"position": broken.position, "reason": broken.reason} for broken in match.broken],
        "dropped": [{"start": start, "stop": stop, "reason": why} for start, stop, why in match.dropped],
    }


def explain(request: Request, match: Match, reason: str, kinds: Mapping[bytes, str]) -> dict[str, Any]:
    """The same, and what became of it."""
    repair = request.repair
    told = describe(match, kinds)
    told["cached_tokens"] = request.cached
    told["reason"] = reason or None
    if repair is None:
        return told
    for run, found in zip(match.runs, told["runs"]):
        stale = repair.initial_stale
        found["recomputed"] = run.length - int(((stale >= run.start) & (stale < run.stop)).sum())
    for deviation, found in zip(repair.deviation, told["runs"]):
        found["deviation"] = round(deviation, 4)
    told["tokens"] = {kind: amount for kind, amount in repair.kinds.items() if amount}
    told["refreshed_tokens"] = repair.refreshed
    told["exact_until"] = min(request.taint, len(request.tokens))
    return told


def _run(run: Run, kinds: Mapping[bytes, str]) -> dict[str, Any]:
    return {
        "start": run.start,
        "stop": run.stop,
        "donor": "isolated" if run.isolated else "context",
        "scope": kinds[run.domain.key],
        "shift": run.shift,
        "pieces": len(run.pieces),
    }
