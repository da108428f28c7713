"""The server's TLS certificate, read again when its files change: they are renewed every few weeks, a server runs for longer.

New connections get the new certificate; those that are open keep theirs. A pair that cannot be used, as a certificate whose key
is still to be written, changes nothing but the log.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable

import uvicorn

from kvloom.server.logs import fields

LOOK_SECONDS = 1.0
"""Between two looks at the files. They are read once they have been the same for two looks."""

log = logging.getLogger("kvloom.server")
Signature = tuple[tuple[int, int, int] | None, ...]


class Certificate:
    """Keeps the context that connections are made with up to date."""

    def __init__(
        self, context: ssl.SSLContext, certfile: str, keyfile: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """context: made of these files, for the listening socket."""
        self._files = (certfile, keyfile)
        self._clock = clock
        self._used = self._seen = self._signature()
        self._next = clock() + LOOK_SECONDS
        self._current = context
        # Called in every handshake, with or without a name: the connection goes on with the context that it is given here.
        context.sni_callback = self._choose

    def look(self) -> None:
        """Read the files again if they have changed and it is time. Takes microseconds if not."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + LOOK_SECONDS
        signature = self._signature()
        settled, self._seen = signature == self._seen, signature
        if settled and signature != self._used:
            self._used = signature
            self._load()

    def _load(self) -> None:
        files = fields(certfile=self._files[0], keyfile=self._files[1])
        try:
            self._current = context_of(*self._files)
        except OSError as error:  # ssl.SSLError is one, too
            log.error("the new TLS certificate or key cannot be used: %s; the one before is kept", error, extra=files)
        else:
            log.info("the TLS certificate has been read again, as its files have changed", extra=files)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _signature(self) -> Signature:
        """What changes whenever a file is written or another one is put in its place, behind links too."""
        return tuple(map(_stat, self._files))


def context_of(certfile: str, keyfile: str) -> ssl.SSLContext:
    """What uvicorn makes of these files. Raises OSError."""
    config = uvicorn.Config(_nothing, ssl_certfile=certfile, ssl_keyfile=keyfile, log_config=None)
    config.load()
    assert config.ssl is not None
    return config.ssl


async def _nothing(scope: object, receive: object, send: object) -> None:
    """No application is asked."""


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
