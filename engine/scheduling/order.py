"""Orders of requests: a key function each, smaller runs first. A key never changes while a request lives.

fcfs        first come, first served
priority    the request's own priority (lower first, as in vLLM), then first come; may displace running requests
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvloom.engine.request import Request

Key = tuple[float, ...]


class Order(NamedTuple):
    """How waiting requests are ordered, and who is preempted first (the largest key)."""

    key: Callable[[Request], Key]
    uses_priority: bool
    """Whether the request's own priority counts."""
    displaces: bool
    """Whether a waiting request may preempt a running one with a larger first key part."""


def _first_come(request: Request) -> Key:
    return (request.arrival, request.sequence)


def _priority(request: Request) -> Key:
    return (request.priority, request.arrival, request.sequence)


ORDERS: dict[str, Order] = {
    "fcfs": Order(_first_come, uses_priority=False, displaces=False),
    "priority": Order(_priority, uses_priority=True, displaces=True),
}
