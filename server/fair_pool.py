"""A few threads that tenants use in turns: nobody's texts wait behind all of another's.

Safe for one event loop at a time; work that has begun goes on to its end, whoever waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvloom.engine.errors import OverloadedError

MAX_WAITING = 64
"""Pieces of work of one tenant that may wait."""

T = TypeVar("T")


class FairPool:
    """Threads, and lanes of those that wait for one."""

    def __init__(self, threads: int, begin: Callable[[], None]) -> None:
        """begin: called once by every thread."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvloom-text", initializer=begin)
        self._idle = threads
        self._lanes: dict[str, deque[asyncio.Future[None]]] = {}  # tenants in the order of their turns

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """The result of `work`, done by a thread. Raises OverloadedError if too much of the tenant's waits."""
        await self._turn(tenant)
        loop = asyncio.get_running_loop()
        done = self._pool.submit(work)
        done.add_done_callback(lambda _: self._ended(loop))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the threads; what has not begun is given up."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, tenant: str) -> None:
        """Return once a thread is ours."""
        lane = self._lanes.setdefault(tenant, deque())
        if len(lane) >= MAX_WAITING:
            raise OverloadedError(f"{len(lane)} texts of this tenant wait to be encoded; try again later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.append(turn)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had just come
                self._idle += 1
            self._next()
            raise

    def _next(self) -> None:
        """Give idle threads to those that wait, a tenant after the other."""
        while self._lanes and self._idle:
            tenant = next(iter(self._lanes))
            lane = self._lanes.pop(tenant)
            turn = lane.popleft()
            if lane:
                self._lanes[tenant] = lane  # behind the others
            if not turn.cancelled():
                self._idle -= 1
                turn.set_result(None)

    def _ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread: tell the loop that it is idle."""

        def give_back() -> None:
            self._idle += 1
            self._next()

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(give_back)
