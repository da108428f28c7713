"""The scheduler: hands out one step's token budget so that computed tokens catch up with known ones.

Promises: (1) a step never has more rows than the budget; (2) the request that is first in order is never preempted, and as
every admitted request fits the cache alone, it always finishes: so all do; (3) slots, blocks and the rows of prompts are shared
by weight too (`shares`), so nobody waits for another tenant's long answers or prompts; (4) a request is admitted only when the
blocks of its whole known text are reserved, so prompts never fight each other half-way; (5) rows that do not fit a step take
turns: who was left out longest comes first; (6) a plan that is not computed is taken back, as if it had never been made.

Who is admitted next is the business of `queue`: lanes per tenant, credit (`fairness`), and an order within.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.requests.isolation import Blamed
from kvloom.engine.requests.plan import Chunk, Reuse, StepPlan, of_prompt, prefills
from kvloom.engine.requests.replay import rewind
from kvloom.engine.requests.request import Request, Status
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.scheduling.cache_aware import Estimator, PrefixEstimator, ScoredLane, Surroundings
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.engine.scheduling.foresight import Foresight
from kvloom.engine.scheduling.order import Order
from kvloom.engine.scheduling.pace import Pace
from kvloom.engine.scheduling.progress import Progress
from kvloom.engine.scheduling.publishing import exact_until
from kvloom.engine.scheduling.queue import KeyedLane, Lane, WaitingQueue
from kvloom.engine.scheduling.room import Room
from kvloom.engine.scheduling.shares import Shares
from kvloom.engine.scheduling.turns import TURN_STEPS, Turns

MOST_TRIES = 8
"""Heads of lanes that are tried per admission."""
QUANTUM_STEPS = 4
"""What a tenant of weight 1 gets per round of credit, in steps with a full budget."""


class Scheduler:
    """Waiting and running requests of one engine. Single-threaded; owns their tables."""

    def __init__(
        self,
        cache: CacheManager,
        order: Order,
        *,
        max_seqs: int,
        max_tokens: int,
        step_seconds: float = math.inf,
        reuse: Reuse | None = None,
        states: StateMemory | None = None,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        max_wait: float = 2.0,
        estimator: Estimator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """step_seconds: how long a step beside streams takes (`pace`). weight: a tenant's share of the work
        while others wait. With an order that scores, `max_wait` is in seconds, and `estimator` says what a waiting request will
        cost (default: by its exact prefix). clock: what `arrival` is read from."""
        self.cache = cache
        self.running: list[Request] = []
        self.preemptions = 0
        self.queued_tokens = 0
        self._order = order
        self._turns = Turns(order.key)
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
        self._pace = Pace(step_seconds, weight, clock)
        self._fairness = Fairness(QUANTUM_STEPS * max_tokens, weight)
        self._progress = Progress(cache, self._tables, self._fairness, reuse, max_tokens, self.charge)
        self._shares = Shares(weight, order.key, lambda request: len(self._tables[request].blocks))
        self._room = Room(cache, self._tables, self.running, self._states, order, self._shares, self._fairness, max_seqs)
        around = Surroundings(
            cache, self._tables, self.running, estimator or PrefixEstimator(cache), self._pace.cost, clock, max_wait
        )

        def lane(tenant: str) -> Lane:
            return ScoredLane(tenant, around) if order.scores else KeyedLane(order.key)

        self._waiting = WaitingQueue(self._fairness, lane)
        self.foresight = Foresight(cache, self.running, self._waiting, self._pace)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, request: Request, table: BlockTable) -> None:
        """Queue a request. Its table is closed when it is finished."""
        self.foresight.changed()
        self._tables[request] = table
        request.draft_room = self._max_tokens - 1
        self._fairness.arrived(request)
        self._wait(request)

    def charge(self, tenant: str, rows: float) -> None:
        """Count work that is no request's against a tenant: rows of a full pass, such as what a look-up takes."""
        self._fairness.charge(tenant, rows, contended=len(self._waiting) > 0)

    def charge_time(self, tenant: str, seconds: float) -> None:
        """The same for time spent on a tenant, as if it had computed rows of prompts."""
        self.charge(tenant, seconds * self._pace.cost.rows_per_second)

    def table(self, request: Request) -> BlockTable:
        """Where a request's KV is."""
        return self._tables[request]

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its blocks go back at once, the full ones stay findable."""
        if request.status is Status.FINISHED or request not in self._tables:
            return
        self.foresight.changed()
        status, request.status = request.status, Status.FINISHED
        table = self._tables.pop(request)
        try:
            self._fairness.stopped(request)
            if status is Status.RUNNING:
                self._states.close(request)
                self.running.remove(request)
            else:
                self.queued_tokens -= request.known
                self._waiting.remove(request)
        finally:
            self._fairness.left(request, contended=len(self._waiting) > 0)
            self._room.left(request.tenant)
            self.cache.close(table)

    def schedule(self) -> StepPlan:
        """The next step: running requests first (decodes before prompt chunks), then new ones as long as budget lasts.

        Raises Blamed if that failed for one request, or whatever else went wrong; nothing is planned then.
        """
        plan = StepPlan([], [])
        self._considered, self._admitted = None, []
        self._room.begin()
        self._pace.begin(self.running)
        try:
            self._plan(plan)
        except Exception as error:
            self.take_back(plan)
            if self._considered is None or isinstance(error, Blamed):
                raise
            raise Blamed(self._considered) from error
        self.foresight.planned(admitted=bool(self._admitted))
        self._turns.planned(plan, self.running)
        self._pace.planned(plan)
        return plan

    def stepped(self) -> None:
        """The step is over: all that it takes has been done. The next ones are sized by how long that was."""
        self._pace.end()

    def take_back(self, plan: StepPlan) -> None:
        """The last plan will not be computed: those it admitted wait again, and nothing of them can be found."""
        for request in self._admitted:
            if request.status is Status.RUNNING:
                self.cache.retract(self._tables[request], request.computed)
                self._preempt(request, plan)

    def _plan(self, plan: StepPlan) -> None:
        held = -(-self._max_tokens // 2) if self._queue_left_out >= TURN_STEPS else 0
        budget = held + self._run_on(plan, self._max_tokens - held)
        full = budget == 0 and not any(of_prompt(chunk) for chunk in plan.chunks)
        self._queue_left_out = self._queue_left_out + 1 if full and len(self._waiting) else 0
        budget = self._welcome(plan, budget)
        if held and not self._admitted:
            budget = self._run_on(plan, budget)
        if self._reuse is not None and budget > 0:
            self._refresh(self._reuse, plan, budget)

    def _refresh(self, reuse: Reuse, plan: StepPlan, budget: int) -> None:
        """Rows that bring reused KV up to date, of those whose streams are in the plan."""
        rows = {chunk: self._pace.rows(chunk.request) for chunk in plan.chunks if chunk.request.repair is not None}
        if not rows:
            return
        able = StepPlan([chunk for chunk in rows if rows[chunk]], [])
        for chunk in reuse.refresh(able, min(budget, max(rows.values()))):
            budget -= chunk.count
            if budget < 0:  # more than was asked for: a step's buffers have no room for it
                break
            self._pace.spend(chunk.request, chunk.count)
            plan.chunks.append(chunk)

    def _run_on(self, plan: StepPlan, budget: int) -> int:
        """Chunks of running requests that have none yet: decodes and who was left out, then prompts by their tenants' shares.
        Returns the rows that are left."""
        planned = {chunk.request for chunk in plan.chunks}
        order = [request for request in sorted(self.running, key=self._turns.key) if request not in planned]
        prompts = [request for request in order if prefills(request) and request.pending > 1 and request.left_out < TURN_STEPS]
        for request in order:
            if request not in prompts:
                budget -= self._go_on(request, budget, budget, plan)
        budget -= self._let_in(budget, plan)
        prompts = [request for request in prompts if request.status is Status.RUNNING]
        rooms = self._rooms(prompts, budget)
        for request in prompts:
            spent = self._go_on(request, budget, rooms[request.tenant], plan)
            rooms[request.tenant] -= spent
            budget -= spent
        self._considered = None
        return budget

    def _rooms(self, prompts: list[Request], budget: int) -> Counter[str]:
        """Rows of this step for the prompts of every tenant."""
        if not prompts:
            return Counter()
        demand, most = Counter[str](), 0
        for request in prompts:
            if rows := self._pace.rows(request):
                demand[request.tenant] += request.pending
                most = max(most, rows)
        return Counter(self._shares.split(min(budget, most), demand))

    def _go_on(self, request: Request, budget: int, room: int, plan: StepPlan) -> int:
        """A running request's rows of this step, at most `room`, which is what its tenant has of the `budget`. Returns how much
        of that it took."""
        if prefills(request):
            most = self._pace.rows(request)
            budget, room = min(budget, most), min(room, most)
        if budget <= 0 or room <= 0 or request.status is not Status.RUNNING:  # it was preempted for the sake of another one
            return 0
        self._considered = request
        work = self._progress.prepare(request) if request.unprepared else 0
        self._pace.spend(request, work)
        left = max(1, budget - work)
        chunk = self._progress.chunk(request, max(1, min(left, room - work)))
        if chunk is None and request is min(self.running, key=self._order.key):  # the first in order is never kept waiting
            chunk = self._progress.chunk(request, left)
        if chunk is None or not self._reserve(request, chunk.stop, plan):
            return min(work, budget - 1)
        if chunk.prefills:
            self._pace.spend(request, chunk.work)
        plan.chunks.append(chunk)
        return min(work, budget - 1) + chunk.count

    def _let_in(self, budget: int, plan: StepPlan) -> int:
        """While prompts run that could take all rows: begin a request of a tenant that has nothing running, with the tenant's
        share of them. Returns what it took."""
        busy = {request.tenant for request in self.running}
        if budget <= 0 or plan.preempted or not any(request.pending > 1 for request in self.running):
            return 0
        admitted = self._admit(plan, lambda request: request.tenant not in busy and self._paced(request))
        if admitted is None:
            return 0
        busy = {request.tenant for request in self.running if request.pending > 1}
        demand = dict.fromkeys({*busy, admitted.tenant}, budget)
        share = self._shares.split(min(budget, self._pace.rows(admitted)), demand)[admitted.tenant]
        return self._begin(admitted, share, plan, alone=True) or 0

    def _welcome(self, plan: StepPlan, budget: int) -> int:
        """Admit requests, and chunks of them, as long as budget lasts. Returns the rows that are left."""
        running = len(plan.chunks)
        while budget > 0 and not plan.preempted and (admitted := self._admit(plan, self._paced)) is not None:
            begun = self._begin(admitted, budget, plan, alone=len(plan.chunks) == running)
            if begun is None:
                break
            budget -= begun
        self._considered = None
        return budget

    def _paced(self, request: Request) -> bool:
        """Whether the step that is planned takes anything of a request's tenant's prompts."""
        return self._pace.ready(request.tenant)

    def _begin(self, admitted: Request, budget: int, plan: StepPlan, *, alone: bool) -> int | None:
        """The first rows of a request that has been admitted. Returns how much of the budget that took; None if it needs more
        room. alone: nobody else was admitted in this step."""
        work, budget = 0, min(budget, self._pace.rows(admitted))
        if admitted.unprepared:
            if admitted.computed and not alone:  # what it begins with may be computed in this very step: wait for it
                return 0
            work = min(self._progress.prepare(admitted), budget - 1)
            self._pace.spend(admitted, work)
        chunk = self._progress.chunk(admitted, budget - work)
        if chunk is None:  # it keeps its blocks, and comes first in the next step
            return None
        self._pace.spend(admitted, chunk.work)
        plan.chunks.append(chunk)
        if chunk.look is not None:
            return work + chunk.count
        # Findable at once, so that requests that came together with the same beginning compute it once: a layer stores
        # the KV of all rows of a step before any row attends. Safe because nothing can take this chunk out of the plan
        # any more: who began in this step is not preempted in it (`room`). If the step fails as a whole, `take_back` makes it
        # unfindable again.
        until = exact_until(chunk, saw_everything=not (chunk.decodes and admitted.sparse))
        self._progress.publish(chunk, min(until, admitted.taint))
        return work + chunk.count

    def completed(self, chunk: Chunk, *, saw_everything: bool = True) -> None:
        """See `Progress.completed`."""
        self._progress.completed(chunk, saw_everything=saw_everything)

    def _reserve(self, request: Request, tokens: int, plan: StepPlan) -> bool:
        """Slots for `tokens` positions, preempting who holds most for its weight. False if the request itself had to go."""
        table = self._tables[request]
        while not self.cache.reserve(table, tokens):
            victim = self._room.last()
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

    def _admit(self, plan: StepPlan, wanted: Callable[[Request], bool] = lambda request: True) -> Request | None:
        """Start the head of the queue, or, while that waits for memory, the head of a tenant for which others make room.

        wanted: whose turn it is. So that smaller requests do not keep a larger one waiting for good, it is passed so often and
        no more.
        """
        tried: list[Request] = []
        if self._room.closed:
            return None

        def may(request: Request) -> bool:
            if not wanted(request) or any(request.tenant == other.tenant for other in tried):
                return False
            if tried and not self._room.pressing(request):
                return False
            return self._room.slot(request)

        while len(tried) < MOST_TRIES and not any(map(self._room.stops_others, tried)):
            request = self._waiting.head(may)
            if request is None:
                return None
            self._considered = request
            if self._enter(request, plan):
                for other in tried:
                    other.passed += 1
                return request
            tried.append(request)
        return None

    def _enter(self, request: Request, plan: StepPlan) -> bool:
        """Start a request if it fits: the blocks of all its known tokens, and one spare for each running one; and the state of
        its selection method.

        The spare keeps a newcomer from pushing out, one token later, those that run already.
        """
        table = self._tables[request]
        match = self.cache.match(table, request.tokens)
        victims = self._room.victims(request, self.cache.blocks_for(request.known) - len(match.blocks))
        if victims is None:
            self.cache.drop(match)
            return False
        for victim in victims:
            self._preempt(victim, plan)
        self.cache.adopt(table, match, 0 if request.preemptions else len(request.tokens))
        if not self.cache.reserve(table, request.known):
            raise AssertionError("admission counted blocks that are not there")
        self._waiting.take(request)
        request.passed = 0
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
        self._admitted.append(request)
        self._room.entered(request, made=bool(victims))
        return True
