"""A measured run as it lies on disk: `summary.json` and `requests.jsonl`, read with tolerance.

Promises that a partial run can be read: a summary without requests, requests without a summary, a last line cut off in the
middle, keys that are not there. What is missing is None or empty, and `notes` says what was skipped. Times are in seconds
from the start of the request's stage; figures keep the names and units (ms) of the summary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.loadtest.load.outputs import REQUESTS, SUMMARY


class ReportError(Exception):
    """There is nothing to report."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of `requests.jsonl`."""

    values: Mapping[str, Any]

    def number(self, key: str) -> float | None:
        """A finite number, or None."""
        return number(self.values.get(key))

    @property
    def stage(self) -> int:
        return int(self.number("stage") or 0)

    @property
    def ok(self) -> bool:
        """Neither failed nor cancelled, and with text."""
        return not self.values.get("error") and not self.values.get("cancelled") and bool(self.chunks)

    @property
    def chunks(self) -> Sequence[float]:
        return self.values.get("chunks") or ()

    @property
    def tenant(self) -> str:
        return str(self.values.get("tenant") or "")

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text."""
        sent = self.number("sent")
        return self.chunks[0] - sent if self.chunks and sent is not None else None

    @property
    def failure(self) -> str | None:
        """The kind of failure, None for a request that succeeded or that the client cancelled."""
        return str(self.values.get("error_kind") or "other") if self.values.get("error") else None


@dataclass(frozen=True, slots=True)
class Stage:
    """One load of a run: its figures and its requests."""

    index: int
    figures: Mapping[str, Any]
    rows: Sequence[Row] = ()

    def number(self, key: str) -> float | None:
        """A finite figure, or None."""
        return number(self.figures.get(key))

    @property
    def completed(self) -> int:
        return int(self.number("completed") or 0)

    @property
    def failed(self) -> int:
        return int(self.number("failed") or 0)

    @property
    def load(self) -> float | None:
        """The offered load: requests per second, or requests at a time. None if neither is a number."""
        rate = self.number("request_rate")
        return rate if rate is not None else self.number("max_concurrency")

    @property
    def is_open(self) -> bool:
        """Whether requests were sent at given times, not when earlier ones ended."""
        return self.number("request_rate") is not None

    @property
    def label(self) -> str:
        """The load in a few words: its own name, with units where it is a plain rate or concurrency."""
        own = str(self.figures.get("name") or "")
        plain = {"", f"rate {self.load:g}", f"concurrency {self.load:g}"} if self.load is not None else {""}
        if own not in plain:
            return own
        if self.load is None:
            return f"load {self.index + 1}"
        return f"{self.load:g} req/s" if self.is_open else f"{self.load:g} at a time"


@dataclass(frozen=True, slots=True)
class Run:
    """A folder that a load test wrote."""

    folder: Path
    settings: Mapping[str, Any]
    stages: Sequence[Stage]
    interrupted: bool = False
    notes: Sequence[str] = field(default=())
    """What could not be read, and what ended the run."""
    name: str = ""
    search: Mapping[str, Any] | None = None
    """What a search for the highest rate found."""

    @property
    def rows(self) -> list[Row]:
        return [row for stage in self.stages for row in stage.rows]

    @property
    def title(self) -> str:
        return self.name or str(self.settings.get("label") or self.folder.name or self.folder)


def number(value: object) -> float | None:
    """A finite number, or None: for inf as text, NaN, null and anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def load_run(folder: Path, name: str = "") -> Run:
    """Read what a load test wrote. Raises ReportError if the folder holds neither file."""
    summary, notes = _summary(folder / SUMMARY)
    rows, broken = _rows(folder / REQUESTS)
    notes += broken
    if summary is None and not rows:
        raise ReportError(f"{folder} holds no run: {'; '.join(notes)}; give a folder that `kvloom bench serve --out` wrote")
    summary = summary or {}
    figures = [stage for stage in summary.get("stages") or () if isinstance(stage, Mapping)]
    if not figures:
        last = max((row.stage for row in rows), default=-1)
        figures = (
            [summary]
            if "completed" in summary
            else [counts([r for r in rows if r.stage == i]) for i in range(last + 1)] or [{}]
        )
    stages = [Stage(i, part, tuple(row for row in rows if row.stage == i)) for i, part in enumerate(figures)]
    if lost := sum(row.stage >= len(stages) for row in rows):
        notes.append(f"{lost} requests belong to stages without figures and are left out")
    if summary.get("server_lost"):
        notes.append("the server went away before the run was over")
    settings, interrupted = summary.get("settings") or {}, bool(summary.get("interrupted", not summary))
    return Run(folder, settings, stages, interrupted, tuple(notes), name, summary.get("search"))


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that can be counted from requests alone, for a run that ended before its summary."""
    failures = Counter(row.failure for row in rows if row.failure)
    good = [row for row in rows if row.ok]
    return {
        "num_prompts": len(rows),
        "completed": len(good),
        "failed": failures.total(),
        "cancelled": sum(bool(row.values.get("cancelled")) for row in rows),
        "failures": dict(failures),
        "total_input_tokens": sum(int(row.number("prompt_tokens") or 0) for row in good),
        "total_output_tokens": sum(int(row.number("output_tokens") or 0) for row in good),
    }


def _summary(path: Path) -> tuple[Mapping[str, Any] | None, list[str]]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None, [f"there is no {path.name}"]
    except (OSError, ValueError) as error:
        return None, [f"{path.name} cannot be read: {error}"]
    if not isinstance(found, Mapping):
        return None, [f"{path.name} holds no mapping"]
    return found, []


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    rows, broken = [], 0
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return [], [f"there is no {path.name}"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path.name} cannot be read: {error}"]
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, Mapping):
            rows.append(Row(found))
        else:
            broken += bool(line.strip())
    return rows, [f"{broken} lines of {path.name} are cut off or broken and were skipped"] if broken else []
