"""What the terminal says: a progress bar while a stage runs, then its figures and every failure that must not be overlooked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvloom.loadtest.client.record import Record
from kvloom.loadtest.study.results import console_table

if TYPE_CHECKING:
    from kvloom.loadtest.client.drive import Driver

TIMES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2el"))
LATE_MS = 50.0
"""p99 of the client's lag beyond which an open loop is no longer one."""
KNOWN_SHARE = 0.05
"""Part of prompts that share nothing that may be cached all the same, such as the beginning of a chat template."""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def show(console: Console, stages: Sequence[Mapping[str, Any]]) -> None:
    """One table for a single stage, else a row per stage; then what to know about each."""
    if len(stages) > 1:
        rows = [[stage["name"], *(form(stage[key]) for _, key, form in COLUMNS)] for stage in stages]
        console.print(console_table(("stage", *(title for title, _, _ in COLUMNS)), rows, "times in ms"))
    else:
        _single(console, *stages)
    for stage in stages:
        for line in remarks(stage):
            console.print(f"[bold]{stage['name']}[/]  {line}", soft_wrap=True)


def _single(console: Console, stage: Mapping[str, Any]) -> None:
    console.print(
        f"{stage['name']}: {stage['completed']} of {stage['num_prompts']} requests in {stage['duration']:.1f} s, "
        f"{stage['request_throughput']:.2f} req/s, {stage['output_throughput']:.1f} output tok/s",
        soft_wrap=True,
    )
    quantiles = ("mean", *(f"p{percentile:g}" for percentile in stage["percentiles"]))
    rows = [[title, *(_number(stage[f"{quantile}_{key}_ms"]) for quantile in quantiles)] for title, key in TIMES]
    console.print(console_table(("ms", *quantiles), rows))


COLUMNS = (
    ("completed", "completed", str),
    ("failed", "failed", str),
    ("TTFT p50", "p50_ttft_ms", _number),
    ("TTFT p99", "p99_ttft_ms", _number),
    ("TPOT p50", "p50_tpot_ms", _number),
    ("E2E p50", "p50_e2el_ms", _number),
    ("tok/s", "output_throughput", _number),
    ("goodput/s", "request_goodput", _number),
    ("hit rate", "hit_rate", _share),
)
"""Of a table of several stages: title, key and form."""


def remarks(stage: Mapping[str, Any]) -> list[str]:
    """Client lag, cache, goodput, what the server itself says, and reservations about the figures."""
    lines = []
    if lag := stage["client_lag"]:
        late = "; the client fell behind, the load was lower than asked" if lag["p99_ms"] > LATE_MS else ""
        lines.append(f"client lag mean {lag['mean_ms']:.1f} ms, p99 {lag['p99_ms']:.1f} ms, max {lag['max_ms']:.1f} ms{late}")
    if stage["hit_rate"] is not None:
        # Prompts that share nothing were found in the cache all the same.
        before = stage["reusable_tokens"] == 0 and stage["hit_rate"] > KNOWN_SHARE
        known = "; the server knew them from an earlier run, change --seed" if before else ""
        share = f"{stage['cached_tokens']} of {stage['total_input_tokens']} prompt tokens cached ({_share(stage['hit_rate'])})"
        lines.append(share + known)
    if stage["request_goodput"] is not None:
        lines.append(f"goodput {stage['request_goodput']:.2f} req/s, {_share(stage['goodput_share'])} of requests")
    if stage["correct_rate"] is not None:
        lines.append(f"{_share(stage['correct_rate'])} of answers hold the expected text")
    if server := stage["server"]:
        told = [f"{name} {server[key]:.1f} ms" for name, key in (("TTFT", "mean_ttft_ms"), ("queue", "mean_queue_ms"))
                if server[key] is not None]  # fmt: skip
        told += [f"{server['preemptions']:.0f} preemptions"] if server["preemptions"] is not None else []
        lines.append(f"the server says: mean {', '.join(told)}" if told else "the server's /metrics hold no times")
    if stage["tokens_from_chunks"]:
        lines.append(f"{stage['tokens_from_chunks']} answers came without usage: their tokens are chunks, counted")
    if stage["ran_out"]:
        lines.append(f"all {stage['num_prompts']} requests were sent before the time was up; give more with --num-requests")
    if stage["cancelled"]:
        lines.append(f"{stage['cancelled']} requests were ended by the client")
    return lines


def failures(stage: Mapping[str, Any]) -> str | None:
    """One line about what failed in a stage; None if nothing did."""
    if not stage["failed"]:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in stage["failures"].items())
    kind, example = next(iter(stage["first_errors"].items()))
    hint = "; --retries N waits as the server asks" if kind == "http_429" else ""
    return f"{stage['name']}: {stage['failed']} of {stage['num_prompts']} requests failed: {kinds} ({example}){hint}"


REDRAW_SECONDS = 0.5


class Meter:
    """Counts what ends in one stage, and shows it."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  [red]failed {task.fields[failed]}[/]  running {task.fields[running]}"),
            TextColumn("{task.fields[rate]:.0f} tok/s"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total, failed=0, running=0, rate=0.0)
        self._ended = self._failed = self._tokens = 0
        self._began = time.perf_counter()

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def add(self, record: Record) -> None:
        """Count a request that ended."""
        self._ended += 1
        self._failed += record.error is not None
        self._tokens += record.output_tokens

    async def show(self, driver: Driver) -> None:
        """Redraw until cancelled."""
        while not self._progress.disable:
            running = driver.running
            tokens = self._tokens + sum(len(record.chunks) for record in running)
            rate = tokens / max(time.perf_counter() - self._began, 1e-3)
            self._progress.update(
                self._task, completed=self._ended, failed=self._failed, running=len(running), rate=rate, refresh=True
            )
            await asyncio.sleep(REDRAW_SECONDS)
