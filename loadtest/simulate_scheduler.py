"""The real scheduler and cache over a make-believe model: who waits how long, and who gets how much, in simulated time.

A step takes a fixed time and so much per row. No tensor is computed, no clock is read: the same arrivals give the same result
everywhere. `python -m kvloom.loadtest.simulate_scheduler` prints how long hot and cold requests wait under every order.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvloom.engine.cache import CacheManager, GroupSpec, Storage
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.requests.request import Request, Status
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.scheduling import ORDERS, Scheduler, StepPlan
from kvloom.engine.scheduling.cache_aware import Estimator
from kvloom.engine.scheduling.fairness import DECODE_COST

BLOCK = 16


class Job(NamedTuple):
    """A request to come."""

    at: float
    """Seconds."""
    prompt: Sequence[int]
    output: int = 1
    tenant: str = ""
    priority: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step costs, and what there is room for."""

    rows_per_second: float = 4000.0
    step_seconds: float = 0.002
    blocks: int = 4096
    max_seqs: int = 32
    max_tokens: int = 512
    longest_step: float = math.inf
    """Of prompts beside streams, in seconds."""
    stream_seconds: float = 0.0
    """What each row that decodes adds."""


class Simulation:
    """One engine without a model."""

    def __init__(
        self,
        order: str,
        machine: Machine = Machine(),
        *,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        max_wait: float = 2.0,
        estimator: Estimator | None = None,
    ) -> None:
        self.now = 0.0
        self.machine = machine
        self.cache = CacheManager(Storage(GroupSpec.everything(1, 1), machine.blocks, BLOCK, 1, torch.float32))
        self.scheduler = Scheduler(
            self.cache,
            ORDERS[order],
            max_seqs=machine.max_seqs,
            max_tokens=machine.max_tokens,
            step_seconds=machine.longest_step,
            weight=weight,
            max_wait=max_wait,
            estimator=estimator,
            clock=lambda: self.now,
        )
        self.admitted: list[Request] = []
        """In the order in which they were first admitted."""
        self.contended: Counter[str] = Counter()
        """Work per tenant in steps during which all tenants had requests waiting, decode rows counted as `fairness` does."""
        self.labels: dict[Request, str] = {}
        self._domains = DomainFactory("simulation", secret=b"s" * 32)
        self._waiting: Counter[str] = Counter()
        self._sequence = 0

    def submit(self, job: Job) -> Request:
        """A request comes now."""
        request = Request(
            id=str(self._sequence),
            prompt=job.prompt,
            sampling=SamplingParams(),
            priority=job.priority,
            tenant=job.tenant,
            tokens=list(job.prompt),
            arrival=self.now,
            sequence=self._sequence,
            token_limit=len(job.prompt) + job.output,
        )
        self._sequence += 1
        self.labels[request] = job.label
        self._waiting[job.tenant] += 1
        self.scheduler.add(request, self.cache.open(self._domains.domain(job.tenant, "")))
        return request

    def step(self) -> StepPlan:
        """Schedule, let time pass, and generate."""
        before = set(self.scheduler.running)
        plan = self.scheduler.schedule()
        for request in self.scheduler.running:
            if request not in before:
                self._waiting[request.tenant] -= 1
                if not request.preemptions:
                    self.admitted.append(request)
        self._waiting.update(request.tenant for request in plan.preempted)
        streams = sum(chunk.decodes for chunk in plan.chunks)
        self.now += self.machine.step_seconds + plan.rows / self.machine.rows_per_second + streams * self.machine.stream_seconds
        if all(self._waiting.values()):
            for chunk in plan.chunks:
                decodes = chunk.start >= len(chunk.request.prompt)
                self.contended[chunk.request.tenant] += int(chunk.count * (DECODE_COST if decodes else 1))
        for chunk in plan.chunks:
            samples = chunk.samples
            self.scheduler.completed(chunk)
            if samples:
                chunk.request.tokens.append(1)
        self.scheduler.stepped()
        for request in list(self.scheduler.running):
            if len(request.tokens) == request.token_limit:
                self.scheduler.finish(request)
        return plan

    def run(self, jobs: Iterable[Job], *, until: float = float("inf")) -> None:
        """Serve jobs, given in order of time, to their end or up to a time."""
        coming: Iterator[Job] = iter(jobs)
        job = next(coming, None)
        while self.now < until and (job is not None or len(self.scheduler)):
            if job is not None and not len(self.scheduler):
                self.now = max(self.now, job.at)
            while job is not None and job.at <= self.now:
                self.submit(job)
                job = next(coming, None)
            self.step()

    def waits(self, label: str) -> list[float]:
        """Seconds from arrival to admission; of requests not admitted, until now."""
        return [
            (self.now if request.status is Status.WAITING and not request.preemptions else request.first_scheduled)
            - request.arrival
            for request, found in self.labels.items()
            if found == label
        ]


def hot_and_cold(
    seconds: float, hot_rate: float, cold_rate: float, *, tail: int = 64, cold: int = 200, tenant: str = "", seed: int = 0
) -> list[Job]:
    """Poisson arrivals: hot requests that begin with one of four texts of 960 tokens, and cold ones like nothing before."""
    draw = random.Random(seed)
    fresh = iter(range(1_000_000, 2**31 - 1))
    texts = [[next(fresh) for _ in range(960)] for _ in range(4)]
    jobs = [Job(0.0, [*text, next(fresh)], tenant=tenant, label="warm") for text in texts]
    for rate, label in ((hot_rate, "hot"), (cold_rate, "cold")):
        at = 1.0  # by then the texts are cached
        while rate and (at := at + draw.expovariate(rate)) < 1.0 + seconds:
            begin = draw.choice(texts) if label == "hot" else []
            prompt = [*begin, *(next(fresh) for _ in range(tail if label == "hot" else cold))]
            jobs.append(Job(at, prompt, tenant=tenant, label=label))
    return sorted(jobs, key=lambda job: job.at)


def main() -> int:
    """Print the waits of hot and cold requests under every order, hot ones alone being more than the machine can do."""
    print(f"{'order':12} {'hot p50':>9} {'hot p99':>9} {'cold p50':>9} {'cold p99':>9}   seconds")
    for order in ORDERS:
        simulation = Simulation(order)
        simulation.run(hot_and_cold(30, 1.3 * 4000 / 64, 1.6), until=31)
        waits = [simulation.waits(label) for label in ("hot", "cold")]
        print(f"{order:12}", *(f"{np.percentile(found, q):9.3f}" for found in waits for q in (50, 99)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
