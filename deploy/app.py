"""The application for a cluster: `serve run kvloom.deploy.app:app model=smollm2 replicas=4 threads=8`.

    front     the HTTP side as everywhere, in an actor without torch; Ray Serve's proxies stand before it
    engine    `replica.Replica`, as many as there should be, wherever there are cores or GPUs for them

Every setting of `kvloom serve` is an argument, or a `KVLOOM_*` variable where the application is built; arguments win. What is
of connections (host, port, TLS, timeouts, max_connections) is Ray Serve's there. Keep one front: each counts and limits what it
sees, and keeps uploads for itself.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from kvloom.deploy.client import ReplicaClient
from kvloom.deploy.local import MOST_ONGOING, Share, deployment_options, described, for_replicas
from kvloom.deploy.replica import Replica
from kvloom.engine.config import EngineConfig, all_options
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.startup.prepare import tokenizer_of
from kvloom.server import environment
from kvloom.server.app import create_app
from kvloom.server.options import ServerOptions, server_options


def settings(arguments: Mapping[str, str], variables: Mapping[str, str]) -> tuple[EngineConfig, ServerOptions]:
    """Settings from arguments and variables. Raises ConfigError naming what is wrong."""
    http = {option.name for option in server_options()}
    values = environment.settings(variables, (*(option for _, option in all_options()), *server_options())) | dict(arguments)
    config = EngineConfig.from_flat({name: value for name, value in values.items() if name not in http})
    options = ServerOptions.from_flat({name: value for name, value in values.items() if name in http})
    if config.model.device != "cuda" and config.model.threads is None:
        raise ConfigError("threads is not given; say how many cores each replica computes with, as in threads=8")
    return config, options.with_tenants(Tenants.read(config.tenants.tenants))


def app(arguments: dict[str, str]) -> Any:
    """Called by `serve run` and `serve build` with what stands behind the import path. Raises ConfigError."""
    config, options = settings(arguments, os.environ)
    secret = secrets.token_hex(32)
    takes = {"num_gpus": 1} if config.model.device == "cuda" else {"num_cpus": config.model.threads or 1}
    share = Share(config.model.threads, config.cache.kv_memory, 0, takes)
    each = for_replicas(config, share, options.max_replicas or options.replicas or 1, secret)
    engine: Any = serve.deployment(Replica)
    engine = engine.options(**deployment_options(options, config, secret), ray_actor_options=takes)
    front: Any = serve.deployment(serve.ingress()(Front))
    front = front.options(
        name="front", max_ongoing_requests=MOST_ONGOING, graceful_shutdown_timeout_s=options.drain_seconds + 10
    )
    return front.bind(engine.bind(each, 0, options.log_level.upper()), config, options)


class Front:
    """The HTTP side."""

    async def __init__(self, engine: DeploymentHandle, config: EngineConfig, options: ServerOptions) -> None:  # type: ignore[misc]
        # Ray Serve awaits an asynchronous constructor; Python's types have none.
        model = await described(engine)
        tokenizer = await asyncio.to_thread(tokenizer_of, model)
        tenants = Tenants.read(config.tenants.tenants)
        queued, few = config.scheduler.max_queued_tokens, options.replicas or 1
        self._client = ReplicaClient(engine, engine.app_name, model, tokenizer, tenants, queued, few)
        self._app = create_app(self._client, options)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve once this is made."""
        return self._app

    def __del__(self) -> None:
        """Called by Ray Serve once requests have drained. Ends the lines to replicas, which wait for them to end."""
        if (client := getattr(self, "_client", None)) is not None:
            client.close()
