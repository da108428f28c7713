"""The ASGI application: routes over an `EngineClient`, behind limits and keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from kvloom.engine.client import EngineClient
from kvloom.server import description, errors
from kvloom.server.answers.choose import formats_of
from kvloom.server.auth import AuthMiddleware, KeyRing, TenantMiddleware
from kvloom.server.context import ServerContext
from kvloom.server.hosts import HostMiddleware, guards_hosts
from kvloom.server.limits import HELD_BODIES, BodyHall, BodyLimitMiddleware
from kvloom.server.messages.errors import MessageErrorMiddleware
from kvloom.server.methods import HeadMiddleware
from kvloom.server.metrics import Metrics
from kvloom.server.options import ServerOptions
from kvloom.server.prompts import PromptEncoder
from kvloom.server.request_ids import RequestIdMiddleware
from kvloom.server.responses.store import ResponseStore
from kvloom.server.routes import chat, completions, health, home, kv, messages, metrics, models, responses, tokens
from kvloom.server.tracing import Tracing
from kvloom.version import __version__


def create_app(client: EngineClient, options: ServerOptions) -> FastAPI:
    """The application that serves `client`. It closes its own threads at shutdown, but not the client."""
    encoder = PromptEncoder(client.tokenizer, client.model.vocab_size, client.model.max_model_len, client.reserve)
    formats = formats_of(client.tokenizer, options.tool_call_parser, options.reasoning_parser)
    store = ResponseStore(options.response_store_size, options.response_store_count)
    bodies = BodyHall(HELD_BODIES * options.max_body)
    tracing = None if options.otlp_traces_endpoint is None else Tracing(options.otlp_traces_endpoint)
    figures = Metrics(client, options.tenant_names)
    figures.watch("stored_responses", "Responses that are stored.", lambda: len(store))
    figures.watch("stored_response_bytes", "Bytes that stored responses count for.", lambda: store.size)
    context = ServerContext(client, options, figures, encoder, formats, store, bodies, tracing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        context.prompts.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPIOffline(  # /docs loads its scripts from here, not from elsewhere
        title="kvloom",
        version=__version__,
        description="An LLM server whose subject is the KV cache",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = context
    errors.install(app)
    description.install(app)
    for route in (home, chat, completions, responses, messages, models, kv, tokens, health, metrics):
        app.include_router(route.router)
    _guard(app, context)
    return app


def _guard(app: FastAPI, context: ServerContext) -> None:
    """Middleware, the innermost first: a body is measured and a tenant named only for those with a key, and a preflight needs
    none of it."""
    refused, options = context.metrics.refused, context.options
    app.add_middleware(HeadMiddleware)
    app.add_middleware(BodyLimitMiddleware, limit=options.max_body, refused=refused, hall=context.bodies)
    app.add_middleware(TenantMiddleware, proxies=options.proxies(), refused=refused)
    keys, admins = KeyRing(options.api_key, options.tenant_keys), KeyRing(options.admin_key)
    if keys or admins:
        app.add_middleware(AuthMiddleware, keys=keys, admins=admins, refused=refused)
    if options.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(options.cors), allow_methods=["GET", "POST", "DELETE"],
                           allow_headers=["*"], expose_headers=["X-Request-Id", "Request-Id", "Retry-After"])  # fmt: skip
    if guards_hosts(options):
        app.add_middleware(HostMiddleware, hosts=options.allowed_hosts, origins=options.cors, refused=refused)
    app.add_middleware(MessageErrorMiddleware)
    app.add_middleware(RequestIdMiddleware, logs=options.access_log)
