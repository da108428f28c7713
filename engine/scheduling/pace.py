"""Streams do not wait for prompts: while something decodes, a step's rows of prompts are sized by time, not by count.

    step       prompts get what decoding leaves of `step_seconds`, or as much as decoding takes itself if that is more
    tenants    beside streams of others, a tenant's prompts get FAVOUR * w / w' of the time that passes without them: w is its
               weight, w' the mean weight of the others, and their ratio counts for 1/8 to 8. Up to BURST_SECONDS of that are
               saved up, and a piece may be overdrawn
    cost       of rows [s, s + n) of a sequence: a n + b n (s + n / 2) seconds, fitted to the steps that were measured

With nobody decoding a step is as large as its budget, within ALONE * `step_seconds`: so long may wait whoever comes next. A
stream that ended less than RECENT_SECONDS ago still counts for others: who comes back for more finds no such step under way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvloom.engine.requests.plan import StepPlan, least, prefills
from kvloom.engine.requests.request import Request

MOST_ROWS = 2**31
"""As many as there is room for."""
FAVOUR = 0.2
"""Time for the prompts of a tenant in that of a stream of another one of the same weight."""
MOST_RATIO = 8.0
"""Of weights, here: however small its weight, a tenant's prompts go on."""
BURST_SECONDS = 0.5
MOST_DEBT = 4.0
"""Of these: what a piece took is charged, and not what the machine did meanwhile."""
RECENT_SECONDS = 1.0
ALONE = 10.0
LEAST_ROWS = 16
"""A piece of a prompt has at least so many rows: fewer cost hardly less."""
PROBE_STEPS = 16
"""After so many steps with prompts, or two where many more or fewer decode than before, one has none: what decoding alone takes
is measured anew."""
FORGET = 0.9
"""What a measured step counts once another has been."""
OUTLIER = 1.5
"""A step that took more than so many times what was expected counts for that: something else had the machine."""


@dataclass(slots=True)
class StepCost:
    """What steps take, from those measured. Seconds; 0 until there has been one."""

    rows_per_second: float = 0.0
    """Of steps that compute prompts, a moving average."""
    base: float = 0.0
    """A step without rows of prompts, a moving average."""
    per_row: float = 0.0
    per_pair: float = 0.0
    """For a row of a prompt, and for each position that it sees."""
    _streams: int = 0
    """Requests that decoded when `base` was measured."""
    _sums: tuple[float, ...] = (0.0,) * 5
    """Of the measured steps, each by its weight: 1, x, x * x, y, x * y; y: seconds per row, x: positions that a row sees."""

    def rows(self, seconds: float, start: int) -> float:
        """Rows of a prompt from position `start` on that take so long."""
        first = self.per_row + self.per_pair * start
        if first <= 0 or seconds == math.inf:
            return math.inf
        return 2 * seconds / (first + math.sqrt(first * first + 2 * self.per_pair * seconds))

    def seconds(self, rows: float, start: int) -> float:
        """What that many take."""
        return self.per_row * rows + self.per_pair * rows * (start + rows / 2)

    def plain(self, seconds: float, streams: int) -> None:
        """A step without rows of prompts took so long, for so many requests."""
        if self.outgrown(streams):
            self.base, self._streams = seconds, streams
        self.base += 0.5 * (min(seconds, OUTLIER * self.base) - self.base)

    def outgrown(self, streams: int) -> bool:
        """Whether `base` is of so many fewer, or more, that it says nothing of these."""
        return not 2 * self._streams / 3 <= streams <= 3 * self._streams / 2

    def prompts(self, rows: float, pairs: float, seconds: float, *, beside: bool) -> float:
        """A step with so many rows of prompts, and positions seen by them, took so long. Returns what they took of it.

        beside: whether it decoded as well."""
        expected = self.per_row * rows + self.per_pair * pairs
        took = max(0.0, seconds - self.base if beside else seconds)
        if expected and self._sums[0] > 2:  # the first few are not known well
            took = min(took, OUTLIER * expected)
        weight = min(1.0, rows / LEAST_ROWS)  # a few rows that are only looked at take as long as any step, and say little
        if seconds > 0:
            self.rows_per_second += (rows / seconds - self.rows_per_second) * (0.2 * weight if self.rows_per_second else 1.0)
        self._fit(pairs / rows, took / rows, weight)
        return took

    def _fit(self, x: float, y: float, weight: float) -> None:
        """Least squares with neither coefficient below 0."""
        now = (1.0, x, x * x, y, x * y)
        self._sums = s, sx, sxx, sy, sxy = tuple(FORGET * old + weight * new for old, new in zip(self._sums, now))
        self.per_row, self.per_pair = sy / s, 0.0
        spread = s * sxx - sx * sx
        if spread > 1e-3 * s * sxx:  # contexts that differ enough to tell
            a, b = (sxx * sy - sx * sxy) / spread, (s * sxy - sx * sy) / spread
            if a > 0 and b > 0:
                self.per_row, self.per_pair = a, b


class Pace:
    """How many rows of a prompt a step takes."""

    def __init__(self, step_seconds: float, weight: Callable[[str], float], clock: Callable[[], float]) -> None:
        """step_seconds: how long a step beside streams takes; infinite: as long as its prompts take. weight: of a
        tenant, > 0."""
        self.cost = StepCost()
        self._step_seconds, self._weight, self._clock = step_seconds, weight, clock
        self._streams: set[str] = set()
        """Tenants of whom something decodes now."""
        self._seen: dict[str, float] = {}
        """Tenants of whom something decoded lately, and when it last did."""
        self._saved: dict[str, float] = {}
        """Seconds that the prompts of a tenant may take beside streams of others; BURST_SECONDS where there is none."""
        self._began = self._ended = clock()
        self._left = 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)
        """Seconds that the prompts of this step are expected to take, by tenant."""
        self._rows, self._decodes = 0.0, 0
        """Of the step that was planned: rows of prompts, by the work they take, and requests that decode."""
        self._pairs = 0.0
        """Positions that those rows see, summed over them."""
        self._mixed = 0
        """Steps with prompts since one that only decoded."""

    def begin(self, running: Collection[Request]) -> None:
        """A step is to be planned, with these running."""
        self._began = self._clock()
        self._streams = {request.tenant for request in running if not request.internal and not prefills(request)}
        self._seen |= dict.fromkeys(self._streams, self._began)
        self._seen = {tenant: when for tenant, when in self._seen.items() if self._began - when < RECENT_SECONDS}
        streams = sum(not prefills(request) for request in running)
        base = self.cost.base if streams else 0.0
        self._left = max(self._step_seconds - base, base)
        if streams and self._mixed >= (2 if self.cost.outgrown(streams) else PROBE_STEPS):
            self._left, self._mixed = 0.0, 0
        self._spent.clear()

    def rows(self, request: Request) -> int:
        """Most rows that the step being planned takes of a request's prompt: at least a piece that can be computed, or 0."""
        seconds = self._seconds(request.tenant)
        if seconds <= 0:
            return 0
        rows = self.cost.rows(seconds, request.computed)
        if request.looks is not None:
            rows /= request.looks.depth
        return int(min(MOST_ROWS, max(LEAST_ROWS, least(request), rows)))

    def ready(self, tenant: str) -> bool:
        """Whether the step being planned takes rows of a tenant's prompts."""
        return self._seconds(tenant) > 0

    def _seconds(self, tenant: str) -> float:
        """What prompts of a tenant may take of the step."""
        seconds = self._left
        if tenant not in self._streams and not any(other != tenant for other in self._seen):
            seconds += (ALONE - 1) * self._step_seconds
        if self._streams - {tenant}:
            seconds = min(seconds, self._saved.get(tenant, BURST_SECONDS) - self._spent.get(tenant, 0.0))
        return seconds

    def spend(self, request: Request, rows: float) -> None:
        """The step takes so many of them, or as much work."""
        seconds = self.cost.seconds(rows, request.computed)
        self._left -= seconds
        self._spent[request.tenant] += seconds

    def planned(self, plan: StepPlan) -> None:
        """What the step computes is certain."""
        prompts = [chunk for chunk in plan.chunks if chunk.prefills]
        self._rows = sum((chunk.work for chunk in prompts), 0.0)
        self._pairs = sum((chunk.work * (chunk.start + chunk.count / 2) for chunk in prompts), 0.0)
        self._decodes = len(plan.chunks) - len(prompts)

    def end(self) -> None:
        """The step is over: all that was done for it, until now."""
        now, took = self._clock(), 0.0
        if self._rows:
            took = self.cost.prompts(self._rows, self._pairs, now - self._began, beside=self._decodes > 0)
            self._mixed += 1
        elif self._decodes:
            self.cost.plain(now - self._began, self._decodes)
            self._mixed = 0
        self._settle(took, now - self._ended)
        self._ended = now

    def _settle(self, took: float, passed: float) -> None:
        """Prompts took so long, of the time that has passed."""
        planned, weights = sum(self._spent.values()), {stream: self._weight(stream) for stream in self._streams}
        total = sum(weights.values())
        for tenant in {*self._saved, *self._spent}:
            weight, saved = self._weight(tenant), self._saved.pop(tenant, BURST_SECONDS)
            own = took * self._spent.get(tenant, 0.0) / planned if planned else 0.0
            others = len(weights) - (tenant in weights)
            mean = (total - weights.get(tenant, 0.0)) / others if others else weight
            saved += max(0.0, passed - own) * FAVOUR * min(MOST_RATIO, max(1 / MOST_RATIO, weight / mean))
            saved -= own if others else 0.0
            if saved < BURST_SECONDS:
                self._saved[tenant] = max(saved, -MOST_DEBT * BURST_SECONDS)
