"""A progress bar while a stage runs, on a terminal only: redrawn twice a second, nothing per chunk."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvloom.loadtest.client.drive import Driver
from kvloom.loadtest.client.record import Record

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
