"""When a 429 is told: who does not mind Retry-After asks the more seldom, and does not take the loop from others.

The refusals of a tenant are told one after the other; those that would wait for longer than LONGEST_SECONDS, by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_SECONDS = 0.25
GAP_SECONDS = 0.05
"""Between two refusals of one tenant."""
LONGEST_SECONDS = 2.0


class Refusals:
    """Whose next refusal is due when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        """When the last one that was decided on is told."""

    def delay(self, tenant: str) -> float:
        """Seconds to wait with a refusal that is decided on now."""
        now = self._clock()
        self._last = {name: when for name, when in self._last.items() if when > now}
        due = max(now + FIRST_SECONDS, self._last.get(tenant, now) + GAP_SECONDS)
        self._last[tenant] = min(due, now + LONGEST_SECONDS)
        return self._last[tenant] - now
