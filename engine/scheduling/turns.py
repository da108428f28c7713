"""Rows that do not fit a step take turns: who was left out longest comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvloom.engine.requests.plan import StepPlan, of_prompt
from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling.order import Key

TURN_STEPS = 4
"""Steps in a row without a row after which a prompt, or drafts to verify, come before decode rows: those need one row each and
wait less. The queue is as patient, when steps are full without a prompt among them."""


class Turns:
    """Who comes first in a step."""

    def __init__(self, order: Callable[[Request], Key]) -> None:
        """order: of running requests that were left out equally long."""
        self._order = order

    def key(self, request: Request) -> tuple[int, bool, Key]:
        """Those left out longest, then decodes before prompts, then by the order."""
        many = request.pending > 1
        return (-(request.left_out // TURN_STEPS if many else request.left_out), many, self._order(request))

    def planned(self, plan: StepPlan, running: Sequence[Request]) -> None:
        """Note who got no row. A prompt behind an earlier one of its tenant is not left out: they go one by one."""
        planned, first = {chunk.request for chunk in plan.chunks}, dict[str, Key]()
        for chunk in filter(of_prompt, plan.chunks):
            tenant, key = chunk.request.tenant, self._order(chunk.request)
            first[tenant] = min(first.get(tenant, key), key)
        for request in running:
            if request in planned:
                request.left_out = 0
                continue
            before = None if request.pending == 1 or request.verifying else first.get(request.tenant)
            if before is None or self._order(request) < before:
                request.left_out += 1
