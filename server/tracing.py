"""OpenTelemetry: a span for every generation request, sent to a collector by OTLP over HTTP (`--otlp-traces-endpoint`).

Names are those of OpenTelemetry's conventions for generative AI (`gen_ai.*`), which are still being made, and vLLM's for times
inside the engine (`gen_ai.latency.*`, seconds). A `traceparent` that the client sends (W3C Trace Context) is the span's parent.
Nothing in a span is a prompt or an answer. Packages of OpenTelemetry are imported only where the setting is given; its own
variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) hold.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Scope

from kvloom.engine.errors import ConfigError
from kvloom.version import __version__

EXPORT_SECONDS = 5
"""For a collector to take a batch, retries included; what it does not take is dropped."""
OPERATIONS = {"cmpl-": "text_completion"}
"""gen_ai.operation.name by the prefix of an answer's id; of all others it is `chat`."""
_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_CARRIED = (b"traceparent", b"tracestate")

Record = Callable[[Mapping[str, Any], str | None], str]
"""(attributes, class of the error that ended it or None) -> the trace's id. Makes the span of a request that has ended now."""


def check(endpoint: str) -> None:
    """Raises ConfigError for an endpoint that is no URL, and where packages are missing."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"otlp_traces_endpoint is {endpoint[:200]!r}; allowed: a URL as http://127.0.0.1:4318/v1/traces")
    for name in _PACKAGES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError(f"otlp_traces_endpoint is given, but {name} is not installed; pip install 'kvloom[otel]'")


class Tracing:
    """Where spans go. They are sent from a thread of its own, in batches; at most 2,048 wait, others are dropped."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: a collector's URL for traces. Raises ConfigError."""
        check(endpoint)
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME") or "kvloom"
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)))
        self._tracer = self._provider.get_tracer("kvloom", __version__)
        self._parents, self._kind = TraceContextTextMapPropagator(), trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def arrived(self, scope: Scope, id_prefix: str, model: str) -> Record:
        """A request has come now: what makes its span once it has ended. id_prefix: of its answer."""
        began = time.time_ns()
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        operation = OPERATIONS.get(id_prefix, "chat")

        def record(attributes: Mapping[str, Any], error: str | None) -> str:
            span = self._tracer.start_span(f"{operation} {model}", self._parents.extract(carrier), self._kind, start_time=began)
            known = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "kvloom", "gen_ai.request.model": model,
                     "gen_ai.response.model": model, "error.type": error, **attributes}  # fmt: skip
            span.set_attributes({name: value for name, value in known.items() if value is not None})
            if error is not None:
                span.set_status(self._failed)
            span.end()
            return f"{span.get_span_context().trace_id:032x}"

        return record

    def close(self) -> None:
        """Send what waits and end the thread; takes about EXPORT_SECONDS at most."""
        self._provider.shutdown()
