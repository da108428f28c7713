"""Plots with a bar per class of request (tenant, label) or per run; and which plots a report has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvloom.loadtest.report.curves import CURVES
from kvloom.loadtest.report.plot import Plot, Theme, legend_below, short_number, shorten, time_unit
from kvloom.loadtest.report.run import Run, Stage, number
from kvloom.loadtest.report.timeline import cache_hits, heaviest, itl_timeline

MOST_BARS = 16
Classes = Mapping[str, Mapping[str, Any]]


def classes(stage: Stage, key: str) -> Classes:
    """The stage's figures by tenant or by label; empty if there are not at least two."""
    found = stage.figures.get(key) or {}
    return found if isinstance(found, Mapping) and len(found) > 1 else {}


def by_class(run: Run, key: str, title: str, what: str) -> Plot:
    """TTFT (mean, p99) and output tokens of every tenant or label of the heaviest stage."""
    caption = "Left: how long each waited for its first token. Right: the output tokens it got."
    stage = heaviest(run)
    found = classes(stage, key)
    if not found:
        return Plot(key, title, caption, why=f"the requests belong to fewer than two {what}")
    names = list(found)
    if len(names) > MOST_BARS:
        caption += f" The first {MOST_BARS} of {len(names)} are drawn."
    if len(run.stages) > 1:
        caption += f" Shown is the load of {stage.label}."
    names = names[:MOST_BARS]

    def draw(figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_ttft(left, theme, [found[name] for name in names])
        tokens = [number(found[name].get("output_tokens")) or 0.0 for name in names]
        bars = right.barh(range(len(names)), tokens, 0.7, color=theme.color(2))
        right.bar_label(bars, [_tokens_label(found[name]) for name in names], padding=3, fontsize=9)
        right.margins(x=0.42)
        right.set(xlabel="output tokens", xlim=(0, None if any(tokens) else 1))
        left.set_yticks(range(len(names)), [shorten(name or "(none)", 20) for name in names])
        left.set_ylim(len(names) - 0.4, -0.6)
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
        legend_below(figure, left)

    return Plot(key, title, caption, draw, height=1.9 + 0.42 * len(names))


def _tokens_label(figures: Mapping[str, Any]) -> str:
    tokens, failed = number(figures.get("output_tokens")) or 0.0, number(figures.get("failed")) or 0
    return f"{tokens:,.0f}" + (f"\n{failed:.0f} failed" if failed else "")


def _draw_ttft(axis: Axes, theme: Theme, entries: Sequence[Mapping[str, Any]]) -> None:
    highest = max((number(e.get("p99_ttft_ms")) or 0.0 for e in entries), default=0.0)
    divisor, unit = time_unit(highest)
    for i, (key, label) in enumerate((("mean_ttft_ms", "mean TTFT"), ("p99_ttft_ms", "p99 TTFT"))):
        values = [(number(e.get(key)) or 0.0) / divisor for e in entries]
        places = [y + (i - 0.5) * 0.37 for y in range(len(entries))]
        bars = axis.barh(places, values, 0.35, color=theme.color(i), label=label)
        texts = ["-" if number(e.get(key)) is None else short_number(value) for e, value in zip(entries, values)]
        axis.bar_label(bars, texts, padding=3, fontsize=9)
    axis.margins(x=0.2)
    axis.set(xlabel=f"time to first token, {unit}")


CLASSES = (("tenants", "Tenants", "tenants"), ("labels", "Classes of requests", "classes"))
"""Key of a stage's figures, title, and what they are."""


def runs_beside(runs: Sequence[Run]) -> Plot:
    """Medians and throughput of every run, for its heaviest stage."""
    name, title = "runs", "The runs side by side"
    caption = (
        "Medians over successful requests, at each run's highest load. Shorter is better for times, longer for throughput."
    )
    panels = (("TTFT p50, ms", "p50_ttft_ms"), ("TPOT p50, ms", "p50_tpot_ms"), ("output tokens/s", "output_throughput"))
    stages = [heaviest(run) for run in runs]
    if not any(stage.number(key) is not None for stage in stages for _, key in panels):
        return Plot(name, title, caption, why="no run has a successful request")

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(len(panels), 1)
        for axis, (label, key) in zip(axes, panels):
            values = [stage.number(key) for stage in stages]
            colors = [theme.color(i) for i in range(len(runs))]
            bars = axis.barh(range(len(runs)), [v or 0.0 for v in values], 0.72, color=colors)
            axis.bar_label(bars, ["no figure" if v is None else short_number(v) for v in values], padding=3, fontsize=9.5)
            axis.set_yticks(range(len(runs)), [shorten(run.title, 26) for run in runs])
            axis.set_ylim(len(runs) - 0.4, -0.6)
            axis.set_xlabel(label)
            axis.margins(x=0.16)
            axis.grid(axis="y", visible=False)

    return Plot(name, title, caption, draw, height=1.6 + len(panels) * (0.45 + 0.28 * len(runs)))


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
        return [runs_beside(runs), *curves(runs)]
    (run,) = runs
    return [*curves(runs), itl_timeline(run), cache_hits(run), *(by_class(run, *kind) for kind in CLASSES)]
