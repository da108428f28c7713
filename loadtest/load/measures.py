"""From records to figures: of a run as an object (`summarise`), of a stage as it stands in summary.json (`stage_summary`).

summary.json has the key names and units (ms) of `vllm bench serve`, and more of our own; what nothing was measured for is null.
The definitions that every report prints are `DEFINITIONS`. Failed and cancelled requests are counted, never averaged in.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kvloom.loadtest.client.arrivals import Load
from kvloom.loadtest.client.record import Record
from kvloom.loadtest.study.flags import seconds_of
from kvloom.loadtest.study.intervals import bootstrap_median

if TYPE_CHECKING:
    from kvloom.loadtest.client.drive import StageRun

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


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that were under way at once."""
    ends = [(record.ended, -1) for record in records if record.ended is not None]
    most = now = 0
    for _, change in sorted([*((record.sent, 1) for record in records), *ends]):
        now += change
        most = max(most, now)
    return most


SHOWN = (50.0, 90.0, 99.0)
"""Percentiles that every stage has, since plots and other tools look for them."""


def stage_summary(
    run: StageRun, load: Load, slo: Slo | None, last_due: float = 0.0, percentiles: Sequence[float] = SHOWN
) -> dict[str, Any]:
    """What the client measured in a stage. `last_due`: seconds after the start at which its last request was due;
    `percentiles`: which ones are to be shown of every time."""
    records = run.records
    good = [record for record in records if record.ok]
    total = summarise(records)
    wall = total.wall or _elapsed(records)
    met = sum(slo.met(record) for record in records) if slo else None
    failed = [record for record in records if record.error is not None]
    times = {"ttft": [record.ttft for record in good], "tpot": tpots(good),
             "itl": [gap for record in good for gap in record.itl], "e2el": [record.e2e for record in good]}  # fmt: skip
    return {
        "num_prompts": run.planned,
        "ran_out": run.ran_out,
        "percentiles": list(percentiles),
        "request_rate": _rate(load, run.planned, last_due),
        "burstiness": load.burstiness,
        "max_concurrency": load.limit,
        "duration": wall,
        "completed": total.completed,
        "failed": total.failed,
        "cancelled": sum(record.cancelled and record.error is None for record in records),
        "not_sent": run.planned - len(records),
        "failures": dict(Counter(record.error_kind for record in failed).most_common()),
        "first_errors": _first_errors(failed),
        "retries": sum(record.retries for record in records),
        "total_input_tokens": total.prompt_tokens,
        "total_output_tokens": total.output_tokens,
        "request_throughput": _per(total.completed, wall),
        "request_goodput": None if met is None else _per(met, wall),
        "goodput_share": None if met is None else _ratio(met, total.completed + total.failed),
        "slo": asdict(slo) if slo else None,
        "output_throughput": _per(total.output_tokens, wall),
        "total_token_throughput": _per(total.prompt_tokens + total.output_tokens, wall),
        **{key: value for name, values in times.items() for key, value in _times(name, values, percentiles).items()},
        **{f"median_{name}_ms_ci95": _interval(times[name]) for name in ("ttft", "tpot")},
        "client_lag": _lag(records),
        "peak_concurrency": peak_concurrency(records),
        "tokens_from_chunks": sum(record.tokens_from == "chunks" for record in good),
        "tokens_per_chunk": _ratio(total.output_tokens, sum(len(record.chunks) for record in good)),
        **_reuse(good),
        "kv": _kv(good),
        "tenants": _groups(records, lambda record: record.tenant),
        "labels": _groups(records, lambda record: record.label),
    }


def _rate(load: Load, count: int, last_due: float) -> float | str:
    """Requests per second that were offered: a number, or "inf" for a closed loop and for all at once, as vLLM writes."""
    if load.mode == "closed" or last_due <= 0:
        return "inf"
    return load.rate if load.rate is not None else count / last_due


def _elapsed(records: Sequence[Record]) -> float:
    """Seconds that a stage without any completed request took."""
    return max((r.ended or r.sent for r in records), default=0.0) - min((r.sent for r in records), default=0.0)


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds * 1e3


def _times(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    spread = Spread.of(values)
    figures = {"mean": spread.mean, "median": spread.p50, "std": spread.std}
    for percentile in sorted({*SHOWN, *percentiles}):
        figures[f"p{percentile:g}"] = float(np.percentile(values, percentile)) if values else math.nan
    return {f"{figure}_{name}_ms": _ms(value) for figure, value in figures.items()}


def _interval(values: Sequence[float]) -> list[float] | None:
    found = bootstrap_median(values)
    return None if found is None else [bound * 1e3 for bound in found]


def _lag(records: Sequence[Record]) -> dict[str, float] | None:
    lags = [record.lag * 1e3 for record in records if record.error_kind != "follows"]
    if not lags:
        return None
    return {"mean_ms": float(np.mean(lags)), "p99_ms": float(np.percentile(lags, 99)), "max_ms": max(lags)}


def _first_errors(failed: Sequence[Record]) -> dict[str | None, str | None]:
    """One message for every kind of failure."""
    found: dict[str | None, str | None] = {}
    for record in failed:
        found.setdefault(record.error_kind, record.error)
    return found


def _reuse(good: Sequence[Record]) -> dict[str, Any]:
    """What came from the cache, beside what an ideal cache could have given; and how many answers were right."""
    marks = [record.correct for record in good if record.correct is not None]
    told = [record for record in good if record.cached_tokens is not None]
    cached = sum(record.cached_tokens or 0 for record in told)
    return {
        "cached_tokens": cached if told else None,
        "hit_rate": _ratio(cached, sum(record.prompt_tokens for record in told)),
        "reusable_tokens": sum(record.reusable_tokens for record in good),
        "reusable_anywhere_tokens": sum(record.reusable_anywhere for record in good),
        "correct_rate": _ratio(sum(marks), len(marks)),
    }


def _kv(good: Sequence[Record]) -> dict[str, float] | None:
    """Sums of the numbers in `usage.kv`; those of inner objects under `outer.inner`."""
    totals: defaultdict[str, float] = defaultdict(int)

    def add(values: Mapping[str, Any], prefix: str = "") -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{name}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                totals[prefix + name] += value

    for record in good:
        add(record.kv or {})
    return dict(totals) or None


def _groups(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, dict[str, Any]]:
    """Figures by tenant or label, in the order of first appearance; `share` is a group's part of all output tokens."""
    every = sum(record.output_tokens for record in records if record.ok)
    names = dict.fromkeys(key(record) for record in records)
    return {name: _group([record for record in records if key(record) == name], every) for name in names if name}


def _group(records: Sequence[Record], every: int) -> dict[str, Any]:
    good = [record for record in records if record.ok]
    total = summarise(records)
    return {
        "completed": total.completed,
        "failed": total.failed,
        "cancelled": len(records) - total.completed - total.failed,
        "input_tokens": total.prompt_tokens,
        "output_tokens": total.output_tokens,
        "mean_ttft_ms": _ms(total.ttft.mean),
        "p99_ttft_ms": _ms(total.ttft.p99),
        "mean_tpot_ms": _ms(total.tpot.mean),
        "mean_e2el_ms": _ms(total.e2e.mean),
        "share": _ratio(total.output_tokens, every),
        **_reuse(good),
    }
