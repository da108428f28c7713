"""Work for an idle engine: requests of the engine's own, one at a time, which give way to everybody else's.

Tenants take turns, and who has most of it waiting loses the oldest of it when there is too much. What it takes is charged to
the tenant for whom it is done, as with any other request.

compile   text that several prompts shared, alone, so that other tenants may reuse it
heal      a prompt that reused KV, in full: its new parts become donors, and its next turn finds an exact prefix
shadow    the same, and what reuse did to the first tokens of its answer is measured
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.sampling import SamplingParams

MOST = 64
"""JobQueue that wait; the oldest of the tenant that has most are forgotten."""

Kind = Literal["compile", "heal", "shadow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One piece of work."""

    kind: Kind
    tokens: tuple[int, ...]
    tenant: str
    salt: str = ""
    scope: str = "tenant"
    """compile: whom the segment is for; else how far what the prompt leaves may go."""
    answer: tuple[int, ...] = ()
    """shadow: the first tokens that were generated,"""
    seen: tuple[Tensor, ...] = field(default=(), compare=False)
    """and the log-probabilities they were drawn from: [vocab] fp16 each."""

    def request(self, number: int) -> Request:
        """The engine's own request that does it."""
        answer = self.answer if self.kind == "shadow" else ()
        return Request(
            id=f"job-{number}",
            prompt=self.tokens,
            sampling=SamplingParams(max_tokens=max(1, len(answer)), temperature=0.0, ignore_eos=True, forced_tokens=answer),
            kv=KVOptions(selection="dense", segment=self.scope)
            if self.kind == "compile"
            else KVOptions(selection="dense", reuse="exact", share=self.scope),
            tenant=self.tenant,
            cache_salt=self.salt,
            internal=True,
        )


class JobQueue:
    """A bounded queue without duplicates."""

    def __init__(self, gave_way: Callable[[], object] = lambda: None) -> None:
        """gave_way: called when the running one is put back."""
        self._gave_way = gave_way
        self._waiting: deque[Job] = deque()
        self._numbers = itertools.count()
        self._turns: dict[str, int] = {}
        """Of tenants with jobs here, the number of the last one that was started."""
        self._running: tuple[Request, Job] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Queue it, unless the same is waiting."""
        if job not in self._waiting:
            self._waiting.append(job)
            if len(self._waiting) > MOST:
                ((most, _),) = Counter(waiting.tenant for waiting in self._waiting).most_common(1)
                self._waiting.remove(next(waiting for waiting in self._waiting if waiting.tenant == most))

    def purge(self, tenant: str) -> None:
        """Forget what waits for a tenant."""
        self._waiting = deque(job for job in self._waiting if job.tenant != tenant)

    def clear(self) -> None:
        """Forget what waits for anybody."""
        self._waiting.clear()

    def start(self) -> Request | None:
        """The next one, as a request: the oldest of the tenant whose turn is longest ago. None if there is none."""
        if not self._waiting:
            return None
        job = min(self._waiting, key=lambda waiting: self._turns.get(waiting.tenant, -1))  # the first of equal ones
        self._waiting.remove(job)
        number = next(self._numbers)
        request = job.request(number)
        here = {waiting.tenant for waiting in self._waiting} | {job.tenant}
        self._turns = {tenant: turn for tenant, turn in self._turns.items() if tenant in here} | {job.tenant: number}
        self._running = (request, job)
        return request

    def of(self, request: Request) -> Job | None:
        """The job that a request does."""
        return self._running[1] if self._running is not None and self._running[0] is request else None

    def done(self) -> None:
        """The running one has ended."""
        self._running = None

    def put_back(self) -> None:
        """The running one gives way and begins anew later."""
        if self._running is not None:
            self._waiting.appendleft(self._running[1])
            self._running = None
            self._gave_way()
