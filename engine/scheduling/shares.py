"""Slots, blocks and rows by weight: what running requests hold, who may take it from whom, and who gives way first.

    burden       what a tenant's running requests hold, for its weight
    entering     a waiting request may have the newest request of the most burdened tenant preempted, if its own tenant has
                 nothing running, or would still be the less burdened of the two with it (blocks: or within its fair share)
    memory       when it runs out under running requests, the most burdened tenant's newest request gives way
    never        the request that is first in order, a tenant's only one (for somebody who enters), one that began in this step

So nothing goes back and forth: with the same demand, every time somebody enters either fewer tenants have nothing running, or
the larger of two burdens falls and the other stays below it. And as the first in order always stays, every request finishes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling.order import Key

MOST_VICTIMS = 16
"""Requests that are preempted for one that enters."""


class Shares:
    """Who holds how much, of requests that run."""

    def __init__(self, weight: Callable[[str], float], key: Callable[[Request], Key], blocks: Callable[[Request], int]) -> None:
        """weight: of a tenant, > 0; key: the order of running requests; blocks: that a running request holds."""
        self._weight, self._key, self._blocks = weight, key, blocks

    def for_slot(self, request: Request, running: Sequence[Request], fresh: Collection[Request]) -> Request | None:
        """Who gives its slot to a request that enters; None if nobody has to."""
        held = Counter(other.tenant for other in running)
        own = held[request.tenant]
        limit = math.inf if own == 0 else (own + 1) / self._weight(request.tenant)
        return self._newest(request.tenant, running, held, held, limit, fresh)

    def fair(self, tenant: str, total: int, tenants: Collection[str]) -> float:
        """What a tenant is due of `total`, beside all that have requests here."""
        return total * self._weight(tenant) / sum(map(self._weight, {*tenants, tenant}))

    def several(self, running: Sequence[Request]) -> bool:
        """Whether any tenant has more than one request running."""
        return len({request.tenant for request in running}) < len(running)

    def for_blocks(
        self, request: Request, running: Sequence[Request], need: int, fair: float, fresh: Collection[Request]
    ) -> Request | None:
        """Who gives its blocks. need: blocks that the request will hold; fair: what its tenant is due."""
        held, counts = self._held(running), Counter(other.tenant for other in running)
        after = held[request.tenant] + need
        limit = math.inf if after <= fair else after / self._weight(request.tenant)
        return self._newest(request.tenant, running, held, counts, limit, fresh)

    def last(self, running: Sequence[Request], fresh: Collection[Request] = ()) -> Request:
        """Who gives way when memory runs out; the first in order only if nobody else may."""
        held, first = self._held(running), min(running, key=self._key)
        left = [other for other in running if other is not first and other not in fresh] or [first]
        most = max((other.tenant for other in left), key=lambda tenant: self._burden(held, tenant))
        return max((other for other in left if other.tenant == most), key=self._key)

    def split(self, rows: int, demand: Mapping[str, int]) -> dict[str, int]:
        """Rows by weight, at least one each and none beyond a tenant's demand; what some do not need goes to the others."""
        given: dict[str, int] = {}
        left, weights = rows, {tenant: self._weight(tenant) for tenant in demand}
        for tenant in sorted(demand, key=lambda tenant: (demand[tenant] / weights[tenant], tenant)):
            share = left * weights[tenant] / sum(weights.values())
            given[tenant] = max(1, min(demand[tenant], math.ceil(share)))
            left = max(0, left - given[tenant])
            del weights[tenant]
        return given

    def _newest(
        self,
        newcomer: str,
        running: Sequence[Request],
        held: Counter[str],
        counts: Counter[str],
        limit: float,
        fresh: Collection[Request],
    ) -> Request | None:
        """The newest request of the most burdened tenant that has several, unless the newcomer's burden would reach its own.

        limit: the newcomer's burden, or infinity if it is due what it asks for in any case.
        """
        if not running:
            return None
        first = min(running, key=self._key)
        for tenant in self._by_burden(newcomer, held, counts):
            if limit is not math.inf and limit >= self._burden(held, tenant):
                return None
            able = [r for r in running if r.tenant == tenant and r is not first and r not in fresh]
            if able:
                return max(able, key=self._key)
        return None

    def _held(self, running: Sequence[Request]) -> Counter[str]:
        held: Counter[str] = Counter()
        for request in running:
            held[request.tenant] += self._blocks(request)
        return held

    def _by_burden(self, newcomer: str, held: Counter[str], counts: Counter[str]) -> Iterator[str]:
        several = [tenant for tenant, count in counts.items() if count > 1 and tenant != newcomer]
        yield from sorted(several, key=lambda tenant: (-self._burden(held, tenant), tenant))

    def _burden(self, held: Counter[str], tenant: str) -> float:
        return held[tenant] / self._weight(tenant)
