"""From records to figures. The definitions that every report prints.

    TTFT        sending -> first non-empty text
    TPOT        (E2E - TTFT) / (output tokens - 1), per request
    ITL         gaps between chunks that carry text, over all requests
    E2E         sending -> last text
    throughput  output tokens of successful requests / (last text of all - first sending of all)

Failed requests are counted, never averaged in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvloom.loadtest.client import Record


@dataclass(frozen=True, slots=True)
class Spread:
    """One quantity over many requests, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(*(float("nan"),) * 4)
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(np.mean(values)), float(p50), float(p90), float(p99))


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
        fields: dict[str, Any] = {name: Spread(**v) if isinstance(v, Mapping) else v for name, v in row.items()}
        return cls(**fields)


def summarise(records: Sequence[Record]) -> Summary:
    """Figures of a run. With no successful request all times are NaN."""
    good = [record for record in records if record.ok]
    wall = max((r.last or r.sent for r in good), default=0.0) - min((r.sent for r in records), default=0.0) if good else 0.0
    tokens = sum(record.output_tokens for record in good)
    return Summary(
        completed=len(good),
        failed=len(records) - len(good),
        wall=wall,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=tokens,
        output_throughput=tokens / wall if wall else 0.0,
        ttft=Spread.of([r.ttft for r in good]),
        tpot=Spread.of([r.tpot for r in good if r.output_tokens > 1]),
        itl=Spread.of([gap for r in good for gap in r.itl]),
        e2e=Spread.of([r.e2e for r in good]),
    )
