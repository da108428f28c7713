"""What one HTTP request did and when: feeds the histograms, and at its end makes one log line and, where spans are wanted, one
span. Neither holds any text of anyone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from kvloom.engine.errors import KVLoomError
from kvloom.engine.requests.request import FinishReason, RequestOutput, Usage
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.server.logs import fields
from kvloom.server.metrics import Metrics, Path
from kvloom.server.tracing import Record

log = logging.getLogger("kvloom.access")


class RequestTrace:
    """Times of the completions of one request, on the monotonic clock, in seconds."""

    def __init__(self, metrics: Metrics, name: str, *, access_log: bool, record: Record | None = None) -> None:
        """name: what the client and the log call it; record: makes its span."""
        self._record = record
        self._asked: dict[str, Any] = {}
        self._metrics = metrics
        self._name = name
        self._access_log = access_log
        self._start = time.monotonic()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._usage: dict[int, Usage] = {}
        self._reasons: dict[int, FinishReason] = {}

    def asked(self, sampling: SamplingParams) -> None:
        """How its completions are sampled."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
        self._asked = {f"gen_ai.request.{name}": getattr(sampling, name) for name in names}
        self._asked["gen_ai.request.choice.count"] = sampling.n

    def note(self, index: int, output: RequestOutput) -> None:
        """One output of one completion."""
        if output.tokens:
            now = time.monotonic()
            last = self._last.get(index)
            if last is None:
                self._first[index] = now
                self._metrics.time_to_first_token.observe(now - self._start)
                self._metrics.time_to_first_token_by[_path(output.usage)].observe(now - self._start)
                self._metrics.queue_time.observe(output.usage.queue_seconds)
                self._metrics.prefill_time.observe(max(0.0, now - self._start - output.usage.queue_seconds))
            else:
                for _ in output.tokens:
                    self._metrics.inter_token_latency.observe((now - last) / len(output.tokens))
            self._last[index] = now
        self._usage[index] = output.usage
        if output.finish_reason is not None:
            self._finish(index, output.finish_reason)

    def stopped(self, index: int) -> None:
        """A completion is complete, as its reader sees it, though the model would go on."""
        self._finish(index, "stop")

    def close(self, completions: int, error: BaseException | None) -> None:
        """The request is over: completions that have not finished failed with `error`, or were aborted by their client."""
        gone = error is None or isinstance(error, (asyncio.CancelledError, GeneratorExit))
        refused = not gone and not self._usage  # counted and logged with the other error answers
        for index in range(completions):
            if index not in self._reasons and not refused:
                self._finish(index, "abort" if gone else "error")
        told = self._told(None if gone else error)
        if self._record is not None:
            told["trace_id"] = self._record(self._attributes(told), told["error"])
        if self._access_log and not refused:
            self._log(told)

    def _finish(self, index: int, reason: FinishReason) -> None:
        metrics, usage, first = self._metrics, self._usage.get(index), self._first.get(index)
        self._reasons[index] = reason
        metrics.finished[reason].inc()
        if usage is None or first is None or reason in ("abort", "error"):
            return
        decode = self._last[index] - first
        metrics.e2e_latency.observe(self._last[index] - self._start)
        metrics.decode_time.observe(decode)
        metrics.prompt_tokens.observe(usage.prompt_tokens)
        metrics.generation_tokens.observe(usage.completion_tokens)
        if usage.completion_tokens > 1:
            metrics.time_per_output_token.observe(decode / (usage.completion_tokens - 1))

    def _told(self, error: BaseException | None) -> dict[str, Any]:
        """The request in figures."""
        usages = self._usage.values()
        first = min(self._first.values(), default=None)
        return {
            "request_id": self._name,
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "reused_tokens": sum(usage.reused_tokens for usage in usages),
            "completion_tokens": sum(usage.completion_tokens for usage in usages),
            "ttft_seconds": None if first is None else round(first - self._start, 6),
            "total_seconds": round(time.monotonic() - self._start, 6),
            "finish_reason": ",".join(sorted(set(self._reasons.values()))),
            "error": None if error is None else type(error).__name__ if isinstance(error, KVLoomError) else repr(type(error)),
        }

    def _attributes(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Of the request's span."""
        usages = self._usage.values()
        return {
            **self._asked,
            "gen_ai.response.id": told["request_id"],
            "gen_ai.response.finish_reasons": [reason for _, reason in sorted(self._reasons.items())],
            "gen_ai.usage.input_tokens": told["prompt_tokens"],
            "gen_ai.usage.output_tokens": told["completion_tokens"],
            "gen_ai.usage.cache_read.input_tokens": told["cached_tokens"],
            "gen_ai.usage.cache_creation.input_tokens": sum(usage.written_tokens for usage in usages),
            "gen_ai.response.time_to_first_chunk": told["ttft_seconds"],
            "gen_ai.latency.time_in_queue": max((usage.queue_seconds for usage in usages), default=None),
            "gen_ai.latency.e2e": told["total_seconds"],
        }

    def _log(self, told: Mapping[str, Any]) -> None:
        first, error = told["ttft_seconds"], told["error"]
        log.info(
            "%s prompt=%d cached=%d reused=%d generated=%d ttft=%s total=%.3fs finish=%s%s",
            *list(told.values())[:5],
            "-" if first is None else f"{first:.3f}s",
            told["total_seconds"],
            told["finish_reason"],
            "" if error is None else f" error={error}",
            extra=fields(**told),
        )


def _path(usage: Usage) -> Path:
    """The most that was reused of a prompt."""
    if usage.reused_tokens or usage.recomputed_tokens:
        return "segment"
    return "prefix" if usage.cached_tokens else "full"
