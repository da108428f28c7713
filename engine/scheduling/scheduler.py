"""The scheduler: hands out one step's token budget so that computed tokens catch up with known ones.

Promises: (1) a step never has more rows than the budget; (2) the request that is first in order is never preempted, and as
every admitted request fits the cache alone, it always finishes: so all do; (3) a request is admitted only when the blocks of
its whole known text are reserved, so prompts never fight each other half-way; (4) rows that do not fit a step take turns:
who was left out longest comes first, so neither a decode row nor a prompt waits for ever behind a step full of others; (5) a
plan that is not computed is taken back, as if it had never been made.

Who is admitted next is the business of `queue`: lanes per tenant, credit (`fairness`), and an order within.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.isolation import Blamed
from kvloom.engine.replay import rewind
from kvloom.engine.request import Request, Status
from kvloom.engine.scheduling.cache_aware import Estimator, PrefixEstimator, ScoredLane, Speed, Surroundings
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.engine.scheduling.order import Key, Order
from kvloom.engine.scheduling.publishing import exact_until
from kvloom.engine.scheduling.queue import KeyedLane, Lane, WaitingQueue
from kvloom.engine.state import StateMemory

INTERNAL_ROWS = 128
"""Most rows per step of the engine's own work."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows of one request: tokens [start, start + count), or those at `positions`."""

    request: Request
    table: BlockTable
    start: int
    count: int
    positions: npt.NDArray[np.int64] | None = None
    """[count], ascending, the first is `start`: rows of a prompt whose other rows hold reused KV."""
    refresh: bool = False
    """Whether these rows only bring their KV up to date: the request has gone on without them, nothing is sampled."""

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.count if self.positions is None else int(self.positions[-1]) + 1

    @property
    def samples(self) -> bool:
        """Whether computed meets known at the end of this chunk, so that a token is sampled."""
        return self.stop == len(self.request.tokens) and not self.refresh

    @property
    def decodes(self) -> bool:
        """Whether this is a decode row: one token beyond what is computed like a prompt, at the end of what is known."""
        request = self.request
        return self.count == 1 and self.samples and self.start >= max(len(request.prompt), request.prefill)


class Reuse(Protocol):
    """Brings KV from elsewhere than the prefix index, and repairs it (`engine.reuse.kvshare`)."""

    def prepare(self, request: Request, table: BlockTable) -> float:
        """The request has been admitted: its prefix is adopted (`computed`), blocks of all its tokens are reserved. May fill
        some of them and set `request.repair`. Returns the work that took, in rows of a full pass: 0 or more. What it raises
        ends the request."""
        ...

    def refresh(self, plan: StepPlan, rows: int) -> list[Chunk]:
        """Rows beside those of the plan that bring reused KV up to date, at most `rows`; more are left out. Raises Blamed."""
        ...


class StepPlan(NamedTuple):
    """What one step computes. Decodes come first."""

    chunks: list[Chunk]
    preempted: list[Request]

    @property
    def rows(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


QUANTUM_STEPS = 4
"""What a tenant of weight 1 gets per round of credit, in steps with a full budget."""

PATIENCE = 4
"""Steps in a row without a row after which a prompt, or drafts to verify, come before decode rows: those need one row each and
wait less. The queue is as patient, when steps are full without a prompt among them."""


class Scheduler:
    """Waiting and running requests of one engine. Single-threaded; owns their tables."""

    def __init__(
        self,
        cache: CacheManager,
        order: Order,
        *,
        max_seqs: int,
        max_tokens: int,
        reuse: Reuse | None = None,
        states: StateMemory | None = None,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        max_wait: float = 2.0,
        estimator: Estimator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """weight: a tenant's share of the work while others wait. With an order that scores, `max_wait` is in seconds, and
        `estimator` says what a waiting request will cost (default: by its exact prefix). clock: what `arrival` is read from."""
        self.cache = cache
        self.running: list[Request] = []
        self.preemptions = 0
        self.queued_tokens = 0
        self._order = order
        self._reuse = reuse
        self._states = states or StateMemory(0)
        self._max_seqs = max_seqs
        self._max_tokens = max_tokens
        self._tables: dict[Request, BlockTable] = {}
        self._clock = clock
        self._admitted: list[Request] = []
        """By the last plan."""
        self._considered: Request | None = None
        """Whom a part of `schedule` is about, and who is to blame if it fails."""
        self._queue_left_out = 0
        """Steps in a row that left no row for who waits, and had no prompt in them."""
        self._speed = Speed(clock)
        self._fairness = Fairness(QUANTUM_STEPS * max_tokens, weight)
        around = Surroundings(
            cache, self._tables, self.running, estimator or PrefixEstimator(cache), self._speed, clock, max_wait
        )

        def lane(tenant: str) -> Lane:
            return ScoredLane(tenant, around) if order.scores else KeyedLane(order.key)

        self._waiting = WaitingQueue(self._fairness, lane)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, request: Request, table: BlockTable) -> None:
        """Queue a request. Its table is closed when it is finished."""
        self._tables[request] = table
        request.draft_room = self._max_tokens - 1
        self._fairness.arrived(request)
        self._wait(request)

    def charge(self, tenant: str, seconds: float) -> None:
        """Time spent on a tenant beside its requests, as if it had computed rows of prompts."""
        self._fairness.charge(tenant, seconds * self._speed.rows_per_second)

    def table(self, request: Request) -> BlockTable:
        """Where a request's KV is."""
        return self._tables[request]

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its blocks go back at once, the full ones stay findable."""
        if request.status is Status.FINISHED or request not in self._tables:
            return
        status, request.status = request.status, Status.FINISHED
        table = self._tables.pop(request)
        try:
            self._fairness.stopped(request)
            if status is Status.RUNNING:
                self.running.remove(request)
                self._states.close(request)
            else:
                self.queued_tokens -= request.known
                self._waiting.remove(request)
        finally:
            self._fairness.left(request, contended=len(self._waiting) > 0)
            self.cache.close(table)

    def schedule(self) -> StepPlan:
        """The next step: running requests first (decodes before prompt chunks), then new ones as long as budget lasts.

        Raises Blamed if that failed for one request, or whatever else went wrong; nothing is planned then.
        """
        plan = StepPlan([], [])
        self._considered, self._admitted = None, []
        try:
            self._plan(plan)
        except Exception as error:
            self.take_back(plan)
            if self._considered is None or isinstance(error, Blamed):
                raise
            raise Blamed(self._considered) from error
        self._take_turns(plan)
        self._speed.begin(plan.rows if any(chunk.count > 1 for chunk in plan.chunks) else 0)
        return plan

    def take_back(self, plan: StepPlan) -> None:
        """The last plan will not be computed: those it admitted wait again, and nothing of them can be found."""
        for request in self._admitted:
            if request.status is Status.RUNNING:
                self.cache.retract(self._tables[request], request.computed)
                self._preempt(request, plan)

    def _plan(self, plan: StepPlan) -> None:
        held = -(-self._max_tokens // 2) if self._queue_left_out >= PATIENCE else 0
        budget = held + self._go_on(plan, self._max_tokens - held)
        full = budget == 0 and not any(_of_prompt(chunk) for chunk in plan.chunks)
        self._queue_left_out = self._queue_left_out + 1 if full and len(self._waiting) else 0
        if not plan.preempted:
            budget = self._welcome(plan, budget)
        if held and not self._admitted:
            budget = self._go_on(plan, budget)
        if self._reuse is not None and budget > 0:
            for chunk in self._reuse.refresh(plan, budget):
                budget -= chunk.count
                if budget < 0:  # more than was asked for: a step's buffers have no room for it
                    break
                plan.chunks.append(chunk)

    def _go_on(self, plan: StepPlan, budget: int) -> int:
        """Chunks of running requests that have none yet. Returns the rows that are left."""
        planned = {chunk.request for chunk in plan.chunks}
        for request in sorted(self.running, key=self._turn):
            if budget == 0:
                break
            if request.status is not Status.RUNNING or request in planned:  # or preempted for the sake of an earlier one
                continue
            self._considered = request
            if request.unprepared:
                budget = max(1, budget - self._prepare(request))
            chunk = self._chunk(request, budget)
            if chunk is not None and self._reserve(request, chunk.stop, plan):
                plan.chunks.append(chunk)
                budget -= chunk.count
        self._considered = None
        return budget

    def _welcome(self, plan: StepPlan, budget: int) -> int:
        """Admit requests, and chunks of them, as long as budget lasts. Returns the rows that are left."""
        running = len(plan.chunks)
        while budget > 0 and (admitted := self._admit(plan)) is not None:
            self._admitted.append(admitted)
            if admitted.unprepared:
                if (
                    admitted.computed and len(plan.chunks) > running
                ):  # what it begins with may be computed in this very step: wait for it
                    continue
                budget = max(1, budget - self._prepare(admitted))
            chunk = self._chunk(admitted, budget)
            if chunk is None:  # it keeps its blocks, and comes first in the next step
                break
            plan.chunks.append(chunk)
            budget -= chunk.count
            # Findable at once, so that requests that came together with the same beginning compute it once: a layer stores
            # the KV of all rows of a step before any row attends. Safe because nothing can take this chunk out of the plan
            # any more: whoever is admitted after it comes after it in order, and cannot displace it. If the step fails as a
            # whole, `take_back` makes it unfindable again.
            until = exact_until(chunk, saw_everything=not (chunk.decodes and admitted.sparse))
            self.cache.commit(chunk.table, admitted.tokens, min(until, admitted.taint))
        self._considered = None
        return budget

    def _turn(self, request: Request) -> tuple[int, bool, Key]:
        """Who comes first in a step: those left out longest, then decodes before prompts, then by the order."""
        many = request.pending > 1
        return (-(request.left_out // PATIENCE if many else request.left_out), many, self._order.key(request))

    def _take_turns(self, plan: StepPlan) -> None:
        """Note who got no row. A prompt behind an earlier one that was computed is not left out: prompts go one by one."""
        planned = {chunk.request for chunk in plan.chunks}
        first = min((self._order.key(chunk.request) for chunk in plan.chunks if _of_prompt(chunk)), default=None)
        for request in self.running:
            if request in planned:
                request.left_out = 0
            elif first is None or request.pending == 1 or request.verifying or self._order.key(request) < first:
                request.left_out += 1

    def completed(self, chunk: Chunk, *, saw_everything: bool = True) -> None:
        """The chunk's KV is stored, and published as far as it is exact. saw_everything: its rows, if they are decode rows."""
        request = chunk.request
        self._speed.end()
        self._fairness.computed(request, chunk.start, chunk.count)
        if chunk.refresh:
            assert request.repair is not None and chunk.positions is not None
            request.repair.refresh(chunk.positions)
        else:
            if request.repair is not None and request.repair.left:
                request.repair.advance(chunk.count)
            request.computed = chunk.stop
        if chunk.start <= request.exact:
            healed = chunk.refresh and request.taint > request.computed
            until = exact_until(chunk, saw_everything=saw_everything)
            request.exact = request.computed if healed else min(until, request.taint)
        self.cache.commit(chunk.table, request.tokens, min(request.exact, len(request.tokens) - request.drafts))

    def _prepare(self, request: Request) -> int:
        """Let KV be reused for a request that has been admitted. Returns the work in rows, at most a step's."""
        assert self._reuse is not None
        request.unprepared = False
        work = round(min(max(0.0, self._reuse.prepare(request, self._tables[request])), self._max_tokens))
        self._fairness.computed(request, 0, work)
        return work

    def _chunk(self, request: Request, budget: int) -> Chunk | None:
        """The request's next rows, as many as fit."""
        count = _fitting(request, budget)
        if count == 0:
            return None
        table, repair = self._tables[request], request.repair
        if repair is None or not repair.left:
            return Chunk(request, table, request.computed, count)
        seeds = request.selector is not None and request.selector.prompts == "seed"  # looks at the last rows: they stand alone
        rows = repair.next(count, tail_alone=seeds)
        scattered = None if rows[-1] - rows[0] == len(rows) - 1 else rows
        return Chunk(request, table, int(rows[0]), len(rows), scattered)

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
        self._states.close(victim)
        plan.chunks[:] = [chunk for chunk in plan.chunks if chunk.request is not victim]
        plan.preempted.append(victim)
        table = self._tables[victim]
        rewind(victim, evicted=table.forgotten > 0)
        self.cache.release(table)
        victim.left_out = 0
        victim.preemptions += 1
        self._fairness.stopped(victim)
        self.preemptions += 1
        self._wait(victim)

    def _wait(self, request: Request) -> None:
        request.status = Status.WAITING
        self.queued_tokens += request.known
        self._waiting.push(request)

    def _admit(self, plan: StepPlan) -> Request | None:
        """Start the head of the queue if it fits: the blocks of all its known tokens, and one spare for each running one; and
        the state of its selection method.

        The spare keeps a newcomer from pushing out, one token later, those that run already.
        """
        request = self._considered = self._waiting.head()
        if request is None:
            return None
        if len(self.running) >= self._max_seqs and not self._displace(request, plan):
            return None
        table = self._tables[request]
        match = self.cache.match(table, request.tokens)
        lacking = self.cache.blocks_for(request.known) - len(match.blocks)
        while self.cache.available - lacking < len(self.running) or not self._states.fits(request):
            if not self._displace(request, plan):
                self.cache.drop(match)
                return None
        self.cache.adopt(table, match, 0 if request.preemptions else len(request.tokens))
        if not self.cache.reserve(table, request.known):
            raise AssertionError("admission counted blocks that are not there")
        self._waiting.take(request)
        self._fairness.admitted(request, len(request.tokens) - match.tokens)
        self.queued_tokens -= request.known
        request.status = Status.RUNNING
        self._states.open(request)
        request.computed = request.exact = match.tokens
        request.unprepared = request.approximate
        if not request.first_scheduled:
            request.first_scheduled = self._clock()
            request.cached = min(match.tokens, len(request.prompt))
        self.running.append(request)
        return request

    def _displace(self, request: Request, plan: StepPlan) -> bool:
        """Preempt its tenant's last running request if the order lets `request` overtake it."""
        if not self._order.displaces:
            return False
        victim = max((r for r in self.running if r.tenant == request.tenant), key=self._order.key, default=None)
        if victim is None or self._order.key(victim)[0] <= self._order.key(request)[0]:
            return False
        self._preempt(victim, plan)
        return True


def _of_prompt(chunk: Chunk) -> bool:
    return chunk.start < len(chunk.request.prompt) and not chunk.refresh


def _fitting(request: Request, budget: int) -> int:
    """Rows of a request that a step with `budget` rows left takes: 0 if it must wait for a step with more room.

    Drafts are verified in one piece, of at most a step's rows; a sparse prompt is cut at its method's grid, and the last rows
    that a method looks at stay together, so that what it sees never depends on the budget.
    """
    pending = request.pending
    if request.internal:  # whoever comes meanwhile waits for the end of the step
        budget = min(budget, INTERNAL_ROWS)
    if pending <= budget:
        return pending
    if request.verifying:
        return 0
    grid, tail = (0, 0) if request.selector is None else (request.selector.grid, request.selector.tail)
    budget = min(budget, max(0, pending - tail))
    return budget if grid == 0 else max(0, (request.computed + budget) // grid * grid - request.computed)
