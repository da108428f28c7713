"""Tenants share by weight: deficit counters beneath every order (after DLPM, arXiv 2501.14312, section 4; weights as in VTC).

    credit > 0     the tenant's requests may be admitted, in whatever order the server has
    admission      - W        rows of the prompt to compute, after cache hits
    decode row     - 2        a generated token costs the engine more than one of a prompt
    stopped        + what had been charged and was not computed (abort, preemption, KV that was reused approximately)
    nobody waiting has credit: each tenant that waits gets quantum * weight, as often as it takes until one has

Over any time in which two tenants both wait, their work differs from their weights by a quantum and one request each.

Who has nothing here saves nothing up: a surplus is forgotten with the last request. A debt is paid off by the quanta of others,
and forgotten when nobody waits: then nobody is kept waiting by it. Who comes back starts no better than the best of those here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvloom.engine.requests.request import Request

DECODE_COST = 2.0
MOST_DEBTORS = 4096
"""Tenants without requests here whose debts are remembered."""


@dataclass(slots=True)
class _Bill:
    """What one admitted request has been charged for in advance."""

    known: int
    """Tokens it had when it was admitted: rows before that are prompt rows."""
    left: float
    """Rows charged and not computed yet."""


class Fairness:
    """Credit of the tenants that have requests here, in rows of a full pass."""

    def __init__(self, quantum: float, weight: Callable[[str], float]) -> None:
        """quantum: work that a tenant of weight 1 gets per round. weight: of a tenant, > 0."""
        self._quantum = quantum
        self._weight = weight
        self._credit: dict[str, float] = {}
        self._here: Counter[str] = Counter()
        self._bills: dict[Request, _Bill] = {}

    def credit(self, tenant: str) -> float:
        """What the tenant may still be admitted for; negative: what it must wait for."""
        return self._credit.get(tenant, 0.0)

    @property
    def tenants(self) -> Collection[str]:
        """Who has requests here."""
        return self._here.keys()

    def charge(self, tenant: str, rows: float, *, contended: bool) -> None:
        """Charge for work that is no request's, such as a look-up: rows of a full pass. contended: somebody waits.

        Who has no requests here is charged only while others wait, as any debt is forgotten otherwise, and so are the debts of
        more than MOST_DEBTORS.
        """
        if self._here[tenant] or (contended and (tenant in self._credit or len(self._credit) < len(self._here) + MOST_DEBTORS)):
            self._credit[tenant] = self.credit(tenant) - rows

    def arrived(self, request: Request) -> None:
        """A request that was not here before."""
        tenant = request.tenant
        if self._here[tenant] == 0:
            best = max((self.credit(other) for other in self._here if self._here[other]), default=0.0)
            self._credit[tenant] = min(self.credit(tenant), best)
        self._here[tenant] += 1

    def admitted(self, request: Request, work: float) -> None:
        """Charge for the rows that its prompt takes."""
        self._bills[request] = _Bill(len(request.tokens), work)
        self._credit[request.tenant] -= work

    def computed(self, request: Request, start: int, rows: float) -> None:
        """A step computed `rows` of the request from position `start` on, or did as much work for it."""
        bill = self._bills[request]
        if start >= bill.known:
            self._settle(request.tenant, bill)
            self._credit[request.tenant] -= DECODE_COST * rows
        else:
            paid = min(bill.left, rows)
            bill.left -= paid
            self._credit[request.tenant] -= rows - paid

    def stopped(self, request: Request) -> None:
        """The request does not run any more (or never did)."""
        bill = self._bills.pop(request, None)
        if bill is not None:
            self._settle(request.tenant, bill)

    def left(self, request: Request, *, contended: bool) -> None:
        """The request is here no more; it has been `stopped`. contended: somebody waits."""
        tenant = request.tenant
        self._here[tenant] -= 1
        if self._here[tenant] == 0:
            del self._here[tenant]
            if self._credit[tenant] >= 0 or not contended:
                del self._credit[tenant]

    def entitled(self, waiting: Collection[str]) -> list[str]:
        """Those of the waiting tenants that have credit: at least one, after as many rounds as that takes."""
        while not (found := [tenant for tenant in waiting if self._credit[tenant] > 0]) and waiting:
            # A round more than would bring the nearest one to zero.
            self._grant(waiting, min(math.floor(-self._credit[t] / self._due(t)) + 1 for t in waiting))
        return found

    def calm(self) -> None:
        """Nobody waits: debts of tenants that are not here are forgotten."""
        for tenant in [tenant for tenant in self._credit if tenant not in self._here]:
            del self._credit[tenant]

    def _due(self, tenant: str) -> float:
        return self._quantum * self._weight(tenant)

    def _grant(self, waiting: Collection[str], rounds: int) -> None:
        for tenant in waiting:
            self._credit[tenant] += rounds * self._due(tenant)
        for tenant in [tenant for tenant in self._credit if tenant not in self._here]:
            self._credit[tenant] += rounds * self._due(tenant)
            if self._credit[tenant] >= 0:
                del self._credit[tenant]

    def _settle(self, tenant: str, bill: _Bill) -> None:
        """Give back what was charged and not computed, up to what a round gives."""
        if bill.left > 0:
            self._credit[tenant] = max(self._credit[tenant], min(self._credit[tenant] + bill.left, self._due(tenant)))
            bill.left = 0.0
