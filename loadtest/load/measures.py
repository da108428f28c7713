"""From records to figures. The definitions that every report prints are `DEFINITIONS`.

Failed and cancelled requests are counted, never averaged in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kvloom.loadtest.client.record import Record
from kvloom.loadtest.study.flags import seconds_of

DEFINITIONS = {
    "ttft": "time to first token: sending -> arrival of the first non-empty text. Setting up the connection counts (each "
    "request has its own), the wait for a free place in a closed loop does not; with retries, from the first sending.",
    "tpot": "time per output token: (E2E - TTFT) / (output tokens - 1), per request; requests with one token are left out.",
    "itl": "inter-token latency: gaps between chunks that carry text, over all requests. A chunk may hold several tokens "
    "(tokens_per_chunk).",
    "e2el": "end-to-end latency: sending -> arrival of the last text.",
    "duration": "first sending of all -> last text of all completed requests.",
    "output_throughput": "output tokens of completed requests / duration.",
    "output_tokens": "as the server's usage says; where it says nothing, chunks with text are counted (tokens_from_chunks).",
    "goodput": "completed requests that meet every limit of --goodput / duration; goodput_share: their part of those that "
    "completed or failed.",
    "hit_rate": "cached prompt tokens / prompt tokens, of completed requests whose server tells.",
    "client_lag": "sent - scheduled: how late the client sent. Scheduled is when the request was due and what it follows had "
    "ended; in a closed loop, when a place became free; with --max-concurrency the wait for a place is part of the lag.",
    "failed": "requests that ended in an error, by kind; in no mean. Cancelled: ended by the client; in no mean either.",
    "median_ci95": "95% interval of the median by bootstrap over requests (1000 resamples). Requests of one run share the "
    "server's state: repeated runs may spread more than this.",
}

NAN = float("nan")
LONGEST_LIMIT = 1e8
"""Milliseconds of a service-level objective."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One quantity over many requests, in seconds; NaN if there were none. One request has no standard deviation."""

    mean: float
    p50: float
    p90: float
    p99: float
    std: float = NAN
    most: float = NAN

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(NAN, NAN, NAN, NAN)
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        std = float(np.std(values)) if len(values) > 1 else NAN
        return cls(float(np.mean(values)), float(p50), float(p90), float(p99), std, float(max(values)))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures. Times in seconds, throughput in tokens per second."""

    completed: int
    failed: int
    wall: float
    prompt_tokens: int
    output_tokens: int
    output_throughput: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Summary:
        """What `dataclasses.asdict` made."""
        values: dict[str, Any] = {name: Spread(**v) if isinstance(v, Mapping) else v for name, v in row.items()}
        return cls(**values)


def summarise(records: Sequence[Record]) -> Summary:
    """Figures of a run. With no completed request all times are NaN."""
    good = [record for record in records if record.ok]
    wall = max((r.last or r.sent for r in good), default=0.0) - min((r.sent for r in records), default=0.0) if good else 0.0
    tokens = sum(record.output_tokens for record in good)
    return Summary(
        completed=len(good),
        failed=sum(record.error is not None for record in records),
        wall=wall,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=tokens,
        output_throughput=tokens / wall if wall else 0.0,
        ttft=Spread.of([r.ttft for r in good]),
        tpot=Spread.of(tpots(good)),
        itl=Spread.of([gap for r in good for gap in r.itl]),
        e2e=Spread.of([r.e2e for r in good]),
    )


def tpots(good: Sequence[Record]) -> list[float]:
    """TPOT of the completed requests that have one."""
    return [record.tpot for record in good if record.output_tokens > 1]


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits on latency, in milliseconds; a request is good if it meets all that are given."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Slo:
        """From `ttft:500 tpot:50` (milliseconds, as vLLM's --goodput) or `ttft=500ms e2el=5s`. Raises ValueError."""
        names = [field.name.removesuffix("_ms") for field in fields(cls)]
        limits: dict[str, float] = {}
        for word in words:
            name, _, limit = word.replace("=", ":", 1).partition(":")
            if name not in names or name + "_ms" in limits:
                raise ValueError(f"{word!r} is no limit; write NAME:MILLISECONDS once for any of {', '.join(names)}")
            try:
                limits[name + "_ms"] = seconds_of(limit, "ms") * 1e3
            except ValueError:
                raise ValueError(f"{word!r} is no limit; write NAME:MILLISECONDS, such as {name}:500 or {name}=500ms") from None
            if not 0 < limits[name + "_ms"] <= LONGEST_LIMIT:
                raise ValueError(f"{word!r} is no limit; allowed: more than 0, up to {LONGEST_LIMIT:g} ms")
        return cls(**limits)

    def met(self, record: Record) -> bool:
        """Whether a record is that of a good request."""
        if not record.ok:
            return False
        taken = ((self.ttft_ms, record.ttft), (self.tpot_ms, record.tpot), (self.e2el_ms, record.e2e))
        return all(limit is None or seconds * 1e3 <= limit for limit, seconds in taken)


def median_interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float] | None:
    """95% bootstrap interval of the median, in the unit of the values; None for fewer than two."""
    if len(values) < 2:
        return None
    random, array = np.random.default_rng(0), np.asarray(values)
    medians = [np.median(random.choice(array, len(array))) for _ in range(resamples)]
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that were under way at once."""
    ends = [(record.ended, -1) for record in records if record.ended is not None]
    most = now = 0
    for _, change in sorted([*((record.sent, 1) for record in records), *ends]):
        now += change
        most = max(most, now)
    return most
