"""How much may wait to be computed: prompt tokens and requests, of all tenants together and of each.

A request waits from its submission to its first output, or to its end. A named tenant may have waiting at most its weight times
what is left (dynamic thresholds: Choudhury and Hahne, 1998), so that whoever comes next finds room; requests without a
tenant may take everything. A tenant of which nothing waits may always bring one request that fits what is left, and an
engine for which nothing waits takes any.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from kvloom.engine.errors import OverloadedError

QUEUED_CAPACITIES = 4
"""Prompt tokens that wait by default: so many times what the KV cache holds."""
QUEUED_REQUESTS = 8192
"""Requests that wait, whatever their length."""


class QueueLimit:
    """What waits, counted. Safe to use from several threads."""

    def __init__(self, most_tokens: int, weight: Callable[[str], float] = lambda tenant: 1.0) -> None:
        """weight: of a tenant, > 0."""
        self.most_tokens = most_tokens
        self._weight = weight
        self._tokens: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._tokens.total()

    @property
    def requests(self) -> int:
        """Requests that wait."""
        return self._requests.total()

    def enter(self, tenant: str, tokens: int) -> Place:
        """One more waits until its place is left. Raises OverloadedError if there is no room for it."""
        with self._lock:
            self._check(tenant, self._tokens, tokens, self.most_tokens, "prompt tokens")
            self._check(tenant, self._requests, 1, QUEUED_REQUESTS, "requests")
            self._tokens[tenant] += tokens
            self._requests[tenant] += 1
        return Place(self, tenant, tokens)

    def leave(self, tenant: str, tokens: int) -> None:
        """One waits no more."""
        with self._lock:
            self._tokens[tenant] -= tokens
            self._requests[tenant] -= 1
            if not self._requests[tenant]:  # a tenant leaves no trace
                del self._requests[tenant], self._tokens[tenant]

    def _check(self, tenant: str, waiting: Counter[str], more: int, most: int, what: str) -> None:
        total, own = waiting.total(), waiting[tenant]
        if not total:
            return
        left = most - total
        if more > left:
            raise OverloadedError(
                f"{total} {what} are waiting, and this request would add {more}; the limit is {most}; try again later"
            )
        if tenant and own and own + more > self._weight(tenant) * left:
            raise OverloadedError(
                f"{own} {what} of this tenant are waiting, and this request would add {more}; one tenant may have at most its "
                "weight times what is left for others; try again later"
            )


class Place:
    """One request's place among those that wait; as a context, left at its end."""

    def __init__(self, limit: QueueLimit, tenant: str, tokens: int) -> None:
        self._limit: QueueLimit | None = limit
        self._tenant = tenant
        self._tokens = tokens

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *raised: object) -> None:
        self.leave()

    def leave(self) -> None:
        """It waits no more. Further calls change nothing."""
        if self._limit is not None:
            self._limit.leave(self._tenant, self._tokens)
            self._limit = None
