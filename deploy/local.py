"""Replicas on this machine: a Ray of our own, on loopback alone, that lives as long as the server.

front, this process      HTTP, tokenizer, router; no torch
replicas                 an engine each, on cores and memory of its own: `shares`
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvloom.engine.client import EngineClient, ModelInfo
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.startup.memory import MIB, available_memory, default_kv_memory, size
from kvloom.engine.startup.prepare import read_template, tokenizer_of
from kvloom.engine.startup.processors import processors
from kvloom.server.options import ServerOptions

APPLICATION, DEPLOYMENT = "kvloom", "engine"
OBJECT_STORE = 256 * MIB
"""Ray's own memory for large objects: what crosses here is small."""
MOST_ONGOING = 16384
"""Requests that a replica takes; what it has room for is decided by tokens."""

log = logging.getLogger("kvloom.server")

RAY = {
    "RAY_AUTH_MODE": "token",  # replicas unpickle what reaches their ports
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without a cluster: ports on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: anything else on the machine would come first
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the engine has a thread of its own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""What Ray reads of the environment, where the user has not said otherwise; but for the first line, which stays."""


@dataclass(frozen=True, slots=True)
class Share:
    """What each replica gets of this machine."""

    threads: int
    kv_memory: int
    pinned: bool
    """Whether there are cores enough for every replica to have its own."""


def shares(config: EngineConfig, replicas: int) -> Share:
    """Threads and bytes for each of so many replicas: as they were given, or what one engine would take, divided.

    Raises ConfigError if what was given does not fit this machine so many times.
    """
    here = processors()
    threads = config.model.threads or max(1, here.threads // replicas)
    if config.model.threads is not None and threads * replicas > here.threads:
        raise ConfigError(
            f"{replicas} replicas of {threads} threads need {threads * replicas} cores, and there are {here}; give "
            f"--threads {max(1, here.threads // replicas)}, fewer --replicas, or leave --threads out"
        )
    memory = config.cache.kv_memory
    if memory is None:
        return Share(threads, default_kv_memory() // replicas, threads * replicas <= here.cores)
    if memory * replicas > (free := available_memory()):
        raise ConfigError(
            f"{replicas} replicas of kv_memory {size(memory)} need {size(memory * replicas)}, and {size(free)} are free; give "
            f"about {max(1, free // replicas // MIB)}MiB, which each of them gets, or leave it out"
        )
    return Share(threads, memory, threads * replicas <= here.cores)


def for_replicas(config: EngineConfig, share: Share, replicas: int, secret: str) -> EngineConfig:
    """The settings of each replica. secret: of hashes, for all of them."""
    model, cache = config.model, config.cache
    return replace(
        config,
        model=replace(model, threads=share.threads, chat_template=read_template(model.chat_template)),
        cache=replace(cache, kv_memory=share.kv_memory, hash_secret=cache.hash_secret or secret),
        tenants=replace(config.tenants, tenant_replicas=replicas),
    )


def deployment_options(options: ServerOptions, config: EngineConfig, secret: str) -> dict[str, Any]:
    """What Ray Serve is told of the engine's deployment, on one machine and on many."""
    from ray.serve.config import RequestRouterConfig

    from kvloom.deploy.router import KVRouter

    few, most = options.replicas or 1, options.max_replicas or options.replicas or 1
    told: dict[str, Any] = {
        "name": DEPLOYMENT,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "max_ongoing_requests": MOST_ONGOING,
        "graceful_shutdown_timeout_s": options.drain_seconds + 10,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "request_router_config": RequestRouterConfig(
            request_router_class=KVRouter,
            request_router_kwargs={"secret": secret, "approximate": config.cache.reuse == "approx"},
            request_routing_stats_period_s=1,
            request_routing_stats_timeout_s=10,
        ),
    }
    if most > few:
        from kvloom.deploy.scaling import autoscaling

        return told | {"autoscaling_config": autoscaling(few, most, config)}
    return told | {"num_replicas": few}


@contextlib.contextmanager
def replicas(config: EngineConfig, options: ServerOptions) -> Iterator[EngineClient]:
    """Start a Ray and the replicas, and give their client; end all of it afterwards.

    Raises ConfigError if Ray is not installed or the settings do not fit, and what kept the replicas from loading.
    """
    most = options.max_replicas or options.replicas or 1
    share = shares(config, most)
    tenants = Tenants.read(config.tenants.tenants)
    os.environ.update({name: value for name, value in RAY.items() if name == "RAY_AUTH_MODE" or name not in os.environ})
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError("--replicas needs Ray; run: pip install 'kvloom[ray]'") from None
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from kvloom.deploy.client import ReplicaClient
    from kvloom.deploy.replica import Replica

    secret = secrets.token_hex(32)
    cores = processors().cores
    ray.init(
        address="local", include_dashboard=False, num_cpus=max(cores, most * share.threads) + 1, num_gpus=None,
        _node_ip_address="127.0.0.1", object_store_memory=OBJECT_STORE, log_to_driver=True, configure_logging=False,
        logging_level=logging.ERROR, _temp_dir=None, namespace="kvloom",
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        made = for_replicas(config, share, most, secret)
        deployment = serve.deployment(Replica).options(
            **deployment_options(options, config, secret), ray_actor_options={"num_cpus": share.threads}
        )
        built = deployment.bind(made, share.threads if share.pinned else 0, options.log_level.upper())
        handle = serve.run(built, name=APPLICATION, route_prefix=None, blocking=False)
        model = _told(handle.describe.remote().result())
        client = ReplicaClient(handle, APPLICATION, model, tokenizer_of(model), tenants, config.scheduler.max_queued_tokens)
        yield client
        client.close()
    finally:
        ray.shutdown()  # all of it is ours: nobody else's requests need a drain


async def described(handle: Any) -> ModelInfo:
    """The model, as a replica has it. Raises what kept it from being loaded."""
    return _told(await handle.describe.remote())


def _told(told: ModelInfo | KVLoomError) -> ModelInfo:
    if isinstance(told, KVLoomError):
        raise told
    return told
