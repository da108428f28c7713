"""The replicas as a front hears of them: who is there, what each said last, and what is left of those that are gone.

    line      one stream of every replica, opened as soon as Ray names it: outputs of each step, figures twice a second
    drains    Ray names it no more: its line is kept until nothing of this front is on its way there
    hangs     nothing was heard for SILENT_SECONDS: what runs there goes on elsewhere; on this machine its process is killed
    figures   of all, added up; counters of those that are gone stay in the sums

Everything but `_watched` runs on one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.handle import DeploymentHandle

from kvloom.deploy.presence import watch
from kvloom.deploy.wire import Batch, Line
from kvloom.engine.client import EngineStats, Health, TenantStats
from kvloom.engine.errors import KVLoomError, OverloadedError
from kvloom.engine.requests.figures import counted, table
from kvloom.engine.requests.request import RequestOutput

log = logging.getLogger("kvloom.server")

UP_SECONDS = 60.0
"""How long a request waits for a replica while there is none."""
FIRST_SECONDS = 5.0
"""How long the first question for figures waits for them."""
QUIET_BATCHES = 4
"""Messages without outputs, each of an idle replica, until one that is to end is let go."""
RETRY_SECONDS = 0.5
"""Between two tries to get a replica's line."""
SILENT_SECONDS, LOOK_SECONDS = 15.0, 1.0
"""After so long without a word (its line speaks twice a second) a replica counts as lost, until it is heard of again; how often
that is looked at."""
KILL_SECONDS = 30.0
"""After so long its process is killed, where it is on this machine: Ray would keep its memory, and its core, for ever."""
MOST_LEFT = 64
"""Replicas that are gone and may come back under their name."""
MOST_GONE_TENANTS = 4096
"""Tenants whose counters on replicas that are gone are remembered."""


@dataclass(slots=True)
class _Replica:
    """One that there is, or was until its requests have ended."""

    line: asyncio.Task[None]
    stats: EngineStats | None = None
    health: Health = field(default_factory=Health)
    joined: bool = False
    """Whether the owner was told that it speaks."""
    tenants: Mapping[str, TenantStats] = field(default_factory=dict)
    """What it said of them last."""
    heard: float = field(default_factory=time.monotonic)
    """When it was heard of last."""
    process: int = 0
    """Its process id, once it is known; 0 where it has been killed."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What a front does about what its fleet hears."""

    took: Callable[[str, RequestOutput], None]
    """An output has come, with the key of its order."""
    joined: Callable[[str], Coroutine[Any, Any, None]]
    """A replica speaks for the first time: what is to be done for it, beside all else."""
    hang: Callable[[set[str]], None]
    """These say nothing; none if it is empty. Called every LOOK_SECONDS."""
    holds: Callable[[int, int], None]
    """So many tokens fit into the caches of so many replicas."""


class Fleet:
    """See the module. Use it on one event loop, after `start`."""

    def __init__(self, handle: DeploymentHandle, application: str, front: str, owner: Owner, *, ours: bool) -> None:
        """handle: of the deployment of `replica.Replica` in that application. front: whose lines these are. ours: whether
        processes of replicas are this machine's, and may be killed."""
        self._handle, self._application, self._front, self._owner, self._ours = handle, application, front, owner, ours
        self.present: set[str] = set()
        """Names of those that calls may go to."""
        self.lost = 0
        """How many have died."""
        self._replicas: dict[str, _Replica] = {}
        self._gone, self._gone_tenants = EngineStats(), dict[str, TenantStats]()
        self._left: dict[str, EngineStats] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed, self._first = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = self._had_one = False

    def start(self) -> None:
        """Begin to listen, on the event loop that calls first; nothing if that was done."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            watch(self._application, self._watched)
            self.keep(self._look())

    def close(self) -> None:
        """Listen no more."""
        self._closing = True
        for task in (*(one.line for one in self._replicas.values()), *self._tasks):
            task.cancel()

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside all else, and hold it until it has ended: the loop itself does not."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def some(self) -> None:
        """Wait until there is a replica. Raises OverloadedError if that takes long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(UP_SECONDS):
                while not self.present:
                    self._changed.clear()
                    await self._changed.wait()
                return
        raise OverloadedError("no replica is up; one is being started; try again later", retry_after=5.0)

    # Figures -------------------------------------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """What was counted, also by those that are gone, and what is so now. The first call waits until they have spoken."""
        if not self._first.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_SECONDS):
                    await self._first.wait()
        parts = (*self._left.values(), *(one.stats for one in self._replicas.values() if one.stats))
        return functools.reduce(lambda a, b: a + b, parts, self._gone)

    @property
    def health(self) -> Health:
        """Well while one replica is, and until the first one was: Ray brings back the others."""
        if any(one.health.ok for one in self._replicas.values()) or not self._had_one:
            return Health()
        return Health(ok=False, reason="no replica is up; one is being started", recovers=not self._closing)

    def note_tenants(self, name: str, held: Mapping[str, TenantStats], *, whole: bool) -> None:
        """What a replica says of tenants. whole: of all that it knows."""
        if (one := self._replicas.get(name)) is not None:
            held = {tenant: stats for tenant, stats in held.items() if _holds(stats)}
            one.tenants = held if whole else {**one.tenants, **held}

    def tenants(self) -> Mapping[str, TenantStats]:
        """What was said last of every tenant, added up, with the counters of replicas that are gone."""
        return functools.reduce(table, (one.tenants for one in self._replicas.values()), self._gone_tenants)

    # Lines ---------------------------------------------------------------------------------------------------------------

    def _watched(self, names: Sequence[str]) -> None:
        """Called on a thread of Ray's."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._see, list(names))

    def _see(self, names: Sequence[str]) -> None:
        """These are the replicas that calls may go to now."""
        self.present = set(names)
        for name in self.present - self._replicas.keys():
            if not self._closing:
                self._replicas[name] = _Replica(asyncio.ensure_future(self._listen(name)))
                self._left.pop(name, None)  # it tells of all that it counted
                self._had_one = True
        self._settle()

    def _settle(self) -> None:
        capacity = sum(one.stats.capacity_tokens for one in self._replicas.values() if one.stats)
        self._owner.holds(capacity, len(self._replicas))
        self._changed.set()

    async def _listen(self, name: str) -> None:
        """A replica's line, for as long as it is there; after that for as long as it still sends."""
        died = False
        while True:
            batches = self._handle.options(stream=True).outputs.remote(Line(self._front, name))
            quiet = 0
            try:
                async for batch in batches:
                    died = False
                    self._take(name, batch)
                    quiet = 0 if name in self.present or batch.outputs or self._busy(name) else quiet + 1
                    if quiet >= QUIET_BATCHES:
                        break  # it drains, and nothing of ours is on its way there
            except (RayError, KVLoomError) as error:
                died |= isinstance(error, RayActorError)
                log.info("the line to replica %s has ended: %s", name, error.__class__.__name__)
            except Exception:
                log.exception("the line to replica %s has failed", name)
            finally:
                batches.cancel()
            if name not in self.present or self._closing:
                break
            await asyncio.sleep(RETRY_SECONDS)
        self.lost += died and not self._closing
        self._lose(name)

    def _take(self, name: str, batch: Batch) -> None:
        one = self._replicas[name]
        one.heard = time.monotonic()
        if batch.stats is not None:
            one.stats = batch.stats
            self._settle()
            if all(other.stats is not None for other in self._replicas.values()):
                self._first.set()
        if batch.health is not None:
            one.health, one.process = batch.health, batch.process
        if not one.joined:
            one.joined = True
            self.keep(self._owner.joined(name))
        for key, output in batch.outputs:
            self._owner.took(key, output)

    def _busy(self, name: str) -> bool:
        stats = self._replicas[name].stats
        return stats is not None and bool(stats.running or stats.waiting)

    def _lose(self, name: str) -> None:
        one = self._replicas.pop(name)
        if one.stats is not None:
            self._left[name] = counted(one.stats)
            if len(self._left) > MOST_LEFT:
                self._gone += self._left.pop(next(iter(self._left)))
        left = {tenant: counted(stats) for tenant, stats in one.tenants.items() if any(stats.tokens.values())}
        self._gone_tenants = dict(itertools.islice(table(self._gone_tenants, left).items(), MOST_GONE_TENANTS))
        self._settle()
        if name in self.present:  # it came back under its name
            self._see(list(self.present))

    async def _look(self) -> None:
        """Give up replicas that hang."""
        while not self._closing:
            before = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            if now - before > LOOK_SECONDS + SILENT_SECONDS / 2:
                continue  # it is this process that stood still
            silent = {name for name, one in self._replicas.items() if now - one.heard > SILENT_SECONDS}
            for one, name in ((self._replicas[name], name) for name in silent):
                if self._ours and one.process and now - one.heard > KILL_SECONDS:
                    log.warning("replica %s hangs; its process is killed, so that another can take its place", name)
                    with suppress(OSError):
                        os.kill(one.process, signal.SIGKILL)
                    one.process = 0
            self._owner.hang(silent)


def _holds(tenant: TenantStats) -> bool:
    """Whether there is anything to tell of it."""
    return bool(tenant.in_use_blocks or tenant.cached_blocks or tenant.segment_bytes or any(tenant.tokens.values()))
