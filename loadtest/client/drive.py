"""Sends the jobs of one stage when they are due, within a limit on those under way; stops when asked or when nobody answers.

Owns the order of sending: by due time, then by index; a job that follows another becomes ready when that one has ended.
`scheduled` is when a request should have been sent: when it was due and, if it follows another, that one had ended; in a closed
loop, when a place became free. Sending later than that is the client's lag.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvloom.loadtest.client.arrivals import Load
from kvloom.loadtest.client.client import Client, Turn
from kvloom.loadtest.client.record import Job, Record

REFUSALS = 3
"""Failed connections in a row after which the server is looked for."""


@dataclass(slots=True)
class StageRun:
    """What came of a stage."""

    started: float
    """Instant of `time.perf_counter()`."""
    planned: int
    """Requests that were to be sent; of a closed loop with a time of its own, those that were."""
    records: list[Record] = field(default_factory=list)
    """Of the requests that were due before the stage ended, by index."""
    interrupted: bool = False
    lost: bool = False
    """Whether the server went away."""
    ran_out: bool = False
    """Whether a closed loop with a time of its own had no more requests before that was over."""


def check_order(jobs: Sequence[Job]) -> None:
    """Raises ValueError for a job that can never be sent."""
    for index, job in enumerate(jobs):
        if job.follows is None:
            continue
        if not 0 <= job.follows < index:
            raise ValueError(f"request {index} follows request {job.follows}; it can only follow an earlier one")
        if not (isinstance(job.prompt, str) and isinstance(jobs[job.follows].prompt, str)):
            raise ValueError(f"request {index} follows request {job.follows}; both need text prompts, not token ids")


class Driver:
    """Runs one stage once."""

    def __init__(
        self,
        client: Client,
        jobs: Sequence[Job],
        due: Sequence[float],
        load: Load,
        *,
        on_end: Callable[[Record, float], None] = lambda record, started: None,
    ) -> None:
        """`on_end` gets every record once it is complete, and the instant at which the stage started."""
        check_order(jobs)
        self._client = client
        self._jobs = jobs
        self._due = due
        self._limit = load.limit or len(jobs)
        self._closed = load.mode == "closed"
        self._seconds = load.seconds if self._closed else None  # an open loop's times of sending end by themselves
        self._on_end = on_end
        self._wake = asyncio.Event()
        self._stopped = False
        self._refused = 0
        self._records: dict[int, Record] = {}
        self._history: dict[int, tuple[Turn, ...]] = {}
        self._followers: defaultdict[int, list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            if job.follows is not None:
                self._followers[job.follows].append(index)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready = [(due[i], i) for i, job in enumerate(jobs) if job.follows is None]
        heapq.heapify(self._ready)

    @property
    def running(self) -> list[Record]:
        """Records of the requests under way."""
        return [self._records[index] for index in self._running]

    def stop(self) -> None:
        """Send nothing more and abort what is under way."""
        self._stopped = True
        self._wake.set()

    async def run(self) -> StageRun:
        """Send all, and wait for the last to end."""
        self._started = self._freed = time.perf_counter()
        run = StageRun(self._started, len(self._jobs))
        async with asyncio.TaskGroup() as group:
            while self._goes_on() and not (self._stopped or run.lost):
                self._send_due(group)
                await self._wait()
                run.lost = await self._is_lost()
            for index, task in self._running.items():
                if run.lost:
                    self._records[index].fail("stream", "the server went away")
                task.cancel()
        run.interrupted = self._stopped
        if self._time_is_up():
            run.planned = len(self._records)
        run.ran_out = self._seconds is not None and len(self._records) == len(self._jobs)
        # A task that was cancelled before its first step has sent nothing.
        run.records = [record for _, record in sorted(self._records.items()) if record.ended is not None]
        return run

    def _time_is_up(self) -> bool:
        """Whether a closed loop has sent for as long as it should."""
        return self._seconds is not None and time.perf_counter() - self._started >= self._seconds

    def _goes_on(self) -> bool:
        """Whether anything is to be sent or waited for."""
        if self._time_is_up():
            self._ready.clear()
        return bool(self._ready or self._running)

    def _send_due(self, group: asyncio.TaskGroup) -> None:
        now = time.perf_counter() - self._started
        while self._ready and self._ready[0][0] <= now and len(self._running) < self._limit:
            due, index = heapq.heappop(self._ready)
            scheduled = max(self._started + due, self._freed) if self._closed else self._started + due
            self._records[index] = Record.of(index, self._jobs[index], scheduled)
            self._running[index] = group.create_task(self._one(index))

    async def _wait(self) -> None:
        """Until something ended, or the next job is due."""
        due = self._ready[0][0] if self._ready and len(self._running) < self._limit else None
        try:
            async with asyncio.timeout(None if due is None else max(0.0, self._started + due - time.perf_counter())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _is_lost(self) -> bool:
        """Whether nothing listens any more."""
        if self._refused < REFUSALS or self._stopped:
            return False
        self._refused = 0
        return not await self._client.reachable()

    async def _one(self, index: int) -> None:
        job, record = self._jobs[index], self._records[index]
        before = None if job.follows is None else self._records[job.follows]
        try:
            if before is not None and before.error is not None:
                record.sent = record.ended = time.perf_counter()
                record.fail("follows", f"request {before.index}, which it follows, failed ({before.error_kind})")
            else:
                await self._client.send(job, record, self._history.get(index, ()))
        finally:
            self._over(index, record)

    def _over(self, index: int, record: Record) -> None:
        """Make room, and let those that follow go."""
        del self._running[index]
        self._freed = record.ended = record.ended or time.perf_counter()
        if record.error_kind == "connect":
            self._refused += 1
        elif record.status is not None:
            self._refused = 0
        prompt = self._jobs[index].prompt
        for follower in self._followers[index]:
            assert isinstance(prompt, str)  # check_order
            self._history[follower] = (*self._history.get(index, ()), Turn(prompt, record.text))
            heapq.heappush(self._ready, (max(self._due[follower], self._freed - self._started), follower))
        self._on_end(record, self._started)
        self._wake.set()


async def closed_loop(client: Client, jobs: Sequence[Job], concurrency: int) -> list[Record]:
    """Send jobs with at most `concurrency` under way; each starts when one before it ends."""
    return (await Driver(client, jobs, [0.0] * len(jobs), Load(concurrency=concurrency)).run()).records
