"""The highest rate at which a server keeps its objectives: doubled until it does not, then halved in between.

    rate       1   2   4   8   5.7   4.8   5.2
    kept       yes yes yes no  no    yes   yes      -> 5.2 requests/s; 5.7 is too much

Every step is a stage of its own with prompts of its own. The middle of two rates is their geometric mean. The search ends when
the lowest rate that was too much is within 5% of the highest that was kept, or after so many steps. A step passes if a share of
its requests met every limit (failed ones did not), so the answer is as sure as that share is over one step's requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FASTEST = 100_000.0
"""Requests per second; one process cannot send more."""
SLOWEST = 0.001
MOST_STEPS = 50
NEAR = 1.05
"""Ratio of the rates on both sides below which a search ends."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rate that was tried."""

    rate: float
    share: float
    """Of its requests, how many met every limit."""
    kept: bool


@dataclass(slots=True)
class Search:
    """Decides which rate to try next."""

    start: float
    share: float
    """Of a step's requests that must meet every limit, 0 to 1."""
    most: int
    """Steps."""
    steps: list[Step] = field(default_factory=list)

    def next(self) -> float | None:
        """The rate to try, None when the search is over. A rate has four significant digits, as people write them."""
        low, high = self.low, self.high
        if not self.steps:
            return self.start
        if len(self.steps) >= self.most or (low and high and high / low <= NEAR):
            return None
        rate = math.sqrt(low * high) if low and high else low * 2 if low else (high or self.start) / 2
        return float(f"{rate:.4g}") if SLOWEST <= rate <= FASTEST else None

    def add(self, rate: float, share: float | None) -> None:
        """Take in what a step gave; `share` is None if none of its requests ended."""
        self.steps.append(Step(rate, share or 0.0, (share or 0.0) >= self.share))

    @property
    def low(self) -> float | None:
        """The highest rate that was kept below all that were not: above one that was too much nothing is trusted."""
        kept = [step.rate for step in self.steps if step.kept and step.rate < (self.high or math.inf)]
        return max(kept, default=None)

    @property
    def high(self) -> float | None:
        """The lowest rate that was too much."""
        return min((step.rate for step in self.steps if not step.kept), default=None)

    def result(self) -> dict[str, Any]:
        """What was found, for summary.json."""
        steps = [{"rate": step.rate, "share": step.share, "kept": step.kept} for step in self.steps]
        return {"rate": self.low, "too_much": self.high, "share": self.share, "most_steps": self.most, "steps": steps}


def sentence(found: Mapping[str, Any]) -> str:
    """What a search found, in words."""
    rate, high, steps = found["rate"], found["too_much"], len(found["steps"])
    wanted = f"{100 * found['share']:.4g}% of requests within the objectives"
    if rate is None:
        return f"No rate that was tried keeps {wanted}: {high:g} req/s was the lowest, after {steps} steps."
    if high is None:
        return f"{rate:g} req/s keeps {wanted}, and no rate that was tried is too much: more steps would try higher ones."
    return f"The highest rate that keeps {wanted} is {rate:g} req/s; {high:g} req/s is too much ({steps} steps)."
