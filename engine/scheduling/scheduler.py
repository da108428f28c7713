"""The scheduler: hands out one step's token budget so that computed tokens catch up with known ones.

Promises: (1) a step never has more rows than the budget; (2) the request that is first in order is never preempted, and as
every admitted request fits the cache alone, it always finishes: so all do; (3) a request is admitted only when the blocks of
its whole known text are reserved, so prompts never fight each other half-way.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass
from typing import NamedTuple

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.request import Request, Status
from kvloom.engine.scheduling.order import Key, Order


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A run of one request's rows: tokens [start, start + count)."""

    request: Request
    table: BlockTable
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether computed meets known at the end of this chunk, so that a token is sampled."""
        return self.stop == len(self.request.tokens)


class StepPlan(NamedTuple):
    """What one step computes. Decodes come first."""

    chunks: list[Chunk]
    preempted: list[Request]

    @property
    def rows(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Waiting and running requests of one engine. Single-threaded; owns their tables."""

    def __init__(self, cache: CacheManager, order: Order, *, max_seqs: int, max_tokens: int) -> None:
        self.cache = cache
        self.running: list[Request] = []
        self.preemptions = 0
        self.queued_tokens = 0
        self._order = order
        self._max_seqs = max_seqs
        self._max_tokens = max_tokens
        self._waiting: list[tuple[Key, Request]] = []
        self._tables: dict[Request, BlockTable] = {}

    @property
    def waiting(self) -> int:
        return sum(request.status is Status.WAITING for _, request in self._waiting)

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, request: Request, table: BlockTable) -> None:
        """Queue a request. Its table is closed when it is finished."""
        self._tables[request] = table
        self._wait(request)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its blocks go back at once, the full ones stay findable."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:  # the heap drops it when it comes to the top
            self.queued_tokens -= len(request.tokens)
        request.status = Status.FINISHED
        self.cache.close(self._tables.pop(request))

    def schedule(self) -> StepPlan:
        """The next step: running requests first (decodes before prompt chunks), then new ones as long as budget lasts."""
        plan = StepPlan([], [])
        budget = self._max_tokens
        pending = lambda r: len(r.tokens) - r.computed  # noqa: E731
        for request in sorted(self.running, key=lambda r: (pending(r) > 1, self._order.key(r))):
            if budget == 0:
                break
            if request.status is not Status.RUNNING:  # preempted for the sake of an earlier one
                continue
            count = _fitting(request, budget)
            if count == 0:
                continue
            if self._reserve(request, request.computed + count, plan):
                plan.chunks.append(Chunk(request, self._tables[request], request.computed, count))
                budget -= count
        while budget > 0 and not plan.preempted and (admitted := self._admit(plan)) is not None:
            count = _fitting(admitted, budget)
            if count == 0:  # it keeps its blocks, and comes first in the next step
                break
            chunk = Chunk(admitted, self._tables[admitted], admitted.computed, count)
            plan.chunks.append(chunk)
            budget -= count
            # Findable at once, so that requests that came together with the same beginning compute it once: a layer stores
            # the KV of all rows of a step before any row attends. Safe because nothing can take this chunk out of the plan
            # any more: whoever is admitted after it comes after it in order, and cannot displace it.
            self.cache.commit(chunk.table, admitted.tokens, chunk.stop)
        return plan

    def completed(self, chunk: Chunk, *, exact: bool = True) -> None:
        """The chunk's KV is stored. exact: it is what the prompt's rule gives, if all before it is; only then published."""
        request = chunk.request
        request.computed = chunk.stop
        if not exact:
            request.exact = min(request.exact, chunk.start)
        elif chunk.start <= request.exact:
            request.exact = chunk.stop
        self.cache.commit(chunk.table, request.tokens, min(request.exact, len(request.tokens) - request.drafts))

    def _reserve(self, request: Request, tokens: int, plan: StepPlan) -> bool:
        """Slots for `tokens` positions, preempting from the end of the order. False if the request itself had to go."""
        table = self._tables[request]
        while not self.cache.reserve(table, tokens):
            victim = max(self.running, key=self._order.key)
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """Back to the queue, to be recomputed later (from what is still cached of it)."""
        self.running.remove(victim)
        plan.chunks[:] = [chunk for chunk in plan.chunks if chunk.request is not victim]
        plan.preempted.append(victim)
        self.cache.release(self._tables[victim])
        victim.drop_drafts()
        victim.computed = victim.exact = 0
        victim.preemptions += 1
        self.preemptions += 1
        self._wait(victim)

    def _wait(self, request: Request) -> None:
        request.status = Status.WAITING
        self.queued_tokens += len(request.tokens)
        heapq.heappush(self._waiting, (self._order.key(request), request))

    def _head(self) -> Request | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _admit(self, plan: StepPlan) -> Request | None:
        """Start the head of the queue if it fits: the blocks of all its known tokens, and one spare for each running one.

        The spare keeps a newcomer from pushing out, one token later, those that run already.
        """
        request = self._head()
        if request is None:
            return None
        if len(self.running) >= self._max_seqs and not self._displace(request, plan):
            return None
        table = self._tables[request]
        match = self.cache.match(table, request.tokens)
        lacking = self.cache.blocks_for(len(request.tokens)) - len(match.blocks)
        while self.cache.available - lacking < len(self.running):
            if not self._displace(request, plan):
                self.cache.drop(match)
                return None
        self.cache.adopt(table, match, len(request.tokens))
        if not self.cache.reserve(table, len(request.tokens)):
            raise AssertionError("admission counted blocks that are not there")
        heapq.heappop(self._waiting)
        self.queued_tokens -= len(request.tokens)
        request.status = Status.RUNNING
        request.computed = request.exact = match.tokens
        if not request.first_scheduled:
            request.first_scheduled = time.monotonic()
            request.cached = min(match.tokens, len(request.prompt))
        self.running.append(request)
        return request

    def _displace(self, request: Request, plan: StepPlan) -> bool:
        """Preempt the last running request if the order lets `request` overtake it and it has no row in this step yet."""
        if not self._order.displaces or not self.running:
            return False
        victim = max(self.running, key=self._order.key)
        if self._order.key(victim)[0] <= self._order.key(request)[0]:
            return False
        self._preempt(victim, plan)
        return True


def _fitting(request: Request, budget: int) -> int:
    """Rows of a request that a step with `budget` rows left takes: 0 if it must wait for a step with more room.

    Drafts are verified in one piece; a sparse prompt is cut at its method's grid, so that the cut never depends on the budget.
    """
    pending = len(request.tokens) - request.computed
    if pending <= budget:
        return pending
    if request.verifying:
        return 0
    grid = request.selector.grid if request.selector is not None else 0
    return budget if grid == 0 else max(0, (request.computed + budget) // grid * grid - request.computed)
