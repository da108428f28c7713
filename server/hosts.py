"""Host and Origin, on a server that listens on loopback and asks for no key: what keeps web pages out.

A page can give a name of its own the address 127.0.0.1 (DNS rebinding), and would then be read and answered like a program of
this machine. Its requests still carry its name in Host; those of other pages carry theirs in Origin. Both must be names of this
machine, or named by the operator. A server with keys needs none of this, since a page does not know them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from kvloom.server.auth import OPEN_PATHS
from kvloom.server.errors import WireError
from kvloom.server.options import ServerOptions


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower().rstrip(".") == "localhost"


def guards_hosts(options: ServerOptions) -> bool:
    """Whether this server has to look at Host."""
    return is_loopback(options.host) and not options.asks_for_keys


class HostMiddleware:
    """Refuses requests that were meant for another name, or come from a page of another site."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str], refused: Callable[[int], None]) -> None:
        """hosts: names allowed beside those of loopback. origins: pages that may call (CORS), * for any."""
        self.app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in OPEN_PATHS else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        self._refused(refusal.status)
        await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> WireError | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or not all(self._knows(host_of(host)) for host in hosts):
            message = f"Host is {hosts[-1][:80]!r}; allowed: localhost and loopback addresses, or what --allowed-hosts names"
            return WireError(403, message, code="host_not_allowed")
        for name, value in scope["headers"]:
            if name == b"origin" and not self._lets_in(value.decode("latin-1")):
                message = f"pages of {value.decode('latin-1')[:80]!r} may not call this server; name that origin with --cors"
                return WireError(403, message, code="origin_not_allowed")
        return None

    def _knows(self, host: str | None) -> bool:
        return host is not None and (is_loopback(host) or host.lower().rstrip(".") in self._hosts)

    def _lets_in(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins or self._knows(host_of(origin.partition("://")[2]))


def host_of(netloc: str) -> str | None:
    """The name in `name:port`, without brackets; None if there is none or it cannot be read."""
    try:
        parts = urlsplit("//" + netloc)
        int(parts.port or 0)  # raises for a port that is none
        plain = parts.username is None and not parts.path and not parts.query and not parts.fragment
        return parts.hostname if plain else None
    except ValueError:
        return None
