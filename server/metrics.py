"""Prometheus metrics: vLLM's names, units and buckets with the prefix `kvloom:`, so that its dashboards carry over.

State and engine counters are read from `EngineClient.stats()` when Prometheus asks; times are observed by the routes. Labels
are the model and values that the code fixes: nothing a client sends becomes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvloom.engine.client import RUN_LENGTHS, SHARES, STEP_PROMPT_ROWS, STEP_SECONDS, EngineClient, EngineStats, ShareStats
from kvloom.engine.request import FinishReason
from kvloom.version import __version__

PREFIX = "kvloom:"
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
Path = Literal["full", "prefix", "segment"]
"""What was reused of a prompt: nothing, an exact prefix, segments (KVShare)."""

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
         640.0, 2560.0)  # fmt: skip
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
            1920.0, 7680.0)  # fmt: skip
_SELECTION = {
    "decode_rows": "Decode rows of requests that use the method.",
    "attended": "Positions that those rows read, mean over KV heads, summed over layers.",
    "held": "Positions that they could have read, summed over layers.",
    "selections": "Lists of positions made, one per row and layer.",
    "reused": "Lists used again without a new selection.",
    "refreshes": "Lists or KV made anew because a stride, a trigger or a correction said so.",
    "mass": "Attention mass covered by what was read, summed over the samples.",
    "mass_samples": "Samples of covered attention mass, against a shadow dense pass.",
}
"""Counters per selection method: the fields of `MethodStats`."""


_Read = Callable[[ShareStats], float]
_SHARE_COUNTERS: dict[str, tuple[str, _Read]] = {
    "reused_tokens": ("Prompt tokens whose KV was reused as it was copied.", lambda s: s.tokens["stale"]),
    "recomputed_tokens": (
        "Prompt tokens that donors had, and that were computed.",
        lambda s: s.tokens["boundary"] + s.tokens["ranked"] + s.tokens["rejected"],
    ),
    "match_seconds": ("Time spent finding segments.", lambda s: s.match_seconds),
    "copy_seconds": ("Time spent copying and turning KV.", lambda s: s.copy_seconds),
    "scan_seconds": ("Time spent ranking copied tokens.", lambda s: s.scan_seconds),
    "deviation_sum": ("Relative deviation at the check layer, summed over runs.", lambda s: s.deviation_sum),
    "deviation_runs": ("Runs whose deviation was measured.", lambda s: s.deviation_runs),
    "rejected_runs": ("Runs computed because they deviated too far.", lambda s: s.rejected_runs),
    "identity_failures": ("Requests whose copied KV contradicted the model at layer 0.", lambda s: s.identity_failures),
    "refreshed_tokens": ("Reused tokens computed again in decode steps.", lambda s: s.refreshed_tokens),
    "stale_left_tokens": ("Reused tokens still as copied when their request ended.", lambda s: s.stale_left),
    "captured_tokens": ("Prompt tokens left behind as segments.", lambda s: s.captured_tokens),
    "compiled_tokens": ("Tokens compiled alone.", lambda s: s.compiled_tokens),
    "healed_tokens": ("Prompt tokens computed again in full by an idle engine.", lambda s: s.healed_tokens),
    "shadow_checks": ("Requests that reused KV and were computed again in full to compare.", lambda s: s.shadow_checks),
    "shadow_tokens": ("Tokens compared by shadow checks.", lambda s: s.shadow_tokens),
    "shadow_kl_sum": ("KL of full against reused, nats, summed over those tokens.", lambda s: s.shadow_kl),
    "shadow_agreeing_tokens": ("Of those, with the same likeliest token.", lambda s: s.shadow_agree),
    "segment_evictions": ("Segments given up for others.", lambda s: s.segment_evictions),
}  # fmt: skip
"""Counters of approximate reuse, prefix kvshare_."""
_KINDS = ("prefix", "stale", "boundary", "ranked", "rejected", "fresh")
_RUNS = {"donor": ("context", "isolated"), "scope": ("tenant", "group", "public")}
_SHARE_GAUGES: dict[str, tuple[str, _Read]] = {
    "enabled": ("0 once shadow checks have switched approximate reuse off for any tenant.", lambda s: float(s.enabled)),
    "segments": ("Segments in the store.", lambda s: s.segments),
    "segment_bytes": ("Bytes of their KV.", lambda s: s.segment_bytes),
    "segment_capacity_bytes": ("Bytes there are for them.", lambda s: s.segment_capacity),
    "errands": ("Pieces of work that wait for an idle engine.", lambda s: s.errands),
}


def _token_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the longest sequence, as in vLLM."""
    steps = (float(m * 10**e) for e in range(10) for m in (1, 2, 5))
    return tuple(step for step in steps if step <= longest) or (1.0,)


class Metrics:
    """The registry of one server."""

    def __init__(self, client: EngineClient) -> None:
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self._labels = {"model_name": client.model.name, "engine": "0"}
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
        self.registry.register(_EngineCollector(client, self._labels))

    def refused(self, status: int) -> None:
        """Count an answer with an error status."""
        self._refused.labels(**self._labels, status=str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return prometheus_client.generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, [*self._labels, label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(PREFIX + name, text, list(self._labels), buckets=buckets, registry=self.registry)
        return histogram.labels(**self._labels)


class _EngineCollector(Collector):
    """Reads the engine's snapshot at every scrape."""

    def __init__(self, client: EngineClient, labels: dict[str, str]) -> None:
        self._client = client
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("num_requests_running", "Requests that the engine computes.", stats.running),
            ("num_requests_waiting", "Requests that wait for their turn.", stats.waiting),
            ("num_prompt_tokens_waiting", "Prompt tokens of waiting requests.", stats.queued_tokens),
            ("kv_cache_usage_perc", "Share of KV blocks in use by requests, 0 to 1.", stats.kv_usage),
            ("kv_cache_capacity_tokens", "Tokens whose KV fits in the cache.", stats.capacity_tokens),
            ("selection_state_bytes", "Bytes that selection methods remember of running requests.", stats.selection_bytes),
            ("selection_state_capacity_bytes", "The most that may be.", stats.selection_capacity),
            ("engine_up", "1 while the engine runs.", float(self._client.health().ok)),
        )
        counters: tuple[tuple[str, str, float], ...] = (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("num_preemptions", "Requests put back to free their blocks.", stats.preemptions),
            ("replayed_tokens", "Generated tokens computed again after preemption, one step each.", stats.replayed_tokens),
            ("prompt_tokens", "Prompt tokens of all requests.", stats.prompt_tokens),
            ("generation_tokens", "Generated tokens of all requests.", stats.generation_tokens),
            ("kv_evicted_blocks", "Cached blocks given up for other requests.", stats.evicted_blocks),
            ("spec_decode_num_drafts", "Dense verifications of drafted tokens.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted by sparse steps.", stats.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that verification kept.", stats.accepted_tokens),
            ("engine_internal_errors", "Requests and steps that failed inside the engine.", stats.internal_errors),
            ("engine_steps", "Steps of the engine.", stats.steps),
            ("engine_step_seconds", "Time spent in steps.", stats.step_seconds),
        )
        for name, text, value in gauges:
            yield self._one(GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels)), value)
        for name, text, value in counters:
            yield self._one(CounterMetricFamily(PREFIX + name, text, labels=list(self._labels)), value)
        yield self._by("kv_read_bytes", "Bytes of keys and values that attention had to read.", "kind", stats.kv_bytes)
        for name, text in _SELECTION.items():
            values = {method: getattr(found, name) for method, found in stats.selection.items()}
            yield self._by(f"selection_{name}", text, "method", values)
        yield from self._steps(stats)
        yield from self._share(stats.share)
        yield self._blocks()
        yield self._info()

    def _steps(self, stats: EngineStats) -> Iterator[Metric]:
        """How long steps take, and what prompts have of them."""
        text = "Time of a step that computed something."
        yield self._buckets("engine_step_time_seconds", text, STEP_SECONDS, stats.step_times, stats.step_times_sum)
        text, counts = "Rows of prompts in such a step.", stats.step_prompt_rows
        yield self._buckets("engine_step_prompt_rows", text, STEP_PROMPT_ROWS, counts, stats.step_prompt_rows_sum)

    def _share(self, share: ShareStats) -> Iterator[Metric]:
        """Approximate reuse (KVShare)."""
        labels = list(self._labels)
        for name, (text, read) in _SHARE_COUNTERS.items():
            yield self._one(CounterMetricFamily(f"{PREFIX}kvshare_{name}", text, labels=labels), read(share))
        for name, (text, read) in _SHARE_GAUGES.items():
            yield self._one(GaugeMetricFamily(f"{PREFIX}kvshare_{name}", text, labels=labels), read(share))
        kinds = {**dict.fromkeys(_KINDS, 0), **share.tokens}
        yield self._by("kvshare_tokens", "Prompt tokens by what became of them.", "kind", kinds)
        for label, values in _RUNS.items():
            runs = {value: share.runs[value] for value in values}
            yield self._by(f"kvshare_runs_by_{label}", f"Runs that were reused, by {label}.", label, runs)
        requests = CounterMetricFamily(
            PREFIX + "kvshare_requests", "Requests by path, and why nothing was reused.", labels=[*labels, "path", "reason"]
        )
        for (path, reason), count in share.requests.items():
            requests.add_metric([*self._labels.values(), path, reason], count)
        yield requests
        yield self._buckets("kvshare_run_length_tokens", "Tokens of a run that was reused.", RUN_LENGTHS, share.run_lengths)
        yield self._buckets(
            "kvshare_recomputed_ratio", "Share of reused tokens that was computed.", SHARES, share.recomputed_shares
        )

    def _buckets(
        self, name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float | None = None
    ) -> Metric:
        """A histogram of counts between bounds; total: what it sums up to, where that is known."""
        family = HistogramMetricFamily(PREFIX + name, text, labels=list(self._labels))
        ends = [*(str(float(bound)) for bound in bounds[:-1]), "+Inf"]
        family.add_metric(list(self._labels.values()), list(zip(ends, accumulate(counts))), sum_value=total)
        if total is None:  # the client leaves the count out with the sum
            family.add_sample(family.name + "_count", self._labels, sum(counts))
        return family

    def _one(self, family: Any, value: float) -> Metric:
        family.add_metric(list(self._labels.values()), value)
        metric: Metric = family
        return metric

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """A counter with one more label, whose values the code fixes."""
        family = CounterMetricFamily(PREFIX + name, text, labels=[*self._labels, label])
        for value, count in values.items():
            family.add_metric([*self._labels.values(), value], count)
        return family

    def _blocks(self) -> Metric:
        labels = [*self._labels, "group", "state"]
        family = GaugeMetricFamily(PREFIX + "kv_blocks", "KV blocks by head group and state.", labels=labels)
        for group in self._client.stats().groups:
            for state in ("free", "cached", "in_use"):
                family.add_metric([*self._labels.values(), group.name, state], getattr(group, state))
        return family

    def _info(self) -> Metric:
        model = self._client.model
        about = {"version": __version__, "backend": model.backend, "dtype": model.dtype, "weights": model.weights}
        family = GaugeMetricFamily(PREFIX + "engine_info", "What runs here; always 1.", labels=[*self._labels, *about])
        family.add_metric([*self._labels.values(), *about.values()], 1)
        return family
