"""Who may find whose segments: a domain per tenant and salt, per group, and one for everybody.

A domain is a keyed hash (`reuse.prefix`), so that nobody can name another's. A salt keeps a request to itself: it neither finds
what others shared nor leaves anything to them.
"""

from __future__ import annotations

from typing import NamedTuple

from kvloom.engine.bounds import shown
from kvloom.engine.cache.prefix import Domain, DomainFactory
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.reuse.kvshare.options import SCOPES


class Scopes(NamedTuple):
    """The domains in which a request may find segments."""

    own: Domain
    group: Domain | None
    public: Domain | None

    def readable(self) -> list[Domain]:
        """In the order in which they are searched."""
        return [domain for domain in self if domain is not None]

    def of(self, scope: str) -> Domain | None:
        """The domain of a scope, if the request has one."""
        return {"tenant": self.own, "group": self.group, "public": self.public}.get(scope)

    def kinds(self) -> dict[bytes, str]:
        """Names of the scopes by their domain's key."""
        return {domain.key: name for name in SCOPES if (domain := self.of(name)) is not None}


class ScopeBook:
    """Scopes of all tenants of one engine."""

    def __init__(self, domains: DomainFactory, tenants: Tenants) -> None:
        self._domains, self._tenants = domains, tenants

    def of(self, request: Request) -> Scopes:
        """Those of a request."""
        return self.named(request.tenant, request.cache_salt)

    def named(self, tenant: str, salt: str) -> Scopes:
        """Those of a tenant's requests with that salt."""
        own = self._domains.domain(tenant, salt, "kvshare tenant")
        if salt:
            return Scopes(own, None, None)
        group = self._tenants.get(tenant).group
        return Scopes(own, self._shared(f"kvshare group {group}") if group else None, self._shared("kvshare public"))

    def _shared(self, name: str) -> Domain:
        return self._domains.domain("", "", name)._replace(shared=True)

    def check(self, request: Request, scope: str, param: str) -> None:
        """Whether the tenant may leave segments there. Raises InvalidRequestError."""
        tenant, problem = self._tenants.get(request.tenant), None
        if scope not in SCOPES:
            problem = f"allowed: {', '.join(SCOPES)}"
        elif scope == "group" and not tenant.group:
            problem = "but this tenant is in no group; the operator can put it into one in the tenants file"
        elif scope in ("group", "public") and request.cache_salt:
            problem = "but cache_salt keeps this request to itself; leave one of them out"
        elif scope == "public" and not tenant.publishes:
            problem = "but this tenant may not publish; the operator can allow it in the tenants file"
        if problem is not None:
            raise InvalidRequestError(f"{param} is {shown(scope)}; {problem}".replace("; but", ", but"), param=param)
