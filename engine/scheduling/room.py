"""Who has to give way so that a waiting request finds a slot, blocks and state; and who waits until that is free of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvloom.engine.cache import BlockTable, CacheManager
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.scheduling.fairness import Fairness
from kvloom.engine.scheduling.order import Order
from kvloom.engine.scheduling.shares import MOST_VICTIMS, Shares

MOST_PASSES = 64
"""Requests of other tenants that may start before one that waits for memory; then it comes first, unless its own tenant has
others running, which it waits for."""
PATIENCE = 16
"""Steps for which a tenant's requests wait until slots or blocks are taken from who holds too many. Before that they come free
of themselves, and go by credit; only who has nothing running is not kept waiting."""


class Room:
    """Slots and memory of one scheduler's running requests."""

    def __init__(
        self,
        cache: CacheManager,
        tables: Mapping[Request, BlockTable],
        running: Sequence[Request],
        states: StateMemory,
        order: Order,
        shares: Shares,
        fairness: Fairness,
        max_seqs: int,
    ) -> None:
        """tables: of all requests; running: those that run, as of now."""
        self._cache, self._tables, self._running, self._states = cache, tables, running, states
        self._order, self._shares, self._fairness, self._max_seqs = order, shares, fairness, max_seqs
        self._steps = 0
        self._served: dict[str, int] = {}
        """The step in which a tenant last got what was free."""
        self._fresh: set[Request] = set()
        """Began in this step: what they compute may have been published already, so they stay."""

    def begin(self) -> None:
        """A step is to be planned."""
        self._fresh.clear()
        self._steps += 1

    def entered(self, request: Request, *, made: bool) -> None:
        """A request runs now. made: others had to make room for it."""
        self._fresh.add(request)
        if not made or request.tenant not in self._served:
            self._served[request.tenant] = self._steps

    def left(self, tenant: str) -> None:
        """A request of this tenant is here no more."""
        if tenant not in self._fairness.tenants:
            self._served.pop(tenant, None)

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return len(self._running) >= self._max_seqs

    @property
    def closed(self) -> bool:
        """Whether nobody can enter, whoever it is."""
        return self.full and not self._order.displaces and not self._shares.several(self._running)

    def slot(self, request: Request) -> bool:
        """Whether a request can have a slot."""
        return not self.full or self._victim(request, self._running, 0.0) is not None

    def last(self) -> Request:
        """Who gives way when memory runs out under running requests."""
        return self._shares.last(self._running, self._fresh)

    def stops_others(self, request: Request) -> bool:
        """Whether nobody may start any more before a request that waits for memory."""
        return request.passed >= MOST_PASSES and all(other.tenant != request.tenant for other in self._running)

    def pressing(self, request: Request) -> bool:
        """Whether others may have to make room for a request: its tenant has nothing running, or got nothing for long."""
        tenant = request.tenant
        if all(other.tenant != tenant for other in self._running):
            return True
        return self._steps - self._served.get(tenant, self._steps) >= PATIENCE

    def victims(self, request: Request, lacking: int) -> list[Request] | None:
        """Who has to be preempted so that a request finds a slot and the blocks it lacks; None if it has to wait."""
        rest, victims, fair = list(self._running), list[Request](), 0.0
        while True:
            freed = self._cache.freed_by([self._tables[victim] for victim in victims])
            room = len(rest) < self._max_seqs and self._cache.available + freed - lacking >= len(rest)
            if room and self._states.fits(request, without=victims):
                return victims
            if len(victims) == MOST_VICTIMS:
                return None
            fair = fair or self._shares.fair(
                request.tenant, self._cache.longest // self._cache.block_size, self._fairness.tenants
            )
            victim = self._victim(request, rest, fair)
            if victim is None:
                return None
            victims.append(victim)
            rest.remove(victim)

    def _victim(self, request: Request, running: Sequence[Request], fair: float) -> Request | None:
        """Who gives way to a request that needs a slot, if none is free, or else blocks: its own tenant's last one if the order
        lets it overtake that, or somebody who holds more than is due (`shares`). fair: blocks that its tenant is due."""
        if self._order.displaces:
            own = [r for r in running if r.tenant == request.tenant and r not in self._fresh]
            last = max(own, key=self._order.key, default=None)
            if last is not None and self._order.key(last)[0] > self._order.key(request)[0]:
                return last
        if request.internal or not self.pressing(request):
            return None
        if len(running) >= self._max_seqs:
            return self._shares.for_slot(request, running, self._fresh)
        return self._shares.for_blocks(request, running, self._cache.blocks_for(request.known), fair, self._fresh)
