"""What the engine counts, and what it tells of itself: the figures that `engine.requests.stats` declares.

`snapshot` is taken while steps go on: its cost depends on neither what was served before nor how many tenants there are. What
tenants hold is a table of its own, made when somebody asks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from kvloom.engine.cache import CacheManager
from kvloom.engine.constraint.compiler import Compiler
from kvloom.engine.model.decoder import MODES, Decoder
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.stats import (
    CHECKS,
    STEP_PROMPT_ROWS,
    STEP_SECONDS,
    EngineStats,
    GroupStats,
    ShareStats,
    TenantStats,
)
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.scheduling import Scheduler
from kvloom.engine.selection.policies import Selectors
from kvloom.kernels.interface import Kernels

_NAMES = tuple(field.name for field in fields(EngineStats))


@dataclass(slots=True, kw_only=True)
class Statistics(EngineStats):
    """The figures of one engine since its start, and the parts that count for themselves, whose figures are read off them."""

    cache: CacheManager
    scheduler: Scheduler
    decoder: Decoder
    kernels: Kernels
    selectors: Selectors
    states: StateMemory
    kvshare: KVShare | None
    compiler: Compiler

    def stepped(self, seconds: float, rows: int, prompt_rows: int) -> None:
        """A step is over that was to compute `rows`, so many of them of prompts."""
        self.steps += 1
        self.step_seconds += seconds
        self.step_prompt_rows_sum += prompt_rows
        if rows:
            self.step_times_sum += seconds
            self.step_times[bisect.bisect_left(STEP_SECONDS, seconds)] += 1
            self.step_prompt_rows[bisect.bisect_left(STEP_PROMPT_ROWS, prompt_rows)] += 1

    def snapshot(self) -> EngineStats:
        """The figures as of now."""
        cache, scheduler, counters = self.cache, self.scheduler, self.kernels.counters
        pools = [(group.storage.spec.name, group.pool) for group in cache.groups]
        read: dict[str, Any] = {
            "running": len(scheduler.running),
            "waiting": scheduler.waiting,
            "queued_tokens": scheduler.queued_tokens,
            "preemptions": scheduler.preemptions,
            "capacity_tokens": cache.capacity_tokens,
            "block_size": cache.block_size,
            "groups": tuple(
                GroupStats(name=name, total=pool.total, free=pool.free, cached=pool.cached, in_use=pool.in_use)
                for name, pool in pools
            ),
            "prefix_query_tokens": cache.query_tokens,
            "prefix_hit_tokens": cache.hit_tokens,
            "evicted_blocks": sum(pool.evictions for _, pool in pools),
            "step_times": self.step_times.copy(),
            "step_prompt_rows": self.step_prompt_rows.copy(),
            "graph_steps": {mode: self.decoder.steps[mode] for mode in MODES},
            "graph_failures": self.decoder.failures,
            "kv_bytes": {
                "tail": counters.kv_bytes - counters.list_kv_bytes,
                "list": counters.list_kv_bytes,
                "score": counters.score_bytes,
            },
            "selection": {name: replace(stats) for name, stats in self.selectors.stats.items()},
            "selection_bytes": self.states.held,
            "selection_capacity": self.states.bound,
            "share": ShareStats() if self.kvshare is None else self.kvshare.snapshot(),
            **self.compiler.figures(),
        }
        return EngineStats(**{name: read[name] if name in read else getattr(self, name) for name in _NAMES})

    def tenants(self, names: Iterable[str] | None = None) -> dict[str, TenantStats]:
        """What tenants hold and what was reused for them; of all that are known by default. Costs time per tenant."""
        pools = [group.pool for group in self.cache.groups]
        share = self.kvshare
        segments = Counter[str]() if share is None else share.store.bytes_by
        served = {} if share is None else share.tenant_tokens
        failed = {} if share is None else share.failed_tenants
        if names is None:
            names = sorted({*served, *segments, *(name for pool in pools for name in (*pool.in_use_by, *pool.cached_by))})
        return {
            name: TenantStats(
                in_use_blocks=sum(pool.in_use_by[name] for pool in pools),
                cached_blocks=sum(pool.cached_by[name] for pool in pools),
                segment_bytes=segments[name],
                tokens=dict(served.get(name, {})),
                reuse_checks={"more": "recomputes more", "off": "off"}.get(failed.get(name, ""), CHECKS[0]),
            )
            for name in names
        }
