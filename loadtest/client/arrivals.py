"""When requests are sent: open loop, closed loop, or as a trace says.

Open loop, as in `vllm bench serve`: gaps are drawn from a gamma distribution with shape `burstiness` and mean 1 / rate (1 is
Poisson, less is burstier, more is steadier), then scaled so that the last of N requests is due at exactly N / rate. A ramp
changes the rate from request to request and is not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from kvloom.loadtest.client.record import Job

Mode = Literal["open", "closed", "trace"]
Curve = Literal["linear", "exponential"]


class Ramp(NamedTuple):
    """A rate that changes over the run, in requests per second."""

    curve: Curve
    start: float
    end: float

    def rate(self, progress: float) -> float:
        """The rate after a share of the requests, 0 to 1."""
        if self.curve == "linear":
            return self.start + (self.end - self.start) * progress
        return float(self.start * (self.end / self.start) ** progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How one stage sends. Without rate, ramp and concurrency: when the jobs' `at` says."""

    rate: float | None = None
    """Requests per second; inf sends all at once."""
    burstiness: float = 1.0
    ramp: Ramp | None = None
    concurrency: int | None = None
    """Closed loop: this many under way, each sent when one before it ended."""
    max_concurrency: int | None = None
    """Open loop or trace: a request waits while this many are under way."""
    seconds: float | None = None
    """How long the stage sends; what is under way then is waited for. None: until all its requests are sent."""

    @property
    def mode(self) -> Mode:
        if self.concurrency is not None:
            return "closed"
        return "trace" if self.rate is None and self.ramp is None else "open"

    @property
    def limit(self) -> int | None:
        """Most requests under way."""
        return self.concurrency if self.concurrency is not None else self.max_concurrency

    @property
    def name(self) -> str:
        """The stage's name in reports."""
        if self.concurrency is not None:
            name = f"concurrency {self.concurrency}"
        elif self.ramp is not None:
            name = f"rate {self.ramp.start:g} to {self.ramp.end:g}"
        else:
            name = "trace" if self.rate is None else f"rate {self.rate:g}"
        return name if self.seconds is None else f"{name} for {self.seconds:g} s"


def due_times(load: Load, jobs: Sequence[Job], seed: int) -> list[float]:
    """Seconds after the start at which each job is due. Raises ValueError if a trace lacks times."""
    if load.mode == "closed":
        return [0.0] * len(jobs)
    if load.mode == "trace":
        if missing := sum(job.at is None for job in jobs):
            raise ValueError(f"{missing} of {len(jobs)} requests have no time of their own to be sent at")
        return [float(job.at or 0.0) for job in jobs]
    return _open_loop(load, len(jobs), seed)


def _open_loop(load: Load, count: int, seed: int) -> list[float]:
    if load.rate is not None and math.isinf(load.rate):
        return [0.0] * count
    rates = np.array([load.ramp.rate(i / count) if load.ramp else load.rate for i in range(count)], dtype=float)
    random = np.random.default_rng(seed)
    due = np.cumsum(random.gamma(load.burstiness, 1 / (rates * load.burstiness)))
    if load.ramp is None and count and due[-1] > 0:
        due *= count / rates[0] / due[-1]
    return [float(t) for t in due]
