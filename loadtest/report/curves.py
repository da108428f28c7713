"""Plots of figures over load, and the distribution of TTFT. Several runs share a plot, a colour for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kvloom.loadtest.report.plot import LINES, MARKERS, Plot, Theme, legend_below, log_axis, shorten, time_unit
from kvloom.loadtest.report.run import Run, Stage
from kvloom.loadtest.report.timeline import heaviest

MOST_LINES = 8
ONE_LOAD = "needs at least two loads; this report holds one"


class Line(NamedTuple):
    """One curve's identity: its label, colour index and style index."""

    label: str
    color: int
    style: int
    stage: Stage


def _lines(runs: Sequence[Run]) -> list[Line]:
    """One run: a line and a colour per stage. Several: a line per run, at its highest load."""
    if len(runs) == 1:
        return [Line(stage.label, i, i // 6, stage) for i, stage in enumerate(runs[0].stages)]
    return [Line(f"{shorten(run.title)}, {heaviest(run).label}", i, i // 6, heaviest(run)) for i, run in enumerate(runs)]


def ttft_cdf(runs: Sequence[Run]) -> Plot:
    """Share of requests whose first text came within a time."""
    title, caption = (
        "TTFT distribution",
        "Share of successful requests with a first token within a time. Further left is better.",
    )
    found = [
        (line, sorted(v * 1e3 for row in line.stage.rows if row.ok and (v := row.ttft) is not None)) for line in _lines(runs)
    ]
    found = [(line, values) for line, values in found if values]
    if not found:
        return Plot("ttft_cdf", title, caption, why="no request brought text")
    if len(found) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(found)} lines are drawn."
    found = found[:MOST_LINES]

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        divisor, unit = time_unit(max(values[-1] for _, values in found))
        for line, values in found:
            shares = np.arange(1, len(values) + 1) / len(values)
            xs = [values[0], *values]
            axis.step([x / divisor for x in xs], [0.0, *shares], where="post", label=f"{line.label} (n = {len(values)})",
                      color=theme.color(line.color), linestyle=LINES[line.style % len(LINES)])  # fmt: skip
        for share in (0.5, 0.99):
            axis.axhline(share, color=theme.ink, linewidth=0.7, linestyle=":")
            axis.annotate(
                f"p{share * 100:.0f}", (0.005, share), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9
            )
        lowest, highest = min(v[0] for _, v in found), max(v[-1] for _, v in found)
        if lowest > 0 and highest / lowest > 30:
            log_axis(axis)
        else:
            axis.set_xlim(left=0)
        axis.set(xlabel=f"time to first token, {unit}", ylabel="share of requests", ylim=(0, 1.03))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        legend_below(figure, axis)

    return Plot("ttft_cdf", title, caption, draw, height=3.6)


def _curves(runs: Sequence[Run], *keys: str) -> Iterator[tuple[Run, list[Stage]]]:
    """The stages of each run that have a load and these figures, by load."""
    for run in runs:
        stages = [s for s in run.stages if s.load is not None and all(s.number(key) is not None for key in keys)]
        yield run, sorted(stages, key=lambda s: s.load or 0.0)


def load_axis(runs: Sequence[Run]) -> str:
    """What the load of these runs is called."""
    kinds = {stage.is_open for run in runs for stage in run.stages if stage.load is not None}
    return {frozenset({True}): "offered rate, requests/s", frozenset({False}): "requests at a time"}.get(
        frozenset(kinds), "load (requests/s, or requests at a time)"
    )


def _loads(runs: Sequence[Run], *keys: str) -> int:
    return max((len({s.load for s in stages}) for _, stages in _curves(runs, *keys)), default=0)


def latency_against_load(runs: Sequence[Run]) -> Plot:
    """p50 and p99 of TTFT and TPOT over the stages' loads."""
    name, title = "latency_rate", "Latency against load"
    caption = "Where a line bends upwards, the server is saturated. Solid: half of the requests are faster; dashed: 99% are."
    keys = [f"{p}_{m}_ms" for m in ("ttft", "tpot") for p in ("p50", "p99")]
    if _loads(runs, *keys) < 2:
        return Plot(name, title, caption, why=ONE_LOAD)

    quantiles = ("p50", "p99") if len(runs) <= 3 else ("p50",)
    if len(quantiles) == 1:
        caption = caption.split(" Solid")[0] + " Medians."

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(2, 1, sharex=True)
        for axis, metric in zip(axes, ("ttft", "tpot")):
            curves = [(run, stages) for run, stages in _curves(runs, *keys) if stages]
            divisor, unit = time_unit(max(s.number(f"p99_{metric}_ms") or 0.0 for _, stages in curves for s in stages))
            for i, (run, stages) in enumerate(curves):
                for j, quantile in enumerate(quantiles):
                    values = [(s.number(f"{quantile}_{metric}_ms") or 0.0) / divisor for s in stages]
                    label = quantile if len(runs) == 1 else f"{shorten(run.title)} {quantile}"
                    color = theme.color(j if len(runs) == 1 else i)
                    axis.plot(
                        [s.load or 0.0 for s in stages],
                        values,
                        LINES[j],
                        marker=MARKERS[i % len(MARKERS)],
                        label=label,
                        color=color,
                    )
            axis.set(ylabel=f"{metric.upper()}, {unit}", ylim=(0, None), xlim=(0, None))
        axes[-1].set_xlabel(load_axis(runs))
        legend_below(figure, axes[0])

    return Plot(name, title, caption, draw, height=5.2)


def throughput_against_ttft(runs: Sequence[Run]) -> Plot:
    """What throughput costs in TTFT, a point per stage."""
    name, title = "throughput_ttft", "Throughput against TTFT"
    caption = "Each point is one load. Up and to the left is better: more tokens for less waiting."
    keys = ("output_throughput", "p50_ttft_ms")
    if sum(len(stages) for _, stages in _curves(runs, *keys)) < 2:
        return Plot(name, title, caption, why=ONE_LOAD)

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        curves = [(run, stages) for run, stages in _curves(runs, *keys) if stages]
        divisor, unit = time_unit(max(s.number("p50_ttft_ms") or 0.0 for _, stages in curves for s in stages))
        for i, (run, stages) in enumerate(curves):
            points = [((s.number("p50_ttft_ms") or 0.0) / divisor, s.number("output_throughput") or 0.0) for s in stages]
            axis.plot(*zip(*points), "-", marker=MARKERS[i % len(MARKERS)], color=theme.color(i), label=shorten(run.title))
            for point, stage in zip(points, stages):
                axis.annotate(f"{stage.load:g}", point, xytext=(5, -13), textcoords="offset points", fontsize=9)
        axis.set(xlabel=f"median time to first token, {unit}", ylabel="output tokens/s", xlim=(0, None), ylim=(0, None))
        axis.margins(0.08)
        if len(curves) > 1:
            legend_below(figure, axis)

    return Plot(name, title, f"{caption} Numbers beside points: {load_axis(runs)}.", draw)


def goodput_against_load(runs: Sequence[Run]) -> Plot:
    """Requests per second that met every objective, over load."""
    name, title = "goodput_rate", "Goodput against load"
    objectives = _objectives(runs)
    caption = f"Requests/s that met every objective ({objectives}). On the dotted line every request did."
    if not objectives:
        return Plot(name, title, caption, why="no service-level objective was given")
    if _loads(runs, "request_goodput") < 2:
        return Plot(name, title, caption, why=ONE_LOAD)

    def named(run: Run, what: str) -> str:
        return what if len(runs) == 1 else f"{shorten(run.title)}, {what}"

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        for i, (run, stages) in enumerate(_curves(runs, "request_goodput")):
            if not stages:
                continue
            values = [s.number("request_goodput") or 0.0 for s in stages]
            loads = [s.load or 0.0 for s in stages]
            marker = MARKERS[i % len(MARKERS)]
            axis.plot(loads, values, "-", marker=marker, color=theme.color(i), label=named(run, "goodput"))
            served = [s.number("request_throughput") or 0.0 for s in stages]
            axis.plot(loads, served, "--", color=theme.color(i), linewidth=1.2, label=named(run, "all that were served"))
        if all(s.is_open for _, stages in _curves(runs, "request_goodput") for s in stages):
            top = max(s.load or 0.0 for _, stages in _curves(runs, "request_goodput") for s in stages)
            axis.plot([0, top], [0, top], ":", color=theme.ink, linewidth=1, label="offered")
        axis.set(xlabel=load_axis(runs), ylabel="requests/s", xlim=(0, None), ylim=(0, None))
        legend_below(figure, axis)

    return Plot(name, title, caption, draw, height=3.8)


def _objectives(runs: Sequence[Run]) -> str:
    """The first run's service-level objectives in words."""
    for run in runs:
        for stage in run.stages:
            slo = stage.figures.get("slo") or {}
            if found := [
                f"{key.removesuffix('_ms').upper()} ≤ {value:g} ms" for key, value in slo.items() if value is not None
            ]:
                return ", ".join(found).replace("E2EL", "E2E")
    return ""


CURVES: Sequence[Callable[[Sequence[Run]], Plot]] = (
    ttft_cdf,
    latency_against_load,
    throughput_against_ttft,
    goodput_against_load,
)
