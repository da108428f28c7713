"""What approximate reuse tells of itself: counters per request, and an explanation of one prompt."""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from kvloom.engine.client import OTHERS, RUN_LENGTHS, SHARES, ShareStats
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.matching import Match, Run
from kvloom.engine.reuse.kvshare.repair import repair_of

MOST_TENANTS = 1024
"""Tenants whose tokens are counted apart."""


class TenantTokens(OrderedDict[str, Counter[str]]):
    """Prompt tokens by kind, of the tenants that were here last; those of all others together, under `OTHERS`."""

    def add(self, tenant: str, tokens: Mapping[str, int]) -> None:
        """Count a prompt of a tenant."""
        self.setdefault(tenant, Counter()).update(tokens)
        self.move_to_end(tenant)
        if len(self) > MOST_TENANTS:
            self.setdefault(OTHERS, Counter())
            self.move_to_end(OTHERS)
            _, counts = self.popitem(last=False)
            self[OTHERS].update(counts)


def count(stats: ShareStats, tenants: TenantTokens, request: Request, reason: str, kinds: Mapping[bytes, str]) -> None:
    """Add what became of a request's prompt. reason: why nothing was reused, "" if something was; kinds: of domain keys."""
    repair, prefix = repair_of(request), request.computed
    found = Counter(prefix=prefix, fresh=len(request.tokens) - prefix) if repair is None else repair.kinds
    stats.tokens.update(found)
    tenants.add(request.tenant, found)
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
    repair = repair_of(request)
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
