"""Connections: how many there may be, how long each may take over a head, a body, an answer, or nothing at all.

    HEAD      no whole request head has come since the connection was made, or since the first byte of another request
    BODY      a head has come, its body has not
    ANSWER    the server works on the request, or sends
    IDLE      kept alive between two requests

What a client has to do gets a deadline by the state it is in, never by when its last byte came: one byte now and then keeps
nothing alive. Bodies, and answers that are not taken, get more time the more of them has passed.

Over the bound, the connection that has waited longest for a head goes, else the one that has been idle longest, so that a flood
of silent connections closes its own. With neither, the newcomer is `surplus`: it is told of the server's health or refused with
503, and of those there are only a few at a time.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from kvloom.server.auth import OPEN_PATHS
from kvloom.server.errors import WireError
from kvloom.server.limits import LINGER_BYTES
from kvloom.server.messages.errors import MessageErrorMiddleware
from kvloom.server.options import ServerOptions
from kvloom.server.raw_http import BegunTransport, raw_answer, without_chunks
from kvloom.server.request_ids import RequestIdMiddleware

MAX_HEADER_BYTES = 64 * 1024
SLOWEST_BYTES = 16 * 1024
"""Bytes per second that a body must make, or an answer be taken at, beyond the time that its limit gives."""
SURPLUS = 16
"""Connections beyond the bound that may ask for the server's health."""
PROBE_SECONDS = 0.05
"""Between the first two looks at whether a client that sends no more is still there; later ones come with the ticks."""
LOG_SECONDS = 10.0
"""Closed connections are logged at most this often, in one line."""

log = logging.getLogger("kvloom.server")


class State(Enum):
    """What a connection waits for."""

    HEAD = "no request came in time"
    BODY = "a body came too slowly"
    ANSWER = "an answer was not taken"
    IDLE = "kept alive for too long"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of a server's connections; times in seconds."""

    connections: int = 1024
    header_timeout: float = 20.0
    """For a request's head, from the connection or the head's first byte to its end."""
    body_timeout: float = 30.0
    """For a body, and a second more for every SLOWEST_BYTES that have come."""
    send_timeout: float = 30.0
    """For a client to take what waits for it, and a second more for every SLOWEST_BYTES it takes."""
    keep_alive: float = 75.0
    """Between two requests: longer than the pools of common HTTP clients, so that they, not we, close connections."""
    message_bytes: int = LINGER_BYTES
    """For one request with all its framing (chunk sizes, extensions, trailers); beyond, the connection is closed."""

    @classmethod
    def of(cls, options: ServerOptions) -> ConnectionLimits:
        """What the settings say."""
        return cls(
            connections=options.max_connections,
            header_timeout=options.header_timeout,
            body_timeout=options.body_timeout,
            send_timeout=options.send_timeout,
            keep_alive=options.keep_alive,
            message_bytes=8 * options.max_body + LINGER_BYTES,  # a body in chunks of one byte takes six times its length
        )

    @property
    def tick(self) -> float:
        """Seconds between two looks at the deadlines."""
        return min(1.0, min(self.header_timeout, self.body_timeout, self.send_timeout, self.keep_alive) / 4)


@dataclass(slots=True)
class ConnectionGuard:
    """All connections of one server. `protocol` makes one, as uvicorn asks for it."""

    limits: ConnectionLimits
    clock: Callable[[], float] = time.monotonic
    closed: Counter[str] = field(default_factory=Counter)
    """Connections that were closed for the others' sake, by reason, since the start."""
    draining: bool = False
    """Whether the server ends."""
    _open: dict[BoundedHttpProtocol, None] = field(default_factory=dict)  # oldest first
    _unlogged: Counter[str] = field(default_factory=Counter)
    _logged: float = float("-inf")
    _ticking: bool = False

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> BoundedHttpProtocol:
        """A protocol for one more connection."""
        return BoundedHttpProtocol(self, config, server_state, app_state, _loop)

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: BoundedHttpProtocol) -> None:
        """One more connection; another may have to go for it."""
        if len(self._open) >= self.limits.connections:
            victim = self._spare()
            if victim is None and len(self._open) >= self.limits.connections + SURPLUS:
                victim = next((other for other in self._open if other.surplus), None)
            if victim is not None:
                self._close(victim, "there were too many connections")
            connection.surplus = len(self._open) >= self.limits.connections
        self._open[connection] = None
        if self.draining:
            connection.end()
        if not self._ticking:
            self._ticking = True
            connection.loop.call_later(self.limits.tick, self._tick, connection.loop)

    def drain(self) -> None:
        """The server ends: only requests that have come whole are waited for."""
        self.draining = True
        for connection in list(self._open):
            if connection.state in (State.HEAD, State.BODY):
                connection.end()

    def end(self) -> None:
        """Close all that are left, whatever they wait for."""
        for connection in list(self._open):
            connection.end()

    def lost(self, connection: BoundedHttpProtocol) -> None:
        """A connection is gone."""
        self._open.pop(connection, None)

    def _spare(self) -> BoundedHttpProtocol | None:
        """Whom to close for another: who has waited longest for a head, else who has been idle longest."""
        for state in (State.HEAD, State.IDLE):
            found = [connection for connection in self._open if connection.state is state]
            if found:
                return min(found, key=lambda connection: connection.since)
        return None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what is over its time. Goes on as long as there are connections."""
        now = self.clock()
        for connection in list(self._open):
            connection.probe()
            if now > connection.deadline():
                self._close(connection, connection.state.value)
        if _out_of_descriptors():
            victim = self._spare()
            self.note("the process has run out of file descriptors (raise ulimit -n or lower --max-connections)")
            if victim is not None:
                self._close(victim, "there was no file descriptor left")
        self._log()
        self._ticking = bool(self._open)
        if self._ticking:
            loop.call_later(self.limits.tick, self._tick, loop)

    def _close(self, connection: BoundedHttpProtocol, reason: str) -> None:
        self.lost(connection)
        connection.end()
        if connection.state is not State.IDLE:
            self.note(reason)

    def note(self, reason: str) -> None:
        """A connection is closed for this reason."""
        self.closed[reason] += 1
        self._unlogged[reason] += 1
        self._log()

    def _log(self) -> None:
        now = self.clock()
        if self._unlogged and now - self._logged >= LOG_SECONDS:
            log.warning("connections closed: %s", "; ".join(f"{why} ({count})" for why, count in self._unlogged.items()))
            self._unlogged.clear()
            self._logged = now


def _out_of_descriptors() -> bool:
    """Whether another connection could not be accepted. The event loop does not tell."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _refusing(error: WireError) -> ASGIApp:
    """An application that answers so, whatever is asked."""

    close = {"Connection": "close"}
    refuse = MessageErrorMiddleware(lambda scope, receive, send: error.response(close)(scope, receive, send))
    return RequestIdMiddleware(refuse, logs=False)


_HEADERS_TOO_LARGE = WireError(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes", code="headers_too_large")
_TOO_SLOW = WireError(408, "the request did not come in time; the connection is closed", code="request_timeout")
_TOO_MANY = WireError(503, "the server has too many connections; try again later", code="too_many_connections", retry_after=1.0)
_ENDING = WireError(503, "the server is shutting down; try again", code="shutting_down", retry_after=1.0)
_refuse_headers, _refuse_surplus = _refusing(_HEADERS_TOO_LARGE), _refusing(_TOO_MANY)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on the head, on a request's bytes and on time, which it lacks.

    Trailers are dropped: uvicorn would add them to the headers, where whoever speaks through a proxy may not write.
    """

    def __init__(
        self,
        guard: ConnectionGuard,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.surplus = False
        """Over the bound: only good for asking whether the server is healthy."""
        self.since = guard.clock()
        """When it came into its state."""
        self._guard = guard
        self._served: Any = self.app
        self._in_head = True
        self._in_body = False
        self._head_bytes = 0
        self._message_bytes = 0
        self._body_bytes = 0
        self._begun: BegunTransport | None = None  # the client has closed its side, and may have gone
        self._stuck: tuple[float, int] | None = None  # since when writing is paused, and what waited then

    # What the guard asks ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the connection waits for."""
        if self._in_body:
            return State.BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return State.ANSWER
        return State.HEAD if self._in_head else State.ANSWER if self._stuck is not None else State.IDLE

    def deadline(self) -> float:
        """When to close the connection if it stays as it is."""
        limits = self._guard.limits
        if self._stuck is not None:
            since, waited = self._stuck
            taken = max(0, waited - self.transport.get_write_buffer_size())
            return since + limits.send_timeout + taken / SLOWEST_BYTES
        match self.state:
            case State.HEAD:
                return self.since + limits.header_timeout
            case State.BODY if not self.flow.read_paused:
                return self.since + limits.body_timeout + self._body_bytes / SLOWEST_BYTES
            case State.IDLE:
                return self.since + limits.keep_alive
        return float("inf")  # it is our turn

    def end(self) -> None:
        """Close the connection now, with a status if no answer has begun. What waits for it is told that the client is gone."""
        if self.transport is None or self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if self._stuck is not None or answered:
            self.transport.abort()  # closing would wait for the client to take what it does not take
            return
        if self._in_head or (self._in_body and not self.cycle.response_started):
            self.transport.write(raw_answer(_ENDING if self._guard.draining else _TOO_MANY if self.surplus else _TOO_SLOW))
        self.transport.close()

    # What the transport calls ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._guard.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.lost(self)
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn never keeps them
        """The client sends no more. Who has asked something whole may only have closed its sending side: it gets its answer,
        the last one. Whether it has gone altogether, only sending tells (`probe`). TLS knows no such side of its own."""
        if self.state is not State.ANSWER or self.cycle.response_complete or self.scheme == "https":
            return None
        self.cycle.keep_alive = False
        if not self.cycle.response_started and not self.pipeline:
            self._begun = BegunTransport(self.transport)
            self.cycle.transport = self._begun  # type: ignore[assignment]  # all but `write` is the transport's own
            self.probe()
            self.loop.call_later(PROBE_SECONDS, self.probe)
        return True

    def probe(self) -> None:
        """Find out whether a client that sends no more still reads: a byte of its answer makes the other end reset a connection
        that nobody holds, the next one fails. Nothing happens where an answer has begun: that tells by itself."""
        if self._begun is None or self.transport.is_closing():
            return
        if self.cycle.response_started or not self._begun.begin():
            self._begun = None

    def pause_writing(self) -> None:
        self._stuck = (self._guard.clock(), self.transport.get_write_buffer_size())
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck = None
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # what was on its way when we closed
            return
        self._message_bytes += len(data)
        super().data_received(data)
        if self._in_head:  # still no end of the headers in sight
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self._guard.note("the headers were too large")
                self.transport.write(raw_answer(_HEADERS_TOO_LARGE))
                self.transport.close()
        elif self._message_bytes > self._guard.limits.message_bytes:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Tell of a message that is no HTTP in the shape that every error has."""
        self._guard.note("what came was no HTTP")
        self.transport.write(raw_answer(WireError(400, f"{msg} The connection is closed.", code="invalid_http")))
        self.transport.close()

    # What the parser calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if not self._in_head:
            self._enter(head=True)
        self._head_bytes = self._message_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._enter(body=True)
        self._body_bytes = 0
        self.app: Any = self._served
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._guard.note("the headers were too large")
            self.app = _refuse_headers
        elif self._over() and self.url.split(b"?")[0].decode("latin-1") not in OPEN_PATHS:
            self.app = _refuse_surplus
        self.expect_100_continue = self.expect_100_continue and self.parser.get_http_version() != "1.0"
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            without_chunks(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._enter()
        self._message_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if not self._in_body:
            self.since = self._guard.clock()
        super().on_response_complete()

    def _over(self) -> bool:
        """Whether there are still more connections than there may be, and this is one of those too many."""
        self.surplus = self.surplus and len(self._guard) > self._guard.limits.connections
        return self.surplus

    def _enter(self, *, head: bool = False, body: bool = False) -> None:
        self._in_head, self._in_body, self.since = head, body, self._guard.clock()
