"""API keys, whose request it is, and who is the operator. Guards every path but /health, /ping and /ready: a list of
exceptions, not of guarded prefixes, so that a new route is safe.

The tenant of a request is, in this order:

1. what the header X-KVLoom-Tenant says, if the request comes from a trusted proxy; from anybody else the header is refused, as
   it would let everyone into everyone's cache. Keys are asked for all the same.
2. the name that the tenants file gives the key
3. a prefix of the key's hash: stable over restarts, and fit for logs and metrics, which the key is not
4. without keys, ''

Prefixes in the KV cache are shared within a tenant only.

A request with an admin key is the operator's: of the tenant '', and shown everybody's figures.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from kvloom.engine.requests.tenants import NAME, NAME_RULE
from kvloom.server.errors import WireError
from kvloom.server.options import Network

OPEN_PATHS = frozenset({"/health", "/ping", "/ready"})
TENANT_DIGITS = 12
TENANT_HEADER = "X-KVLoom-Tenant"

_MISSING = WireError(401, "no API key; send the header Authorization: Bearer KEY, or X-API-Key: KEY", code="invalid_api_key")
_WRONG = WireError(401, "the API key is not known here", code="invalid_api_key")


class KeyRing:
    """The keys that are let in, held as digests."""

    def __init__(self, keys: Iterable[str], named: Mapping[str, str] | None = None) -> None:
        """keys: whose tenants are prefixes of their hashes. named: key -> its tenant's name."""
        hashed = ((digest, digest.hex()[:TENANT_DIGITS]) for digest in map(_digest, keys))
        self._tenants = (*hashed, *((_digest(key), tenant) for key, tenant in (named or {}).items()))

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key, or None if it is not one of ours. Time does not depend on which key nearly fits."""
        given, found = _digest(key), None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(given, digest):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(b"kvloom tenant:" + key.encode("utf-8", "surrogateescape")).digest()


class AuthMiddleware:
    """Lets requests with a known key through and notes their tenant, and a digest of the key, in the request's state."""

    def __init__(self, app: ASGIApp, keys: KeyRing, admins: KeyRing, refused: Callable[[int], None]) -> None:
        """Without `keys` nobody needs one: only `admins` are told apart."""
        self.app = app
        self._keys = keys
        self._admins = admins
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            key = _key(scope)
            admin = key is not None and self._admins.tenant(key) is not None
            tenant = "" if admin or not self._keys else None if key is None else self._keys.tenant(key)
            if tenant is None:
                refusal = _MISSING if key is None else _WRONG
                self._refused(refusal.status)
                await refusal.response({"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
            digest = _digest(key).hex() if key is not None and (admin or self._keys) else ""
            scope.setdefault("state", {}).update(tenant=tenant, admin=admin, key=digest)
        await self.app(scope, receive, send)


def _key(scope: Scope) -> str | None:
    """The bearer token, or what Anthropic's clients send in X-API-Key; the first one where there are both."""
    found = ""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return str(key.strip())
        elif name == b"x-api-key":
            found = found or value.decode("latin-1").strip()
    return found or None


class TenantMiddleware:
    """Lets trusted proxies name the tenant, and nobody else."""

    def __init__(self, app: ASGIApp, proxies: Sequence[Network], refused: Callable[[int], None]) -> None:
        self.app = app
        self._proxies = tuple(proxies)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = [value for name, value in scope["headers"] if name == TENANT_HEADER.lower().encode()]
            if given:
                refusal = self._refusal(scope, given)
                if refusal is not None:
                    self._refused(refusal.status)
                    await refusal.response()(scope, receive, send)
                    return
                scope.setdefault("state", {})["tenant"] = given[0].decode("ascii")
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, given: Sequence[bytes]) -> WireError | None:
        if not self._trusts(scope):
            message = (
                f"{TENANT_HEADER} is only taken from a trusted proxy, and the address this request comes from is none; leave "
                "the header out, or start the server with --trusted-proxies"
            )
            return WireError(400, message, code="untrusted_tenant")
        name = given[0].decode("latin-1")
        if len(given) > 1 or not NAME.match(name):
            what = f"given {len(given)} times" if len(given) > 1 else repr(name[:80])
            return WireError(400, f"{TENANT_HEADER} is {what}; allowed: once, {NAME_RULE}", code="invalid_tenant")
        return None

    def _trusts(self, scope: Scope) -> bool:
        """Whether the other end of the connection is a trusted proxy. Forwarding headers say nothing about that."""
        try:
            peer = ipaddress.ip_address((scope.get("client") or ("",))[0])
        except ValueError:  # a Unix socket has no address
            return False
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:  # a dual-stack listener sees IPv4 so
            peer = peer.ipv4_mapped
        return any(peer in network for network in self._proxies)
