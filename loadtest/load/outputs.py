"""What a load test leaves on disk: a line per request as it ends, for programs and for a spreadsheet, and the summary.

So an interrupted or crashed run keeps all that was measured.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from kvloom.loadtest.client.record import Record

REQUESTS = "requests.jsonl"
CSV = "requests.csv"
SUMMARY = "summary.json"
COLUMNS = ("stage", "index", "tenant", "label", "scheduled", "sent", "ended", "ttft_ms", "tpot_ms", "e2el_ms", "prompt_tokens",
           "output_tokens", "cached_tokens", "finish_reason", "status", "error_kind", "error", "retries", "cancelled",
           "correct")  # fmt: skip
"""Of the CSV; times in seconds from the start of the stage, or in milliseconds where the name says so."""
SAME = ("index", "tenant", "label", "prompt_tokens", "output_tokens", "tokens_from", "cached_tokens", "kv", "finish_reason",
        "cancelled", "error", "error_kind", "status", "retries", "correct", "reusable_tokens", "reusable_anywhere")  # fmt: skip


def row(record: Record, started: float, stage: int, workload: str, *, save_text: bool = False) -> dict[str, Any]:
    """A record as JSON. Times in seconds from the start of its stage, to the microsecond."""

    def since(instant: float | None) -> float | None:
        return None if instant is None else round(instant - started, 6)

    times = {name: since(getattr(record, name)) for name in ("scheduled", "sent", "first_byte", "first_text", "last", "ended")}
    values = {"stage": stage, "workload": workload, **{name: getattr(record, name) for name in SAME}, **times}
    values["chunks"] = [since(instant) for instant in record.chunks]
    return values | ({"text": record.text} if save_text else {})


def cells(values: Mapping[str, Any], record: Record) -> list[Any]:
    """A line of the CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    times: dict[str, float | None] = {}
    if record.ok and record.chunks:
        times = {"ttft_ms": record.ttft, "tpot_ms": record.tpot if record.output_tokens > 1 else None, "e2el_ms": record.e2e}
    times = {name: None if value is None else round(value * 1e3, 3) for name, value in times.items()}
    found = [times.get(name, values.get(name)) for name in COLUMNS]
    return [f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell for cell in found]


class Outputs:
    """The files of one run. Use as a context manager."""

    def __init__(self, folder: Path, workload: str, *, save_text: bool) -> None:
        """Makes the folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._workload = workload
        self._save_text = save_text
        self._file: TextIO | None = None
        self._csv: TextIO | None = None

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in (self._file, self._csv):
            if file is not None:
                file.close()

    def begin(self) -> None:
        """Replace what an earlier run left, now that there is something to measure."""
        self._file = (self.folder / REQUESTS).open("w", encoding="utf-8", buffering=1)  # by line: a crash loses nothing
        self._csv = (self.folder / CSV).open("w", encoding="utf-8", buffering=1, newline="")
        csv.writer(self._csv).writerow(COLUMNS)
        (self.folder / SUMMARY).unlink(missing_ok=True)

    def add(self, record: Record, started: float, stage: int) -> None:
        """Write a request down. `started`: the instant at which its stage did."""
        assert self._file is not None and self._csv is not None, "begin() comes first"
        line = row(record, started, stage, self._workload, save_text=self._save_text)
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        csv.writer(self._csv).writerow(cells(line, record))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, whole or not at all."""
        draft = self.folder / (SUMMARY + ".part")
        draft.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / SUMMARY)
