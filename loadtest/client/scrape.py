"""The server's own figures: /metrics in Prometheus text, read before, during and after a stage.

Knows the names of kvloom and vLLM (the same behind their prefixes) and of llama.cpp. A server without /metrics gives None.
Lines that nobody asks for are dropped before they are parsed, so that a scrape costs the client well under a millisecond.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kvloom.loadtest.client.client import Client

GAUGES = {
    "running": ("num_requests_running", "requests_processing"),
    "waiting": ("num_requests_waiting", "requests_deferred"),
    "kv_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "kv_cache_usage_ratio"),
}
COUNTERS = {
    "prefix_query_tokens": ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total"),
    "prefix_hit_tokens": ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
    "external_hit_tokens": ("external_prefix_cache_hits_total",),
    "segment_tokens": ("kvshare_reused_tokens_total",),
    "recomputed_tokens": ("kvshare_recomputed_tokens_total",),
    "refreshed_tokens": ("kvshare_refreshed_tokens_total",),
    "preemptions": ("num_preemptions_total",),
    "prompt_tokens": ("prompt_tokens_total",),
    "generation_tokens": ("generation_tokens_total", "tokens_predicted_total"),
    "kv_read_bytes": ("kv_read_bytes_total",),
    "evicted_blocks": ("kv_evicted_blocks_total",),
    "drafted_tokens": ("spec_decode_num_draft_tokens_total",),
    "accepted_tokens": ("spec_decode_num_accepted_tokens_total",),
    "steps": ("engine_steps_total", "n_decode_total"),
    "step_seconds": ("engine_step_seconds_total",),
}
MEANS = {
    "mean_ttft_ms": "time_to_first_token_seconds",
    "mean_itl_ms": "inter_token_latency_seconds",
    "mean_e2el_ms": "e2e_request_latency_seconds",
    "mean_queue_ms": "request_queue_time_seconds",
    "mean_prefill_ms": "request_prefill_time_seconds",
    "mean_decode_ms": "request_decode_time_seconds",
}
REUSED = {"prefix": "prefix_hit_tokens", "external": "external_hit_tokens", "segments": "segment_tokens"}
"""Kind of reuse -> counter."""
FAMILIES = ("kvloom:", "vllm:", "llamacpp:")
WANTED = frozenset(
    [*(name for names in (*GAUGES.values(), *COUNTERS.values()) for name in names)]
    + [f"{name}_{part}" for name in MEANS.values() for part in ("sum", "count")]
)
SCRAPE_SECONDS = 5.0

Snapshot = Mapping[str, float]
"""Metric name without its prefix -> sum over its label sets."""


def parse(text: str) -> Snapshot:
    """The metrics of interest in a page of Prometheus text. Raises ValueError if it is none."""
    totals: defaultdict[str, float] = defaultdict(float)
    kept = [line for line in text.splitlines() if _bare(line) in WANTED]
    for family in text_string_to_metric_families("\n".join(kept) + "\n"):
        for sample in family.samples:
            totals[_bare(sample.name)] += sample.value
    return dict(totals)


def _bare(line: str) -> str:
    """The name that a line begins with, without the prefix of its server."""
    name = line.split("{", 1)[0].split(" ", 1)[0]
    prefix = next((prefix for prefix in FAMILIES if name.startswith(prefix)), "")
    return name[len(prefix) :]


def read(snapshot: Snapshot, names: tuple[str, ...]) -> float | None:
    """The first of several names that is there."""
    return next((snapshot[name] for name in names if name in snapshot), None)


def difference(before: Snapshot, after: Snapshot) -> dict[str, float | None]:
    """What the server did between two snapshots: counters as differences, times as means over the requests in between."""
    figures: dict[str, float | None] = {}
    for key, histogram in MEANS.items():
        count, seconds = (
            after.get(f"{histogram}_{part}", 0) - before.get(f"{histogram}_{part}", 0) for part in ("count", "sum")
        )
        figures[key] = seconds / count * 1e3 if count > 0 else None
    for key, names in COUNTERS.items():
        end = read(after, names)
        figures[key] = None if end is None else end - (read(before, names) or 0.0)
    figures["hit_rate"] = _ratio(figures["prefix_hit_tokens"], figures["prefix_query_tokens"])
    step = _ratio(figures.pop("step_seconds"), figures["steps"])
    figures["mean_step_ms"] = None if step is None else step * 1e3
    return figures


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


class Scraper:
    """Watches one server during one stage. Use `begin`, then `watch` as a task, then `finish`."""

    def __init__(self, client: Client, interval: float) -> None:
        """`interval`: seconds between scrapes; 0 looks only before and after."""
        self._client = client
        self._interval = interval
        self._before: Snapshot | None = None
        self._last: Snapshot = {}
        self.timeline: list[dict[str, Any]] = []

    async def begin(self) -> None:
        """The state before the stage."""
        self._before = await self._snapshot()
        self._last = self._before or {}

    async def watch(self, started: float) -> None:
        """Scrape until cancelled; `started` is the instant of `time.perf_counter()` that times count from."""
        while self._before is not None and self._interval > 0:
            await asyncio.sleep(self._interval)
            if (now := await self._snapshot()) is not None:
                self.timeline.append(self._point(time.perf_counter() - started, now))

    async def finish(self) -> dict[str, Any] | None:
        """The server's figures of the stage, or None if it tells none; of one that went away, up to the last scrape."""
        if self._before is None:
            return None
        after = await self._snapshot() or (self._last if self.timeline else None)
        if after is None:
            return None
        peaks = {f"peak_{key}": max((p[key] for p in self.timeline if p[key] is not None), default=None) for key in GAUGES}
        return {**difference(self._before, after), **peaks}

    def _point(self, t: float, now: Snapshot) -> dict[str, Any]:
        """Gauges as they are; `hit_rate` since the point before; `reused`: tokens by kind since the start."""
        assert self._before is not None
        gauges = {key: read(now, names) for key, names in GAUGES.items()}
        since, step = difference(self._before, now), difference(self._last, now)
        self._last = now
        reused = {kind: since[counter] for kind, counter in REUSED.items() if since[counter] is not None}
        return {"t": round(t, 3), **gauges, "hit_rate": step["hit_rate"], "reused": reused}

    async def _snapshot(self) -> Snapshot | None:
        try:
            status, text = await self._client.get("/metrics", SCRAPE_SECONDS)
            return (parse(text) or None) if status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None
