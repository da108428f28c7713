"""Threads on which tenants take turns: what one of them sends keeps another's waiting for one piece of work at most.

A tenant has one thread at a time, so that with two of them a single tenant never holds both; with more tenants than threads the
next turn is that of who has waited longest for one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class Lanes:
    """A few threads, begun with the first work. Safe to use from several threads."""

    def __init__(self, threads: int, name: str, begin: Callable[[], None]) -> None:
        """begin: called once by every thread."""
        self._threads, self._name, self._initializer = threads, name, begin
        self._lock = threading.Lock()
        self._lanes: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}  # tenants in the order of their turns
        self._held: set[str] = set()
        """Tenants that have a thread."""
        self._closed = False

    def submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        """The result of `work`, once it has been the tenant's turn; until then it can be cancelled. Cancelled at once when the
        lanes are closed."""
        future = Future[T]()
        with self._lock:
            if self._closed:
                future.cancel()
                return future
            waiting = (entry for entry in self._lanes.get(tenant, ()) if not entry[0].cancelled())
            self._lanes[tenant] = deque([*waiting, (future, work)])
            self._begin()
        return future

    def close(self) -> None:
        """End the threads; what has not begun is given up."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                for future, _ in lane:
                    future.cancel()
            self._lanes.clear()
            if "_pool" in self.__dict__:
                self._pool.shutdown(wait=False)

    def _begin(self) -> None:
        """Give threads to tenants that wait for one. With the lock held."""
        while len(self._held) < self._threads:
            tenant = next((tenant for tenant in self._lanes if tenant not in self._held), None)
            if tenant is None:
                return
            lane = self._lanes.pop(tenant)
            while lane and not lane[0][0].set_running_or_notify_cancel():
                lane.popleft()  # what was given up costs no turn
            if not lane:
                continue
            future, work = lane.popleft()
            if lane:
                self._lanes[tenant] = lane  # behind the others
            self._held.add(tenant)
            self._pool.submit(self._do, tenant, future, work)

    def _do(self, tenant: str, future: Future[Any], work: Callable[[], Any]) -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with self._lock:  # before who waits is told, and may send more
            self._held.discard(tenant)
            self._begin()
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix=self._name, initializer=self._initializer)
