"""The Pareto front of quality against speed: which combinations of settings nothing else beats, as marks and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvloom.loadtest.report.document import NONE, percent
from kvloom.loadtest.report.plot import MARKERS, Plot, Theme, shorten
from kvloom.loadtest.report.run import Run, Stage
from kvloom.loadtest.sweep.grid import Result


class Speed(NamedTuple):
    """A way to be fast."""

    name: str
    key: str
    sign: int
    """1 if more is better."""


class Quality(NamedTuple):
    """A way to be right."""

    name: str
    probe: str
    key: str
    sign: int
    show: Callable[[object], str]


SPEEDS = (
    Speed("TPOT p50, ms", "p50_tpot_ms", -1),
    Speed("TTFT p50, ms", "p50_ttft_ms", -1),
    Speed("output tokens/s", "output_throughput", 1),
)


def precise(value: object) -> str:
    return NONE if not isinstance(value, (int, float)) else f"{value:.3g}"


QUALITIES = (
    Quality("needle accuracy", "needle", "correct", 1, percent),
    Quality("KL to reference, nats", "agreement", "kl_mean", -1, precise),
)


class Row(NamedTuple):
    """A combination under one load."""

    result: Result
    run: Run
    stage: Stage


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (speed, quality), both better when larger, is on the front.

    A point is on it unless another is at least as good in both and better in one. Equal points are on it together; a point with
    a NaN never is, and beats nobody.
    """
    known = [point for point in points if not any(map(math.isnan, point))]

    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in known)

    return [not any(map(math.isnan, point)) and not beaten(point) for point in points]


def quality_of(result: Result, quality: Quality) -> float | None:
    value = (result.quality.get(quality.probe) or {}).get(quality.key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def front(rows: Sequence[Row], speed: Speed, quality: Quality) -> frozenset[int]:
    """Rows that no other row of the same load beats in both."""
    found: set[int] = set()
    for load in dict.fromkeys(row.stage.label for row in rows):
        places = [i for i, row in enumerate(rows) if row.stage.label == load]
        values = [(rows[i].stage.number(speed.key), quality_of(rows[i].result, quality)) for i in places]
        marks = pareto_front([(_signed(a, speed.sign), _signed(b, quality.sign)) for a, b in values])
        found.update(i for i, mark in zip(places, marks) if mark)
    return frozenset(found)


def _signed(value: float | None, sign: int) -> float:
    return math.nan if value is None else sign * value


def pareto_plot(rows: Sequence[Row], quality: Quality, fronts: Sequence[frozenset[int]]) -> Plot:
    """Quality against each speed at the highest load; combinations on the front are filled and joined."""
    name, title = f"pareto_{quality.probe}", f"Quality against speed: {quality.name}"
    loads = {row.stage.label: row.stage.load or 0.0 for row in rows}
    load = max(loads, key=lambda label: loads[label]) if loads else ""
    shown = [i for i, row in enumerate(rows) if row.stage.label == load and quality_of(row.result, quality) is not None]
    caption = f"Filled: nothing else at {load} is better in both. Towards the upper right is better in every panel."
    speeds = [(speed, marks) for speed, marks in zip(SPEEDS, fronts) if any(rows[i].stage.number(speed.key) for i in shown)]
    if not shown or not speeds:
        return Plot(name, title, caption, why=f"the {quality.probe} probe gave no figure")

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(len(speeds), 1, squeeze=False)[:, 0]
        for axis, (speed, marks) in zip(axes, speeds):
            _panel(axis, theme, rows, [i for i in shown if rows[i].stage.number(speed.key)], speed, quality, marks)
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)

    return Plot(name, title, caption, draw, height=2.3 * len(speeds) + 0.4 + 0.12 * len(shown))


def _panel(
    axis: Axes, theme: Theme, rows: Sequence[Row], shown: Sequence[int], speed: Speed, quality: Quality, marks: frozenset[int]
) -> None:
    places: Mapping[int, tuple[float, float]] = {
        i: (rows[i].stage.number(speed.key) or 0.0, quality_of(rows[i].result, quality) or 0.0) for i in shown
    }
    ends = sorted(places[i] for i in shown if i in marks)
    axis.plot(*zip(*ends), "-", color=theme.faint, linewidth=3, zorder=1)
    for order, i in enumerate(shown):
        color, marker = theme.color(order), MARKERS[(order + order // len(theme.series)) % len(MARKERS)]
        fill = color if i in marks else "none"
        label = shorten(rows[i].result.label, 34)
        axis.plot(*places[i], marker, color=color, markersize=9, markerfacecolor=fill, markeredgewidth=2, label=label)
    axis.margins(0.12)
    if speed.sign < 0:
        axis.xaxis.set_inverted(True)
    if quality.sign < 0:
        axis.yaxis.set_inverted(True)
    axis.set(xlabel=speed.name + (" (less is to the right)" if speed.sign < 0 else ""))
    axis.set_ylabel(quality.name.replace(" to ", " to\n"))
