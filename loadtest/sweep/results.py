"""What a sweep leaves on disk beside the folder of each run: `sweep.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvloom.loadtest.report.run import ReportError

RESULTS = "sweep.json"
PROBES = ("agreement", "needle")
"""How quality can be measured over HTTP."""
Outcome = Literal["measured", "refused", "failed", "interrupted"]


@dataclass(slots=True)
class Result:
    """One combination of settings."""

    server: str
    settings: dict[str, str]
    label: str
    folder: str
    """Of the run, in the sweep's folder."""
    outcome: Outcome = "failed"
    message: str = ""
    """Why it was refused or failed."""
    start_seconds: float | None = None
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures by probe; {"error": why} where the server could not be probed."""


def load_results(folder: Path) -> tuple[list[Result], bool]:
    """The results in a sweep's folder, and whether it was interrupted. Raises ReportError."""
    try:
        content = json.loads((folder / RESULTS).read_text())
        return [_result(row) for row in content["results"]], bool(content["interrupted"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{folder / RESULTS} does not hold a sweep: {error}") from None


def _result(row: Mapping[str, Any]) -> Result:
    return Result(**row)
