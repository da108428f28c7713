"""What routes share: the engine, the options, the metrics, and who is asking."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fastapi import Request

from kvloom.engine.client import EngineClient
from kvloom.engine.errors import ModelNotFoundError, OverloadedError
from kvloom.engine.thread.questions import WAITING_OF_TENANT
from kvloom.server.answers.choose import AnswerFormats
from kvloom.server.errors import OperatorOnlyError
from kvloom.server.limits import BodyHall
from kvloom.server.metrics import Metrics
from kvloom.server.options import ServerOptions
from kvloom.server.prompts import PromptEncoder
from kvloom.server.request_ids import client_id
from kvloom.server.responses.store import Owner, ResponseStore
from kvloom.server.tracing import Tracing


@dataclass(frozen=True, slots=True)
class ServerContext:
    """One per application, in `app.state.context`."""

    client: EngineClient
    options: ServerOptions
    metrics: Metrics
    prompts: PromptEncoder
    answers: AnswerFormats
    responses: ResponseStore
    bodies: BodyHall
    tracing: Tracing | None = None
    """Where spans go, if they are wanted."""
    asking: Counter[str] = field(default_factory=Counter)
    """Tenant -> questions to the engine that are being encoded or answered."""

    @contextmanager
    def question(self, tenant: str) -> Iterator[None]:
        """One of a tenant's questions, from before it is encoded to its answer. Raises OverloadedError if it has too many."""
        if self.asking[tenant] >= WAITING_OF_TENANT:
            raise OverloadedError(f"{self.asking[tenant]} questions of this tenant are being answered; try again later")
        self.asking[tenant] += 1
        try:
            yield
        finally:
            self.asking[tenant] -= 1
            if not self.asking[tenant]:
                del self.asking[tenant]

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless `name` is one of the served model's. None, which OpenAI does not allow, means that
        model."""
        served = self.client.model.names
        if name is not None and name not in served:
            known = " or ".join(map(repr, served))
            raise ModelNotFoundError(f"the model {name[:200]!r} is not served here; the served model is {known}")


def context_of(request: Request) -> ServerContext:
    """The application's context, as the caller's tenant may use it."""
    context: ServerContext = request.app.state.context
    return replace(context, prompts=context.prompts.of(tenant_of(request)))


def tenant_of(request: Request) -> str:
    """Whose request it is, as `auth` found out; '' without API keys and proxies."""
    return str(getattr(request.state, "tenant", ""))


def owner_of(request: Request) -> Owner:
    """Whose stored responses a request may see."""
    return Owner(tenant_of(request), str(getattr(request.state, "key", "")))


def sees_all(request: Request) -> bool:
    """Whether the caller may see everybody's figures: the operator, and anybody where there are no tenants and no admin key."""
    options = context_of(request).options
    return bool(getattr(request.state, "admin", False)) or not (options.has_tenants or options.admin_key)


def operator_only(request: Request, what: str) -> None:
    """Raises OperatorOnlyError unless the caller may see everybody's figures; `what` begins its sentence."""
    if not sees_all(request):
        raise OperatorOnlyError(f"{what} for the operator; send an admin key (set with --admin-key) as the bearer token")


def new_id() -> str:
    """An id for the engine. Never the client's: two clients may choose the same one."""
    return uuid.uuid4().hex


def client_request_id(request: Request, default: str) -> str:
    """The X-Request-Id to answer with and to log: the client's own, if it sent one that is harmless, else ours."""
    return client_id(request.scope) or default
