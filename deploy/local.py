"""Replicas on this machine: a Ray of our own, on loopback alone, that lives as long as the server.

front, this process      HTTP, tokenizer, router; no torch
replicas                 an engine each, on cores and memory of its own: `shares`
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvloom.engine.client import EngineClient, ModelInfo
from kvloom.engine.config import SECRET_VARIABLE, EngineConfig
from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.startup.available import MIB, available_memory, default_kv_memory, size
from kvloom.engine.startup.catalog import resolve
from kvloom.engine.startup.prepare import read_template, tokenizer_of
from kvloom.engine.startup.processors import processors
from kvloom.server.options import ServerOptions

APPLICATION, DEPLOYMENT = "kvloom", "engine"
FOLDERS = "kvloom-ray-"
"""Ray's files are in a folder of this name, the server's process id and more, where temporary files go."""
OBJECT_STORE = 256 * MIB
"""Ray's own memory for large objects: what crosses here is small."""
REPLICA_BYTES = 512 * MIB
"""What a replica takes beside its KV cache, at least: with a small model."""
MOST_ONGOING = 16384
"""Requests that a replica takes; what it has room for is decided by tokens."""

log = logging.getLogger("kvloom.server")

RAY = {
    "RAY_AUTH_MODE": "token",  # replicas unpickle what reaches their ports
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without a cluster: ports on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: anything else on the machine would come first
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the engine has a thread of its own
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}
"""What Ray reads of the environment, where the user has not said otherwise; but for the first line, which stays."""


@dataclass(frozen=True, slots=True)
class Share:
    """What each replica gets of this machine."""

    threads: int | None
    """None, as for memory: what an engine takes by itself, where each has a GPU."""
    kv_memory: int | None
    cores: int
    """How many it has for itself; 0 where there are not enough for all."""
    resources: Mapping[str, int]
    """What Ray counts for it."""


def shares(config: EngineConfig, replicas: int, gpus: int = 0) -> Share:
    """What each of so many replicas gets: as it was given, or what one engine would take, divided. gpus: that there are; one
    is each replica's, if they are enough.

    Raises ConfigError if what was given does not fit this machine so many times.
    """
    if config.model.device == "cuda" and gpus < replicas:
        raise ConfigError(f"{replicas} replicas on cuda need a GPU each, and there are {gpus}; give fewer --replicas")
    if config.model.device != "cpu" and gpus >= replicas:
        return Share(config.model.threads, config.cache.kv_memory, 0, {"num_gpus": 1, "num_cpus": 1})
    here = processors()
    threads = config.model.threads or max(1, here.threads // replicas)
    if config.model.threads is not None and threads * replicas > here.threads:
        raise ConfigError(
            f"{replicas} replicas of {threads} threads need {threads * replicas} cores, and there are {here}; give "
            f"--threads {max(1, here.threads // replicas)}, fewer --replicas, or leave --threads out"
        )
    memory, free = config.cache.kv_memory or default_kv_memory() // replicas, available_memory()
    if (memory + REPLICA_BYTES) * replicas > free:
        most = free // replicas - REPLICA_BYTES
        raise ConfigError(
            f"{replicas} replicas of kv_memory {size(memory)}, and {size(REPLICA_BYTES)} of their own, need "
            f"{size((memory + REPLICA_BYTES) * replicas)}, and {size(free)} are free; give fewer --replicas"
            + (f", or about {most // MIB}MiB, which each of them gets" if most > MIB else "")
        )
    return Share(threads, memory, threads if threads * replicas <= here.cores else 0, {"num_cpus": threads})


def for_replicas(config: EngineConfig, share: Share, replicas: int, secret: str) -> EngineConfig:
    """The settings of each replica. secret: of hashes, for all of them."""
    model, cache = config.model, config.cache
    return replace(
        config,
        model=replace(model, threads=share.threads, chat_template=read_template(model.chat_template)),
        cache=replace(cache, kv_memory=share.kv_memory, hash_secret=hash_secret(config) or secret),
        tenants=replace(config.tenants, tenant_replicas=replicas),
    )


def hash_secret(config: EngineConfig) -> str | None:
    """The secret that the user gave, itself or the variable's: replicas may not see the variable."""
    return config.cache.hash_secret or os.environ.get(SECRET_VARIABLE) or None


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

        return told | {"autoscaling_config": autoscaling(few, most)}
    return told | {"num_replicas": few}


@contextlib.contextmanager
def replicas(config: EngineConfig, options: ServerOptions) -> Iterator[EngineClient]:
    """Start a Ray and the replicas, and give their client; end all of it afterwards.

    Raises ConfigError if Ray is not installed or the settings do not fit, and what kept the replicas from loading.
    """
    few, most = options.replicas or 1, options.max_replicas or options.replicas or 1
    os.environ.update({name: value for name, value in RAY.items() if name == "RAY_AUTH_MODE" or name not in os.environ})
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError("--replicas needs Ray; run: pip install 'kvloom[ray]'") from None
    _keep_signals(ray)
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from kvloom.deploy.client import ReplicaClient
    from kvloom.deploy.replica import Replica

    tenants, share = Tenants.read(config.tenants.tenants), shares(config, most, _gpus())
    resolve(config.model.model)  # what is not there is told before Ray is started, and fetched once
    log.info("starting Ray and %d replica%s", few, "s" * (few > 1))
    secret = secrets.token_hex(32)
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{FOLDERS}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        try:
            _begin(
                ray, address="local", include_dashboard=False, num_cpus=most * share.resources["num_cpus"] + 1,
                _node_ip_address="127.0.0.1", object_store_memory=OBJECT_STORE, log_to_driver=options.log_format == "text",
                configure_logging=False, logging_level=logging.ERROR, _temp_dir=folder, namespace="kvloom",
            )  # fmt: skip
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
            made = for_replicas(config, share, most, secret)
            deployment = serve.deployment(Replica).options(
                **deployment_options(options, config, secret), ray_actor_options=dict(share.resources)
            )
            built = deployment.bind(made, share.cores, options.log_level.upper())
            handle = serve.run(built, name=APPLICATION, route_prefix=None, blocking=False)
            model = _told(handle.describe.remote().result())
            told = {name: value for name, value in model.settings.items() if name not in ("replica", "tenant_replicas")}
            model = replace(model, settings={"replicas": few, **told}, threads=f"{model.threads}, in each replica")
            queued, tokenizer = config.scheduler.max_queued_tokens, tokenizer_of(model)
            client = ReplicaClient(handle, APPLICATION, model, tokenizer, tenants, queued, few, _ended(ray))
            yield client
            client.close()
        finally:
            ray.shutdown()  # all of it is ours: nobody else's requests need a drain


def _begin(ray: Any, **settings: Any) -> None:
    """Start Ray. Raises KVLoomError with what it says if it does not start."""
    try:
        ray.init(**settings)
    except Exception as error:  # of no class of its own
        raise KVLoomError(
            f"Ray does not start: {str(error).strip().splitlines()[0]}; try again, or serve without --replicas"
        ) from error


def _sweep() -> None:
    """Remove what servers left behind that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*"):
        process = folder.name.removeprefix(FOLDERS).split("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _ended(ray: Any) -> Callable[[], str]:
    """Says which of Ray's own processes has ended, if one has that nobody brings back."""
    node = ray._private.worker._global_node

    def said() -> str:
        ended = [name for name, _ in node.dead_processes() if name in ("raylet", "gcs_server")]
        return f"Ray's {ended[0]} has ended" if ended else ""

    return said


def _keep_signals(ray: Any) -> None:
    """Ray puts handlers of its own in the place of ours: SIGTERM would drain a cluster of nobody else's for half a minute."""
    ray._private.utils.set_sigterm_handler = lambda handler: None


def _gpus() -> int:
    """How many GPUs Ray will find here: torch is not asked, which this process does without."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


async def described(handle: Any) -> ModelInfo:
    """The model, as a replica has it. Raises what kept it from being loaded."""
    return _told(await handle.describe.remote())


def _told(told: ModelInfo | KVLoomError) -> ModelInfo:
    if isinstance(told, KVLoomError):
        raise told
    return told
