"""Orders of requests. A key is smaller for who runs first, and never changes while a request lives.

fcfs         first come, first served
priority     the request's own priority (lower first, as in vLLM), then first come; may displace running requests
cache_aware  waiting requests by a score that changes (`cache_aware`); running ones, and who is preempted, by first come

Beneath all of them tenants share by weight (`fairness`): an order chooses among the requests of tenants that have credit. So a
priority brings a request forward within what its tenant is due; it displaces only requests of the same tenant, and takes
nothing from others for long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvloom.engine.requests.request import Request

Key = tuple[float, ...]


class Order(NamedTuple):
    """How waiting requests are ordered, and who is preempted first (the largest key)."""

    key: Callable[[Request], Key]
    uses_priority: bool
    """Whether the request's own priority counts."""
    displaces: bool
    """Whether a waiting request may preempt a running one of its tenant with a larger first key part."""
    scores: bool = False
    """Whether waiting requests are ordered by a score instead of the key."""


def first_come(request: Request) -> Key:
    """By arrival, then by submission."""
    return (request.arrival, request.sequence)


def _priority(request: Request) -> Key:
    return (request.priority, request.arrival, request.sequence)


ORDERS: dict[str, Order] = {
    "fcfs": Order(first_come, uses_priority=False, displaces=False),
    "priority": Order(_priority, uses_priority=True, displaces=True),
    "cache_aware": Order(first_come, uses_priority=True, displaces=False, scores=True),
}
