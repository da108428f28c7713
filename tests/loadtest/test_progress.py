"""The progress bar is drawn on a terminal and nowhere else."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from kvloom.loadtest.client.record import Record
from kvloom.loadtest.load.terminal import Meter


def drawn(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    driver: Any = SimpleNamespace(running=[Record(index=2, chunks=[1.0])])

    async def work() -> None:
        with Meter(console, "rate 2", 7) as meter:
            meter.add(Record(index=0, output_tokens=5))
            meter.add(Record(index=1, error="HTTP 500", error_kind="http_500"))
            task = asyncio.create_task(meter.show(driver))
            await asyncio.sleep(0.01)
            task.cancel()

    asyncio.run(work())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_tells_what_ended_failed_and_runs() -> None:
    text = drawn(terminal=True)
    for part in ("rate 2", "2/7", "failed 1", "running 1", "tok/s"):
        assert part in text


def test_a_log_file_stays_clean() -> None:
    assert drawn(terminal=False).strip() == ""
