"""What a load test leaves on disk: a line per request as it ends, and the summary after every stage.

So an interrupted or crashed run keeps all that was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from kvloom.loadtest.record import Record

REQUESTS = "requests.jsonl"
SUMMARY = "summary.json"
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


class Outputs:
    """The files of one run. Use as a context manager."""

    def __init__(self, folder: Path, workload: str, *, save_text: bool) -> None:
        """Makes the folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._workload = workload
        self._save_text = save_text
        self._file: TextIO | None = None

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self) -> None:
        """Replace what an earlier run left, now that there is something to measure."""
        self._file = (self.folder / REQUESTS).open("w", encoding="utf-8", buffering=1)  # by line: a crash loses nothing
        (self.folder / SUMMARY).unlink(missing_ok=True)

    def add(self, record: Record, started: float, stage: int) -> None:
        """Write a request down. `started`: the instant at which its stage did."""
        assert self._file is not None, "begin() comes first"
        line = row(record, started, stage, self._workload, save_text=self._save_text)
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, whole or not at all."""
        draft = self.folder / (SUMMARY + ".part")
        draft.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / SUMMARY)
