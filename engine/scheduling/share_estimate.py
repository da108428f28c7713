"""What a waiting request will cost, for the cache-aware order, when KV may be reused beyond its prefix.

What the request's own tenant left counts in full. What others left in a group's or the public domain counts in three levels, so
that the order of requests says little about whether a text is there. Nothing is pinned, counted or moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.scheduling.cache_aware import Estimate, hit_level

LASTING = 1.0
"""Seconds for which what was found of a waiting prompt is believed while segments come and go."""


class _Found(NamedTuple):
    version: int
    time: float
    prefix: int
    own: int
    """Tokens in runs of the tenant's own segments,"""
    others: int
    """and of others'."""
    producer: Request | None
    """Who computes now what will be found later."""


class ShareEstimator:
    """`scheduling.Estimator` with segments."""

    def __init__(self, cache: CacheManager, share: KVShare, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache, self._share, self._clock = cache, share, clock
        self._found: dict[Request, _Found] = {}

    def estimate(self, request: Request, table: BlockTable, tokens: Sequence[int]) -> Estimate:
        """See `scheduling.Estimator`."""
        prefix, known = self._cache.peek(table, tokens), len(tokens)
        if not request.approximate:
            return Estimate(max(1, known - prefix), prefix / known, prefix)
        found = self._search(request, tokens, prefix)
        others = hit_level(found.others / known) * known
        reused = min(found.own + others, known - prefix - 1)
        work = known - prefix
        if reused >= self._share.options.min_reusable:
            work = min(work, max(1, round(self._share.work(request, round(reused), known - prefix))))
        return Estimate(work, 1 - work / known, prefix, found.producer)

    def _search(self, request: Request, tokens: Sequence[int], prefix: int) -> _Found:
        now, version = self._clock(), self._share.epoch
        found = self._found.get(request)
        if found is not None and found.prefix == prefix and (found.version == version or now - found.time < LASTING):
            return found
        match = self._share.search(request, np.array(tokens, np.int64), prefix)
        own = sum(run.length for run in match.runs if not run.domain.shared)
        everything = sum(run.length for run in match.runs)
        if not request.tenant:  # one tenant, nobody to hide anything from
            own = everything
        if len(self._found) > 4 * (self._share.open_requests + 16):
            self._found.clear()  # requests that have gone; the others are looked at again
        found = self._found[request] = _Found(version, now, prefix, own, everything - own, self._share.producer(request, match))
        return found
