"""The life of a server process: bind, load, listen, drain, exit.

The port is bound before the model is loaded, so that a port in use is known at once, but nobody is let in until the engine
is there. Exit codes (`exit_codes`): 0 after SIGTERM or Ctrl-C, ENGINE_DIED when the engine ends by itself, FAILED when it never
ran, INTERRUPTED for Ctrl-C while it loads. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

import uvicorn

from kvloom.engine.client import EngineClient
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.startup.aside import aside, load_torch_library
from kvloom.engine.startup.catalog import at_hand, resolve
from kvloom.engine.startup.prepare import Prepared, read_template
from kvloom.server import logs
from kvloom.server.app import create_app
from kvloom.server.certificate import Certificate
from kvloom.server.collector import no_collections
from kvloom.server.connections import SURPLUS, ConnectionGuard, ConnectionLimits
from kvloom.server.console import LoadingBars, banner
from kvloom.server.exit_codes import ENGINE_DIED, FAILED, INTERRUPTED, USAGE_ERROR
from kvloom.server.options import ServerOptions

log = logging.getLogger("kvloom.server")

DEATH_GRACE_SECONDS = 2.0
"""How long a server with a dead engine still answers, so that streams get their error and a probe sees 503."""
CANCEL_SECONDS = 3.0
"""How long ended requests may take to tell their clients, after the drain."""
TELL_SECONDS = 1.0
"""Of these, until who does not take what it is told is cut off."""
BACKLOG = 2048
SPARE_FILES = 64
"""File descriptors for everything but connections."""

Progress = Callable[[str, int, int], None]


class StartError(KVLoomError):
    """The server cannot listen where it was told to."""


def serve(config: EngineConfig, options: ServerOptions) -> int:
    """Load the model, serve until told to stop, and return the exit code. Raises KVLoomError if it cannot start; with a log in
    JSON that is a record of it, as everything else."""
    logs.set_up(options.log_level, options.log_format)
    try:
        return _serve(config, options.with_tenants(Tenants.read(config.tenants.tenants)))
    except (KVLoomError, OSError) as error:
        if options.log_format != "json":
            raise
        log.critical("%s", error)
        return USAGE_ERROR if isinstance(error, ConfigError) else FAILED


def _serve(config: EngineConfig, options: ServerOptions) -> int:
    allow_files(options.max_connections + SURPLUS + SPARE_FILES)
    with contextlib.closing(bind(options)) as listener:
        if options.replicas is not None or options.max_replicas is not None:
            with _replicas(config, options) as client:
                return _run(client, options, listener)
        with LoadingBars(options.log_format) as progress:
            try:
                client = _start_engine(config, progress)
            except KeyboardInterrupt:
                progress.interrupted()
                os._exit(INTERRUPTED)  # the engine's thread is inside native code that nothing can be torn down under
        try:
            return _run(client, options, listener)
        finally:
            client.close()


def _start_engine(config: EngineConfig, progress: Progress) -> EngineClient:
    model = config.model.model
    with no_collections():
        library = aside(load_torch_library)
        template = read_template(config.model.chat_template)
        prepared = Prepared(lambda: resolve(model, progress), template) if at_hand(model) else None
        library.result()  # gives the others the interpreter's lock, as the import does not
        from kvloom.engine.thread.client import ThreadEngineClient

        return ThreadEngineClient.start(config, progress, prepared)


def _replicas(config: EngineConfig, options: ServerOptions) -> contextlib.AbstractContextManager[EngineClient]:
    """Engines in processes of their own: of a room above this one, which only `--replicas` opens."""
    local: Any = importlib.import_module("kvloom.deploy.local")
    return cast(contextlib.AbstractContextManager[EngineClient], local.replicas(config, options))


def allow_files(needed: int) -> None:
    """Raise the process's limit of open files to what its connections need. Raises StartError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = max(0, hard - SURPLUS - SPARE_FILES)
        raise StartError(f"max_connections needs {needed} open files, and this process may have {hard}; raise ulimit -n, or "
                         f"give --max-connections {most}")  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def bind(options: ServerOptions) -> socket.socket:
    """A bound socket that does not listen yet. Raises StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"host is {options.host!r}: {error.strerror or error}; give an address of this machine") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartError(_bind_problem(options, error)) from None
    return listener


def _bind_problem(options: ServerOptions, error: OSError) -> str:
    return f"cannot listen on {options.host} port {options.port}: {error.strerror}; give another --host or --port"


def _run(client: EngineClient, options: ServerOptions, listener: socket.socket) -> int:
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # someone else bound the same port while both of us were loading
        raise StartError(_bind_problem(options, error)) from None
    guard = ConnectionGuard(ConnectionLimits.of(options))
    config = uvicorn.Config(
        create_app(client, options),
        http=guard.protocol,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(options.keep_alive),
        timeout_graceful_shutdown=int(options.drain_seconds + CANCEL_SECONDS + 1),
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    _check_tls(config)
    server = EngineServer(config, client, options, guard)
    server.run(sockets=[listener])
    return server.exit_code


def _check_tls(config: uvicorn.Config) -> None:
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one, too
        raise StartError(f"the TLS certificate or key cannot be used: {error}; give PEM files that fit each other") from None


class EngineServer(uvicorn.Server):
    """uvicorn's server with an eye on the engine, a drain that ends with an answer, and no second life for signals."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, options: ServerOptions, guard: ConnectionGuard) -> None:
        super().__init__(config)
        self._guard = guard
        self.exit_code = 0
        self._client = client
        self._options = options
        self._certificate: Certificate | None = None
        if config.ssl is not None:
            self._certificate = Certificate(config.ssl, str(options.ssl_certfile), str(options.ssl_keyfile))
        self._died: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say where."""
        await super().startup(sockets)
        if self.started and sockets:
            stats = await self._client.stats()
            banner(self._client.model, stats, self._options, sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. True ends the server."""
        if self._died is None:
            state = await self._client.health()
            if not state.ok and not state.recovers:
                log.critical("the engine is not healthy: %s; the process ends", state.reason)
                self._died, self.exit_code = time.monotonic(), ENGINE_DIED
        elif time.monotonic() - self._died > DEATH_GRACE_SECONDS:
            self.should_exit = True
        if self._certificate is not None:
            self._certificate.look()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing new, let requests finish for a while, then end them with an error that says why."""
        self._guard.drain()
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._options.drain_seconds)
        log.warning("requests still run after %g s; they are ended", self._options.drain_seconds)
        await asyncio.to_thread(self._client.close)
        await asyncio.sleep(TELL_SECONDS)
        self._guard.end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server; unlike uvicorn's own, they are not raised again, so that the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        log.info("shutting down; requests have %g s to finish; a second signal ends them at once", self._options.drain_seconds)
