"""Outputs of one request that nobody has taken yet: bounded, since a client that does not read must not fill the memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvloom.engine.errors import KVLoomError, OverloadedError
from kvloom.engine.requests.request import RequestOutput

MAX_OUTPUTS = 4096
"""Outputs that may wait: minutes of a stream."""


class Backlog:
    """A queue that gives up when too much waits: what it holds is dropped, the request is ended, and the reader is told."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        """give_up: ends the request; called once, on the event loop."""
        self._queue: asyncio.Queue[RequestOutput | KVLoomError] = asyncio.Queue()
        self._give_up = give_up
        self._given_up = False

    def put_nowait(self, item: RequestOutput | KVLoomError) -> None:
        """One more output, or the error that ends them."""
        if self._given_up:
            return
        if self._queue.qsize() >= MAX_OUTPUTS:
            self._given_up = True
            self._queue = asyncio.Queue()
            item = OverloadedError(f"{MAX_OUTPUTS} outputs were not read in time; the request has been ended; read faster")
            self._give_up()
        self._queue.put_nowait(item)

    async def get(self) -> RequestOutput | KVLoomError:
        """The next one."""
        return await self._queue.get()
