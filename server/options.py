"""Settings of the HTTP side. As in `engine.config`, a field's docstring is its CLI help and its name is its YAML key."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.settings.options import FilePath, Option, Size, option_fields, parse_value
from kvloom.server import tracing
from kvloom.server.answers.formats import CALL_ALIASES, CALL_FORMATS, REASONING_ALIASES, REASONING_FORMATS
from kvloom.server.key_file import read_keys
from kvloom.server.logs import LogFormat

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LogLevel = Literal["debug", "info", "warning", "error"]
Keys = Annotated[tuple[str, ...], "KEY"]
Hosts = Annotated[tuple[str, ...], "HOST"]
Networks = Annotated[tuple[str, ...], "CIDR"]
Origins = Annotated[tuple[str, ...], "ORIGIN"]
Seconds = Annotated[float, "SECONDS"]
MOST_REPLICAS = 64
"""On one machine. A cluster has its own settings (`deploy.app`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The HTTP server."""

    host: Annotated[str, "ADDRESS"] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for every interface (then set --api-key or --api-key-file)."""
    port: Annotated[int, "PORT"] = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: Keys = ()
    """Key that clients must send as a bearer token; repeat it, or separate by commas, for several. Guards all but /health,
    /ready and /ping."""
    admin_key: Keys = ()
    """Key of the operator, who sees everybody's figures: /metrics and all of /v1/kv, which tenants do not. Repeat it, or
    separate by commas, for several."""
    api_key_file: FilePath | None = None
    """File with such keys, one a line, beside those of --api-key; blank lines and lines that begin with # are left out."""
    admin_key_file: FilePath | None = None
    """File with keys of the operator, one a line, beside those of --admin-key."""
    allowed_hosts: Hosts = ()
    """Name that requests may give in Host beside localhost, loopback addresses and --host; asked only while the server listens
    on loopback and needs no key, where a web page could reach it under a name of its own. Repeat it, or separate by commas."""
    trusted_proxies: Networks = ()
    """Network (CIDR, such as 10.0.0.0/8) of proxies that may name a request's tenant in X-KVLoom-Tenant; repeat it, or separate
    by commas, for several. From anywhere else that header is refused."""
    tenant_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """API key -> tenant, beside `api_key`: from the tenants file, see `with_tenants`."""
    tenant_names: tuple[str, ...] = ()
    """Tenants that the tenants file names, of which /metrics tells: see `with_tenants`."""
    cors: Origins = ()
    """Origin whose pages may call the API from a browser (* for any); repeat it, or separate by commas, for several."""
    max_body: Size = 4 * 1024**2
    """Largest request body (4MiB, 512KiB, ...); anything longer is refused with 413."""
    response_store_size: Size = 256 * 1024**2
    """Memory for stored responses of all callers; beyond, the oldest of who holds most go. 0 stores none."""
    response_store_count: Annotated[int, "N"] = 1000
    """Responses that are stored for one tenant and key; beyond, its oldest go."""
    max_connections: Annotated[int, "N"] = 1024
    """Most connections at once; beyond, those that ask for nothing are closed, the oldest first; others get 503."""
    header_timeout: Seconds = 20.0
    """Seconds for a request's headers to come, from the connection or from their first byte."""
    body_timeout: Seconds = 30.0
    """Seconds for a request's body to come, and one more for every 16 KiB that have."""
    send_timeout: Seconds = 30.0
    """Seconds for a client to read what waits for it, and one more for every 16 KiB it reads; then its request is ended."""
    keep_alive: Seconds = 75.0
    """Seconds that a connection may stay open between two requests."""
    replicas: Annotated[int, "N"] | None = None
    """Engines that serve together behind this server, each a process with cores and memory of its own, 1 to 64 (needs
    kvloom[ray]); --threads and --kv-memory are then of each. The default is one engine in this process."""
    max_replicas: Annotated[int, "N"] | None = None
    """Begin with --replicas, or one, and have up to this many, by the prompt tokens that wait."""
    drain_seconds: Seconds = 10.0
    """On SIGTERM or Ctrl-C, how long running requests may take to finish before they are ended."""
    tool_call_parser: Annotated[str, "NAME"] = "auto"
    """Format in which the model calls tools: auto (by its response or chat template), deepseek, hermes, llama3_json, mistral,
    pythonic or qwen_coder."""
    reasoning_parser: Annotated[str, "NAME"] = "auto"
    """Marks between which the model thinks: auto (by its response or chat template), none (thoughts are content), cohere,
    mistral, seed_oss, think or thought."""
    log_level: LogLevel = "info"
    """Least important messages to log: debug, info, warning or error."""
    log_format: LogFormat = "text"
    """How they are written to stderr: as text, or as json, one object a line."""
    access_log: bool = True
    """Log one line per generation request (id, tokens, times, finish reason) and per refusal (id, path, status); never any
    text."""
    otlp_traces_endpoint: Annotated[str | None, "URL"] = None
    """Collector that gets an OpenTelemetry span of every generation request, by OTLP over HTTP: http://127.0.0.1:4318/v1/traces;
    needs the packages of kvloom[otel]."""
    ssl_certfile: FilePath | None = None
    """Certificate chain (PEM) to serve HTTPS with. Read again when it or its key changes."""
    ssl_keyfile: FilePath | None = None
    """Private key (PEM) of the certificate."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; allowed: 0 to 65535")
        if self.max_body < 1024:
            raise ConfigError(f"max_body is {self.max_body} bytes; allowed: 1 KiB or more")
        if not 0 <= self.response_store_size <= 2**40:
            raise ConfigError(f"response_store_size is {self.response_store_size} bytes; allowed: 0 to 1 TiB")
        if not 1 <= self.response_store_count <= 1_000_000:
            raise ConfigError(f"response_store_count is {self.response_store_count}; allowed: 1 to 1000000")
        if not 0 <= self.drain_seconds <= 3600:
            raise ConfigError(f"drain_seconds is {self.drain_seconds}; allowed: 0 to 3600")
        if not 16 <= self.max_connections <= 65536:
            raise ConfigError(f"max_connections is {self.max_connections}; allowed: 16 to 65536")
        for name in ("replicas", "max_replicas"):
            if (count := getattr(self, name)) is not None and not 1 <= count <= MOST_REPLICAS:
                raise ConfigError(f"{name} is {count}; allowed: 1 to {MOST_REPLICAS}")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise ConfigError(f"max_replicas is {self.max_replicas}; allowed: at least --replicas, which is {self.replicas}")
        for name in ("header_timeout", "body_timeout", "send_timeout", "keep_alive"):
            if not 0.1 <= getattr(self, name) <= 3600:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0.1 to 3600 seconds")
        for name, known in (("tool_call_parser", {"auto", *CALL_FORMATS, *CALL_ALIASES}),
                            ("reasoning_parser", {"auto", "none", *REASONING_FORMATS, *REASONING_ALIASES})):  # fmt: skip
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(sorted(known))}")
        if self.otlp_traces_endpoint is not None:
            tracing.check(self.otlp_traces_endpoint)
        for name in ("api_key", "admin_key"):
            if not all(key and key.isascii() and key.isprintable() for key in getattr(self, name)):
                raise ConfigError(f"{name} holds an empty key or one that no header can carry; allowed: printable ASCII")
        if any(key in self.api_key or key in self.tenant_keys for key in self.admin_key):
            raise ConfigError("an admin_key is also a key of a tenant; give it in one place")
        self.proxies()
        if twice := sorted({self.tenant_keys[key] for key in self.api_key if key in self.tenant_keys}):
            raise ConfigError(f"a key of tenant {twice[0]} is also given as api_key; give it in one place")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together; one of them is missing")

    def proxies(self) -> tuple[Network, ...]:
        """`trusted_proxies`, read. Raises ConfigError."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.trusted_proxies)
        except ValueError as error:
            raise ConfigError(f"trusted_proxies: {error}; write networks such as 10.0.0.0/8 or 127.0.0.1") from None

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_key or self.tenant_keys)

    @property
    def has_tenants(self) -> bool:
        """Whether there can be several tenants, of which none may see another's figures."""
        return len({*self.api_key, *self.tenant_keys.values()}) > 1 or bool(self.trusted_proxies)

    def with_tenants(self, tenants: Tenants) -> ServerOptions:
        """These options, and the API keys and names of the tenants. Raises ConfigError if a key is given twice."""
        return dataclasses.replace(self, tenant_keys=tenants.keys, tenant_names=tuple(tenants.known))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Make options from the command line's, the environment's or a YAML file's values, and read the keys of files. Raises
        ConfigError."""
        given = {o.name: parse_value(o, values[o.name]) for o in server_options() if o.name in values}
        for name in ("api_key", "admin_key"):
            from_file = read_keys(f"{name}_file", given.get(f"{name}_file"))
            given[name] = (*given.get(name, ()), *from_file)
        return cls(**given)


def server_options() -> tuple[Option, ...]:
    """Every setting of the HTTP side that has a flag."""
    return tuple(option for option in option_fields(ServerOptions) if option.name not in ("tenant_keys", "tenant_names"))


def default_text(option: Option) -> str:
    """The default as help shows it; empty when the help text explains it."""
    if option.default is None or option.default == () or option.default is dataclasses.MISSING:
        return ""
    if option.unit == "SIZE":
        return f"{option.default // 1024**2}MiB"
    return str(option.default)


def allowed_values(option: Option) -> tuple[str, ...]:
    """The values of a Literal option; empty for others."""
    values = get_args(option.type)
    return tuple(values) if values and all(isinstance(value, str) for value in values) else ()
