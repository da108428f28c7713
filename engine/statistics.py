"""What the engine counts, and what it tells of itself.

`snapshot` is taken after every step: its cost depends on neither what was served before nor how many tenants there are. What
tenants hold is a table of its own, made when somebody asks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kvloom.engine.cache import CacheManager
from kvloom.engine.client import STEP_PROMPT_ROWS, STEP_SECONDS, EngineStats, GroupStats, ShareStats, TenantStats
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.scheduling import Scheduler
from kvloom.engine.selection.policies import Selectors
from kvloom.engine.state import StateMemory
from kvloom.kernels.interface import Kernels


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Counters of one engine since its start, and the parts that count for themselves."""

    cache: CacheManager
    scheduler: Scheduler
    kernels: Kernels
    selectors: Selectors
    states: StateMemory
    share: KVShare | None
    steps: int = 0
    step_seconds: float = 0.0
    computing_seconds: float = 0.0
    """Of steps that computed something: these are what the two lists count."""
    step_times: list[int] = field(default_factory=lambda: [0] * len(STEP_SECONDS))
    step_prompt_rows: list[int] = field(default_factory=lambda: [0] * len(STEP_PROMPT_ROWS))
    prompt_rows: int = 0
    """Computed for prompts, recomputed ones as well."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    replayed: int = 0
    internal_errors: int = 0
    """Requests that ended because something of the engine's own failed, and steps that failed with nobody to blame."""

    def stepped(self, seconds: float, rows: int, prompt_rows: int) -> None:
        """A step is over that was to compute `rows`, so many of them of prompts."""
        self.steps += 1
        self.step_seconds += seconds
        self.prompt_rows += prompt_rows
        if rows:
            self.computing_seconds += seconds
            self.step_times[bisect.bisect_left(STEP_SECONDS, seconds)] += 1
            self.step_prompt_rows[bisect.bisect_left(STEP_PROMPT_ROWS, prompt_rows)] += 1

    def snapshot(self) -> EngineStats:
        """Counters as of now."""
        cache, scheduler, counters = self.cache, self.scheduler, self.kernels.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            capacity_tokens=cache.capacity_tokens,
            block_size=cache.block_size,
            groups=tuple(
                GroupStats(
                    name=group.storage.spec.name,
                    total=group.pool.total,
                    free=group.pool.free,
                    cached=group.pool.cached,
                    in_use=group.pool.in_use,
                )
                for group in cache.groups
            ),
            prefix_query_tokens=cache.query_tokens,
            prefix_hit_tokens=cache.hit_tokens,
            evicted_blocks=sum(group.pool.evictions for group in cache.groups),
            preemptions=scheduler.preemptions,
            replayed_tokens=self.replayed,
            selection_bytes=self.states.held,
            selection_capacity=self.states.bound,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            steps=self.steps,
            step_seconds=self.step_seconds,
            step_times=tuple(self.step_times),
            step_times_sum=self.computing_seconds,
            step_prompt_rows=tuple(self.step_prompt_rows),
            step_prompt_rows_sum=self.prompt_rows,
            queued_tokens=scheduler.queued_tokens,
            kv_bytes_read=counters.kv_bytes + counters.score_bytes,
            kv_bytes={
                "tail": counters.kv_bytes - counters.list_kv_bytes,
                "list": counters.list_kv_bytes,
                "score": counters.score_bytes,
            },
            selection={name: replace(stats) for name, stats in self.selectors.stats.items()},
            drafts=self.drafts,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            internal_errors=self.internal_errors,
            share=ShareStats() if self.share is None else self.share.snapshot(),
        )

    def tenants(self, names: Iterable[str] | None = None) -> dict[str, TenantStats]:
        """What tenants hold and what was reused for them; of all that are known by default. Costs time per tenant."""
        pools = [group.pool for group in self.cache.groups]
        segments = Counter[str]() if self.share is None else self.share.store.bytes_by
        served = {} if self.share is None else self.share.tenant_tokens
        failed = {} if self.share is None else self.share.failed_tenants
        if names is None:
            names = sorted({*served, *segments, *(name for pool in pools for name in (*pool.in_use_by, *pool.cached_by))})
        return {
            name: TenantStats(
                in_use_blocks=sum(pool.in_use_by[name] for pool in pools),
                cached_blocks=sum(pool.cached_by[name] for pool in pools),
                segment_bytes=segments[name],
                tokens=dict(served.get(name, {})),
                reuse_checks={"more": "recomputes more", "off": "off"}.get(failed.get(name, ""), "passed"),
            )
            for name in names
        }
