"""Prometheus metrics: vLLM's names, units and buckets with the prefix `kvloom:`, so that its dashboards carry over.

The engine's figures are those that `engine.requests.stats` declares, read when Prometheus asks; times are observed by the
routes. Labels are the model, values that the code fixes and tenants that the operator's tenants file names: nothing a client
sends becomes a label.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvloom.engine.client import EngineClient, ModelInfo
from kvloom.engine.errors import KVLoomError
from kvloom.engine.requests.figures import Figure, told
from kvloom.engine.requests.request import FinishReason
from kvloom.engine.requests.stats import TenantFigures
from kvloom.version import __version__

PREFIX = "kvloom:"
MOST_TENANTS = 1000
"""Of those that the tenants file names, the first so many are told of."""
TENANTS_SECONDS = 1.0
"""How long the engine may take to tell what tenants hold, between two of its steps; then a scrape goes without."""
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
Path = Literal["full", "prefix", "segment"]
"""What was reused of a prompt: nothing, an exact prefix, segments (KVShare)."""

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
         640.0, 2560.0)  # fmt: skip
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
            1920.0, 7680.0)  # fmt: skip


def _token_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the longest sequence, as in vLLM."""
    steps = (float(m * 10**e) for e in range(10) for m in (1, 2, 5))
    return tuple(step for step in steps if step <= longest) or (1.0,)


class Metrics:
    """The registry of one server."""

    def __init__(self, client: EngineClient, tenants: Sequence[str] = ()) -> None:
        """tenants: names that the operator gave; of others nothing is told."""
        self._tenants = tenants[:MOST_TENANTS]
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self._client = client
        self._labels = {"model_name": client.model.name, "engine": client.model.replica}
        tokens = _token_buckets(client.model.max_model_len)
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", _TTFT)
        by_path = Histogram(PREFIX + "time_to_first_token_by_path_seconds", "Time to first token, by what was reused.",
                            [*self._labels, "path"], buckets=_TTFT, registry=self.registry)  # fmt: skip
        paths: tuple[Path, ...] = get_args(Path)
        self.time_to_first_token_by = {path: by_path.labels(**self._labels, path=path) for path in paths}
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "Time between tokens.", _PER_TOKEN)
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per request.", _PER_TOKEN
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", _REQUEST)
        self.queue_time = self._histogram("request_queue_time_seconds", "Time from arrival to the first step.", _REQUEST)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Time from the first step to the first token.", _REQUEST
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "Time from first to last token.", _REQUEST)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.generation_tokens = self._histogram("request_generation_tokens", "Generated tokens per request.", tokens)
        success = self._counter("request_success", "Requests by how they ended.", "finished_reason")
        self.finished = {reason: success.labels(**self._labels, finished_reason=reason) for reason in FINISH_REASONS}
        self._refused = self._counter("requests_refused", "Requests answered with an error status.", "status")
        self._engine = _EngineFigures(client.model, self._labels)
        self.registry.register(self._engine)

    def refused(self, status: int) -> None:
        """Count an answer with an error status."""
        self._refused.labels(**self._labels, status=str(status)).inc()

    async def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        stats, health, tenants = await self._client.stats(), await self._client.health(), await self._of_tenants()
        self._engine.figures = [*told(stats), *told(health), *told(tenants)]
        return prometheus_client.generate_latest(self.registry)

    async def _of_tenants(self) -> TenantFigures:
        """What tenants hold; nothing if there are none, or the engine cannot be asked now."""
        if not self._tenants:
            return TenantFigures()
        try:
            return TenantFigures(tenants=await asyncio.wait_for(self._client.tenants(self._tenants), TENANTS_SECONDS))
        except (KVLoomError, TimeoutError):
            return TenantFigures()

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, [*self._labels, label], registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Tell a figure of the HTTP side's, read whenever Prometheus asks."""
        gauge = Gauge(PREFIX + name, text, list(self._labels), registry=self.registry)
        gauge.labels(**self._labels).set_function(read)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(PREFIX + name, text, list(self._labels), buckets=buckets, registry=self.registry)
        return histogram.labels(**self._labels)


class _EngineFigures(Collector):
    """What the engine told last."""

    def __init__(self, model: ModelInfo, labels: dict[str, str]) -> None:
        self.figures: Sequence[tuple[str, Figure, Any]] = ()
        self._model, self._labels = model, labels

    def collect(self) -> Iterator[Metric]:
        for name, figure, value in self.figures:
            yield self._family(PREFIX + name, figure, value)
        yield self._info()

    def _family(self, name: str, figure: Figure, value: Any) -> Metric:
        """A figure with its label values: one sample, one per key of a mapping, or the buckets of a histogram."""
        own = list(self._labels.values())
        if figure.kind == "histogram":
            return self._buckets(HistogramMetricFamily(name, figure.help, labels=list(self._labels)), figure, *value)
        kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
        family: Any = kind(name, figure.help, labels=[*self._labels, *figure.by])
        for key, number in ({**dict.fromkeys(figure.keys, 0), **value} if figure.by else {(): value}).items():
            family.add_metric([*own, *((key,) if isinstance(key, str) else key)], number)
        return cast(Metric, family)

    def _buckets(self, family: HistogramMetricFamily, figure: Figure, counts: Sequence[int], total: float | None) -> Metric:
        """total: what the counted values sum up to, where that is known."""
        ends = [*(str(float(bound)) for bound in figure.bounds[:-1]), "+Inf"]
        family.add_metric(list(self._labels.values()), list(zip(ends, accumulate(counts))), sum_value=total)
        if total is None:  # the client leaves the count out with the sum
            family.add_sample(family.name + "_count", self._labels, sum(counts))
        return family

    def _info(self) -> Metric:
        model = self._model
        about = {
            "version": __version__, "backend": model.backend, "device": model.device, "dtype": model.dtype,
            "weights": model.weights, "attention": model.attention or model.backend,
        }  # fmt: skip
        family = GaugeMetricFamily(PREFIX + "engine_info", "What runs here; always 1.", labels=[*self._labels, *about])
        family.add_metric([*self._labels.values(), *about.values()], 1)
        return family
