"""Order by what a request still costs once the cache has done its part (`--scheduler cache_aware`).

    W      effective work: rows to compute, in rows of a full pass          n   known tokens
    H      1 - W/n, in three levels                                         T   work of this tenant admitted while it waited
    X      1 + T / max(W, 1): the response ratio, so that whoever waits ages, little work faster
    score  X + H/2 - priority - 1/4 if what it begins with is computed for another waiting request first

The score is that of KVShare's specification; the paper (Yang et al., 2025) says only that requests are ordered by hit rate. An
order by hits alone starves cold requests, so in this order of precedence:

1. reserve  of the work admitted while requests with H < 0.2 and others wait, a fifth or more is theirs
2. bound    who has waited `max_wait` goes first, first come among these
3. pass     nobody is overtaken by score more than 8 times
4. score    the highest

A request whose next 64 tokens or more a running request of the same domain is about to compute is held until they can be found,
once, and at most for as long as that prefill takes at the speed measured. `max_wait` ends a hold.

No engine can keep a wait bounded if more work comes than it can do: then 2 is first come, first served, and only 1 holds.

A lane sees what its own tenant can find. T counts that tenant's work at admission, not the engine's as it is computed:
otherwise how much of others' prompts is cached could be read off the order of one's own. Of a long queue the first 64 are
scored; cold requests are known wherever they stand, or a long queue of others would hide them from 1.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.requests.isolation import blame
from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling.order import first_come
from kvloom.engine.scheduling.pace import StepCost
from kvloom.engine.scheduling.queue import Candidate

WINDOW = 64
"""Requests at the front of a lane that are scored."""
REFRESH_SECONDS = 0.05
"""Estimates are made anew at most this often, and only if what can be found has changed."""
HIT_WEIGHT, DUPLICATE_WEIGHT, PRIORITY_WEIGHT = 0.5, 0.25, 1.0
COLD = 0.2
"""A request with a smaller share of hits is cold."""
RESERVE = 0.2
"""Share of admitted work that cold requests get while they and others wait."""
MAX_OVERTAKES = 8
SHARED_TOKENS = 64
"""A beginning that is waited for, or counts as a duplicate, has at least this many tokens that cannot be found yet."""


class Estimate(NamedTuple):
    """What a waiting request will cost."""

    work: float
    """Rows to compute, in rows of a full pass; at least 1."""
    hit: float
    """1 - work / known tokens, 0 to 1."""
    prefix: int = 0
    """Tokens in front that an exact prefix covers."""
    producer: Request | None = None
    """A request of the same tenant that is computing what this one could reuse."""


class Estimator(Protocol):
    """Says what a request will cost, from nothing but what its own tenant may know: hits in other scopes that it may use must
    be quantised (`hit_level`). Must not pin, count or move anything."""

    def estimate(self, request: Request, table: BlockTable, tokens: Sequence[int]) -> Estimate:
        """tokens: all that are known of the request."""
        ...


class PrefixEstimator:
    """By the exact prefix in the request's own domain."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache

    def estimate(self, request: Request, table: BlockTable, tokens: Sequence[int]) -> Estimate:
        """See `Estimator`."""
        prefix = self._cache.peek(table, tokens)
        return Estimate(len(tokens) - prefix, prefix / len(tokens), prefix)


def hit_level(hit: float) -> float:
    """A share of hits in three levels: 0 below 0.4, 1/2 below 0.75, else 1."""
    return 0.0 if hit < 0.4 else 0.5 if hit < 0.75 else 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What lanes see of the engine. `tables` and `running` are the scheduler's own and change under way."""

    cache: CacheManager
    tables: Mapping[Request, BlockTable]
    running: Sequence[Request]
    estimator: Estimator
    cost: StepCost
    clock: Callable[[], float]
    max_wait: float
    """Seconds."""


_UNKNOWN = Estimate(1.0, 0.0)


@dataclass(slots=True)
class _Note:
    """What is known of one waiting request."""

    born: float
    """Work its tenant had been admitted for when it came."""
    estimate: Estimate = _UNKNOWN
    round: int = -1
    """When the estimate was made."""
    shared: tuple[int, bytes] | None = None
    """Index and key of the block that ends the next SHARED_TOKENS tokens, if it has so many."""
    duplicate: bool = False
    overtakes: int = 0
    held_until: float | None = None
    """Set once: a request is held one time."""

    @property
    def cold(self) -> bool:
        return self.estimate.hit < COLD


class ScoredLane:
    """One tenant's waiting requests, first come, of which the front is scored."""

    def __init__(self, tenant: str, around: Surroundings) -> None:
        self._tenant = tenant
        self._around = around
        self._requests: list[Request] = []
        self._cold: list[Request] = []  # those that looked cold when last estimated, first come as well
        self._notes: dict[Request, _Note] = {}
        self._served = 0.0
        self._round = 0
        self._epoch = around.cache.epoch(tenant)
        self._estimated = around.clock()
        self._reserve = 0.0
        self._by_reserve: Request | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        """See `Lane`."""
        bisect.insort(self._requests, request, key=first_come)
        self._notes[request] = _Note(self._served)
        self._estimate(request)

    def remove(self, request: Request) -> None:
        """See `Lane`."""
        _discard(self._requests, request)
        _discard(self._cold, request)
        del self._notes[request]

    def take(self, request: Request) -> None:
        """See `Lane`."""
        taken = self._notes[request]
        if request is not self._by_reserve:
            for earlier in self._requests[:WINDOW]:
                if earlier is request:
                    break
                self._notes[earlier].overtakes += 1
        self.remove(request)
        self._served += taken.estimate.work
        self._account(taken)

    def head(self) -> Candidate | None:
        """See `Lane`."""
        self._look()
        now = self._around.clock()
        self._by_reserve = self._reserved(now) if self._reserve > 0 else None
        first = self._by_reserve or self._late(now)
        if first is None:
            ready = [request for request in self._requests[:WINDOW] if not self._held(request, now)]
            first = next((request for request in ready if self._notes[request].overtakes >= MAX_OVERTAKES), None)
        if first is not None:
            return Candidate((0.0, *first_come(first)), first)
        ranks = [Candidate((1.0, -self._score(request), *first_come(request)), request) for request in ready]
        return min(ranks, key=lambda candidate: candidate.rank, default=None)

    def _late(self, now: float) -> Request | None:
        """Who has come first, if that is too long ago."""
        first = self._requests[0] if self._requests else None
        return first if first is not None and now - first.arrival >= self._around.max_wait else None

    def _score(self, request: Request) -> float:
        note = self._notes[request]
        ratio = 1 + (self._served - note.born) / max(note.estimate.work, 1.0)
        return (
            ratio
            + HIT_WEIGHT * hit_level(note.estimate.hit)
            - PRIORITY_WEIGHT * request.priority
            - DUPLICATE_WEIGHT * note.duplicate
        )

    def _reserved(self, now: float) -> Request | None:
        """The cold request whose turn it is."""
        for request in list(self._cold):
            if self._notes[request].round != self._round:
                self._estimate(request)
            if self._notes[request].cold and not self._held(request, now):
                return request
        return None

    def _account(self, taken: _Note) -> None:
        """Hot work admitted earns cold requests theirs; they never earn in advance, nor owe more than one request."""
        if not taken.cold:
            self._reserve += taken.estimate.work * RESERVE / (1 - RESERVE)
            if not self._cold:
                self._reserve = min(self._reserve, 0.0)
        elif len(self._cold) < len(self._requests):
            self._reserve = max(self._reserve - taken.estimate.work, -taken.estimate.work)

    def _look(self) -> None:
        """Estimate what has no estimate yet, and all anew if that can have changed and is not too soon."""
        epoch, now = self._around.cache.epoch(self._tenant), self._around.clock()
        if epoch != self._epoch and now - self._estimated >= REFRESH_SECONDS:
            self._epoch, self._estimated = epoch, now
            self._round += 1
        first: set[tuple[int, bytes]] = set()
        for request in self._requests[:WINDOW]:
            note = self._notes[request]
            if note.round != self._round:
                self._estimate(request)
            note.duplicate = note.shared in first
            if note.shared is not None:
                first.add(note.shared)

    def _estimate(self, request: Request) -> None:
        note, table, size = self._notes[request], self._around.tables[request], self._around.cache.block_size
        note.round = self._round
        with blame(request):
            note.estimate = self._around.estimator.estimate(request, table, request.tokens)
        end = -(-(note.estimate.prefix + SHARED_TOKENS) // size)
        note.shared = None
        if table.looks_up and end * size < len(request.tokens):
            table.chain.extend(request.tokens, end)
            note.shared = (end - 1, table.chain.keys[end - 1])
        _discard(self._cold, request)
        if note.cold:
            bisect.insort(self._cold, request, key=first_come)

    def _held(self, request: Request, now: float) -> bool:
        note = self._notes[request]
        if note.held_until is not None and now >= note.held_until:
            return False
        producer = self._producer(note)
        table = None if producer is None or note.shared is None else self._around.tables[producer]
        if table is not None and table.published > self._shared_block(note):
            self._estimate(request)  # it can be found by now, and there may be more to wait for
            producer = self._producer(note)
        if producer is None or not self._around.cost.rows_per_second:
            return False
        if note.held_until is None:
            rows = producer.pending if producer.looks is None else len(producer.tokens) - producer.computed
            note.held_until = now + rows / self._around.cost.rows_per_second
        return now < note.held_until

    def _shared_block(self, note: _Note) -> int:
        assert note.shared is not None
        return note.shared[0]

    def _producer(self, note: _Note) -> Request | None:
        """A running request that will compute what this one begins with, or could reuse."""
        producer = note.estimate.producer
        if producer is not None and producer in self._around.running and not producer.generated:
            return producer
        if note.shared is None:
            return None
        index, key = note.shared
        stop = (index + 1) * self._around.cache.block_size
        for other in self._around.running:
            if other.tenant != self._tenant or other.computed >= stop or len(other.tokens) < stop:
                continue
            table = self._around.tables[other]
            table.chain.extend(other.tokens, index + 1)
            if table.publishes and table.chain.keys[index] == key:
                return other
        return None


def _discard(requests: list[Request], request: Request) -> None:
    """Take one out of a list that is sorted by first come, if it is there."""
    at = bisect.bisect_left(requests, first_come(request), key=first_come)
    if at < len(requests) and requests[at] is request:
        del requests[at]
