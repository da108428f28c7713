"""Requests that wait: a lane per tenant, each in its own order, and credit that says whose lane is next.

A lane knows only its own tenant's requests, so the order within a tenant never depends on what others have, or have cached. A
lane that runs empty is forgotten.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.engine.scheduling.order import Key


class Candidate(NamedTuple):
    """Who is first in a lane, and what that is worth beside the first of other lanes: the smallest rank goes."""

    rank: Key
    request: Request


class Lane(Protocol):
    """The waiting requests of one tenant."""

    def __len__(self) -> int: ...

    def push(self, request: Request) -> None:
        """One more that waits."""
        ...

    def take(self, request: Request) -> None:
        """The head goes to run."""
        ...

    def remove(self, request: Request) -> None:
        """One that waits is given up."""
        ...

    def head(self) -> Candidate | None:
        """Who should run next; None if all are better kept waiting for now."""
        ...


class KeyedLane:
    """By a key that never changes: a heap, in which those given up stay until they come to the top."""

    def __init__(self, key: Callable[[Request], Key]) -> None:
        self._key = key
        self._heap: list[tuple[Key, int, Request]] = []
        self._waiting: set[Request] = set()
        self._pushes = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        """See `Lane`."""
        self._waiting.add(request)
        heapq.heappush(self._heap, (self._key(request), next(self._pushes), request))

    def take(self, request: Request) -> None:
        """See `Lane`."""
        self.remove(request)

    def remove(self, request: Request) -> None:
        """See `Lane`."""
        self._waiting.remove(request)
        while self._heap and self._heap[0][2] not in self._waiting:
            heapq.heappop(self._heap)

    def head(self) -> Candidate | None:
        """See `Lane`."""
        return Candidate(self._heap[0][0], self._heap[0][2]) if self._heap else None


class WaitingQueue:
    """The lanes of all tenants."""

    def __init__(self, fairness: Fairness, make_lane: Callable[[str], Lane]) -> None:
        """make_lane: an empty lane for the tenant of that name."""
        self._fairness = fairness
        self._make_lane = make_lane
        self._lanes: dict[str, Lane] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, request: Request) -> None:
        """One more that waits. It does even if its lane raises."""
        if request.tenant not in self._lanes:
            self._lanes[request.tenant] = self._make_lane(request.tenant)
        self._count += 1
        self._lanes[request.tenant].push(request)

    def head(self, may: Callable[[Request], bool] = lambda request: True) -> Request | None:
        """Who should run next: among the heads of lanes with credit the first in order of those that may.

        While those with credit may not, whoever owes nothing comes in their place: they could not use it now.
        """
        waiting = list(self._lanes)
        while waiting:
            entitled = self._fairness.entitled(waiting)
            heads = [head for tenant in entitled if (head := self._lanes[tenant].head()) is not None]
            for head in sorted(heads, key=lambda head: head.rank):
                if may(head.request):
                    return head.request
            waiting = [tenant for tenant in waiting if tenant not in entitled]
            if heads:
                waiting = [tenant for tenant in waiting if self._fairness.credit(tenant) >= 0]
        return None

    def take(self, request: Request) -> None:
        """The head goes to run."""
        self._lanes[request.tenant].take(request)
        self._left(request.tenant)

    def remove(self, request: Request) -> None:
        """One that waits is given up."""
        self._lanes[request.tenant].remove(request)
        self._left(request.tenant)

    def _left(self, tenant: str) -> None:
        self._count -= 1
        if not self._lanes[tenant]:
            del self._lanes[tenant]
        if not self._lanes:
            self._fairness.calm()
