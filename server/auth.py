"""API keys. Guards every path but /health: a list of exceptions, not of guarded prefixes, so that a new route is safe.

A key's tenant is a prefix of its hash: stable over restarts, and fit for logs and metrics, which the key is not. Prefixes in
the KV cache are shared within a tenant only. Without keys there is one tenant, ''.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from kvloom.server.errors import WireError

OPEN_PATHS = frozenset({"/health"})
TENANT_DIGITS = 12

_MISSING = WireError(401, "no API key; send the header Authorization: Bearer KEY", code="invalid_api_key")
_WRONG = WireError(401, "the API key is not known here", code="invalid_api_key")


class KeyRing:
    """The keys that are let in, held as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key, or None if it is not one of ours. Time does not depend on which key nearly fits."""
        given, found = _digest(key), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = digest
        return None if found is None else found.hex()[:TENANT_DIGITS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(b"kvloom tenant:" + key.encode("utf-8", "surrogateescape")).digest()


class AuthMiddleware:
    """Lets requests with a known bearer key through and notes their tenant in the request's state."""

    def __init__(self, app: ASGIApp, keys: KeyRing, refused: Callable[[int], None]) -> None:
        self.app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            key = _bearer(scope)
            tenant = None if key is None else self._keys.tenant(key)
            if tenant is None:
                refusal = _MISSING if key is None else _WRONG
                self._refused(refusal.status)
                await refusal.response({"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


def _bearer(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return str(key.strip())
    return None
