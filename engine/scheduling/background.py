"""The engine's own work: one request at a time, which gives way to everybody else's, and whose output nobody waits for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from kvloom.engine.errors import KVLoomError
from kvloom.engine.requests.request import Request, RequestOutput

log = logging.getLogger("kvloom.engine")


class Jobs(Protocol):
    """Work that waits for an idle engine."""

    def __len__(self) -> int: ...

    def start(self) -> Request | None:
        """The next piece, as a request of the engine's own. None if there is none."""
        ...

    def put_back(self) -> None:
        """The running piece gives way, and begins anew later."""
        ...


class Background:
    """Starts jobs and takes them back."""

    def __init__(self, jobs: Jobs | None, add: Callable[[Request], None], abort: Callable[[str], object]) -> None:
        """add, abort: of the engine."""
        self._jobs, self._add, self._abort = jobs, add, abort
        self._running: Request | None = None

    @property
    def waiting(self) -> bool:
        """Whether there is work for an engine that is not busy."""
        return self._jobs is not None and len(self._jobs) > 0

    def start(self) -> None:
        """Begin a piece of it: the engine is busy until it is done, or until a request comes."""
        request = None if self._jobs is None else self._jobs.start()
        if request is not None:
            request.arrival = time.monotonic()
            try:
                self._add(request)
            except KVLoomError as error:  # such as a text that is too long with the tokens in front of it
                log.warning("work for an idle engine is dropped: %s", error)
            else:
                self._running = request

    def give_way(self, tenant: str | None = None) -> None:
        """End the piece that runs, to begin it anew later. tenant: only if it is done for that one."""
        running = self._running
        if running is not None and self._jobs is not None and tenant in (None, running.tenant):
            self._jobs.put_back()
            self._running = None
            self._abort(running.id)

    def owns(self, output: RequestOutput) -> bool:
        """Whether an output is of the engine's own work."""
        if self._running is None or output.id != self._running.id:
            return False
        if output.finish_reason is not None:
            self._running = None
        return True
