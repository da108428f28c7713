"""Which plots a report has, in the order of reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvloom.loadtest.report import bars, timeline
from kvloom.loadtest.report.curves import CURVES
from kvloom.loadtest.report.plot import Plot
from kvloom.loadtest.report.run import Run

MOST_RUNS = 6
"""Runs that curves can be told apart for."""


def curves(runs: Sequence[Run]) -> list[Plot]:
    """The plots of figures over load; of many runs the first are drawn, and the captions say so."""
    found = [curve(runs[:MOST_RUNS]) for curve in CURVES]
    if len(runs) <= MOST_RUNS:
        return found
    return [replace(plot, caption=f"{plot.caption} Of {len(runs)} runs {MOST_RUNS} are drawn.") for plot in found]


def plots(runs: Sequence[Run]) -> list[Plot]:
    """All plots of a report on one run, or on several side by side."""
    if len(runs) > 1:
        return [bars.runs_beside(runs), *curves(runs)]
    (run,) = runs
    return [*curves(runs), timeline.itl_timeline(run), timeline.cache_hits(run), bars.tenants(run), bars.labels(run)]
