"""The grid of a sweep: which settings are tried, each combination once.

A setting that does nothing beside another one (a budget with dense selection) is dropped from the combination, so that the
same server is not measured twice under two names.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.report.run import ReportError

Settings = tuple[tuple[str, str], ...]
Grid = Mapping[str, Sequence[str]]

_DENSE = {"selection": frozenset({"dense"})}
_EXACT = {"reuse": frozenset({None, "off", "exact"})}
IDLE: Mapping[str, Mapping[str, frozenset[str | None]]] = {
    "budget": {**_DENSE, "retention": frozenset({None, "everything"})},
    "kvshare_options": _EXACT,
    "segment_memory": _EXACT,
    **dict.fromkeys(("selection_options", "draft", "draft_tokens", "shadow_interval", "selection_memory"), _DENSE),
}
"""Setting -> what each of these others must be (None: not in the grid) for it to do nothing."""
_COMMA = re.compile(r",(?![^{}]*})")
"""Between values; not inside a JSON object."""
SPEAKING = frozenset({"selection", "reuse", "retention", "scheduler", "weights", "dtype"})
"""Settings whose values say what they are without the setting's name."""


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of settings on one server."""

    server: str
    settings: Settings
    command: str
    """Starts it; {port} is filled in."""

    @property
    def label(self) -> str:
        """A short name for tables and plots."""
        words = [value if name in SPEAKING else f"{name} {value}" for name, value in self.settings]
        if self.server == "kvloom" and words:
            return ", ".join(words)
        return ", ".join([self.server, *words])

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([self.server, *(f"{k}-{v}" for k, v in self.settings)])).strip("-.")


def parse_grid(texts: Iterable[str]) -> Grid:
    """From NAME=VALUE,VALUE texts. Raises ConfigError."""
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, mark, rest = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        values = tuple(dict.fromkeys(value.strip() for value in _COMMA.split(rest) if value.strip()))
        if not (re.fullmatch(r"[a-z][a-z0-9_]*", name) and mark and values):
            raise ConfigError(f"--grid {text!r} is not NAME=VALUE,VALUE; write for instance --grid budget=256,512")
        if name in grid:
            raise ConfigError(f"--grid names {name} twice; write all its values in one: --grid {name}=A,B")
        grid[name] = values
    return grid


def expand(grid: Grid) -> list[Settings]:
    """Every combination that makes a difference, in the order of the grid, dense selection first."""
    combinations = (tuple(zip(grid, values)) for values in itertools.product(*grid.values()))
    found = list(dict.fromkeys(without_idle(settings) for settings in combinations))
    return sorted(found, key=lambda settings: dict(settings).get("selection") != "dense")


def without_idle(settings: Settings) -> Settings:
    """The settings that do something beside the others."""
    values = dict(settings)
    idle = {
        name
        for name, others in IDLE.items()
        if name in values and all(values.get(other) in allowed for other, allowed in others.items())
    }
    return tuple(pair for pair in settings if pair[0] not in idle)


def flags(settings: Settings) -> list[str]:
    """The settings as flags of a command line; true and false become --name and --no-name."""
    words = []
    for name, value in settings:
        flag = name.replace("_", "-")
        words += [f"--{flag}"] if value == "true" else [f"--no-{flag}"] if value == "false" else [f"--{flag}", value]
    return words


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
        return [Result(**row) for row in content["results"]], bool(content["interrupted"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{folder / RESULTS} does not hold a sweep: {error}") from None
