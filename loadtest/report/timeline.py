"""Plots over time within one stage: when each request's tokens came, and where its prompt's KV came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kvloom.loadtest.report.plot import Plot, Theme, legend_below, short_number
from kvloom.loadtest.report.run import Row, Run, Stage, number

MOST_ROWS = 150
BINS = 24


class Kinds(NamedTuple):
    """Where a prompt's KV came from, in tokens. Their sum is the prompt."""

    prefix: int
    """Exact prefix, lossless."""
    segments: int
    """Segments found at any offset, approximate."""
    recomputed: int
    """Tokens of reused segments that were computed anew to repair them."""
    computed: int
    """The rest."""


NAMES = Kinds("prefix hit", "segments reused", "recomputed for repair", "computed")  # type: ignore[arg-type]


def _first(values: Mapping[str, Any], *keys: str) -> int:
    return int(next((found for key in keys if (found := number(values.get(key))) is not None), 0))


def kinds(row: Row) -> Kinds:
    """From `cached_tokens` and the server's `usage.kv`; what the server does not say counts as computed."""
    kv = row.values.get("kv") or {}
    prompt, cached = int(row.number("prompt_tokens") or 0), int(row.number("cached_tokens") or 0)
    segments, recomputed = _first(kv, "reused_tokens"), _first(kv, "recomputed_tokens")
    prefix = _first(kv, "cached_tokens") or cached
    return Kinds(prefix, segments, recomputed, max(0, prompt - prefix - segments - recomputed))


def heaviest(run: Run) -> Stage:
    """The stage with the highest load that has requests."""
    return max(run.stages, key=lambda stage: (bool(stage.rows), stage.load or 0.0, stage.index))


def itl_timeline(run: Run) -> Plot:
    """A row per request: waiting, then every gap between tokens coloured by its length."""
    name, title = "itl_timeline", "Every token over time"
    caption = (
        "A row per request: grey while it waits for its first token, then a dash per gap between tokens, brighter when longer."
    )
    stage = heaviest(run)
    rows = sorted((row for row in stage.rows if row.number("sent") is not None), key=lambda row: row.number("sent") or 0.0)
    if not any(row.chunks for row in rows):
        return Plot(name, title, caption, why="no request brought text")
    if len(run.stages) > 1:
        caption += f" Shown is the load of {stage.label}."
    if len(rows) > MOST_ROWS:
        caption += f" The first {MOST_ROWS} of {len(rows)} requests are drawn."
    rows = rows[:MOST_ROWS]
    height = min(5.2, 2.4 + 0.09 * len(rows))

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        waits, gaps, lengths, ends = [], [], [], []
        for y, row in enumerate(rows):
            sent = row.number("sent") or 0.0
            chunks = row.chunks
            end = chunks[0] if chunks else row.number("last") or sent
            waits.append([(sent, y), (end, y)])
            gaps += [[(a, y), (b, y)] for a, b in pairwise(chunks)]
            lengths += [max(1e-4, b - a) * 1e3 for a, b in pairwise(chunks)]
            if row.failure or row.values.get("cancelled"):
                ends.append((chunks[-1] if chunks else end, y, bool(row.failure)))
        width = min(9.0, 0.8 * 72 * (height - 1.9) / len(rows))
        axis.add_collection(LineCollection(waits, colors=theme.faint, linewidths=width))
        if gaps:
            low, high = np.percentile(lengths, (1, 99.5))
            colored = LineCollection(gaps, cmap=theme.colormap, norm=LogNorm(low, max(high, low * 1.1)), linewidths=width)
            colored.set_array(np.array(lengths))
            axis.add_collection(colored)
            bar = figure.colorbar(colored, ax=axis, orientation="horizontal", aspect=45, pad=0.02)
            bar.set_label("gap between tokens, ms (log scale)")
            bar.outline.set_visible(False)
            marks = np.geomspace(low, max(high, low * 1.1), 5)
            bar.set_ticks(list(marks), labels=[short_number(mark) for mark in marks])
            bar.minorticks_off()
        for failed, label in ((True, "failed"), (False, "cancelled by the client")):
            if found := [(x, y) for x, y, bad in ends if bad == failed]:
                color = theme.bad if failed else theme.ink
                axis.plot(*zip(*found), "x", color=color, label=label, markersize=7, markeredgewidth=2, zorder=3)
        axis.autoscale()
        axis.set(xlabel="seconds since the stage began", ylabel="request, as sent", xlim=(0, None))
        axis.set_ylim(len(rows) - 0.2, -0.8)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(axis="y", visible=False)
        legend_below(figure, axis)

    return Plot(name, title, caption, draw, height=height)


def cache_hits(run: Run) -> Plot:
    """Prompt tokens by where their KV came from, over time, and the server's own gauges beneath."""
    name, title = "cache_hits", "Cache hits by kind over time"
    caption = "Prompt tokens by where their KV came from, at the time of the first token."
    stage = heaviest(run)
    rows = [row for row in stage.rows if row.ok and row.number("prompt_tokens")]
    known = [row for row in rows if row.number("cached_tokens") is not None or row.values.get("kv")]
    if not known:
        return Plot(name, title, caption, why="the server does not say how many prompt tokens it took from its cache")
    if len(run.stages) > 1:
        caption += f" Shown is the load of {stage.label}."
    gauges = [entry for entry in stage.figures.get("timeline") or () if number(entry.get("t")) is not None]
    usage = _series(gauges, "kv_usage")

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(2 if usage else 1, 1, sharex=True, squeeze=False)[:, 0]
        end = max(row.chunks[0] for row in known) * 1.0001
        edges = np.linspace(0, max(end, 1e-3), BINS + 1)
        places = np.digitize([row.chunks[0] for row in known], edges) - 1
        table = np.array([kinds(row) for row in known])
        sums = np.array([table[places == i].sum(axis=0) for i in range(BINS)], dtype=float)
        bottom = np.zeros(BINS)
        colors = (theme.color(2), theme.color(0), theme.color(1), theme.faint)
        for i, (label, color) in enumerate(zip(NAMES, colors)):
            if not sums[:, i].any() and i != 3:
                continue
            share = f"{label} ({sums[:, i].sum() / max(1.0, sums.sum()):.0%})"
            axes[0].bar(edges[:-1], sums[:, i], np.diff(edges) * 0.92, bottom, align="edge", color=color, label=share)
            bottom += sums[:, i]
        axes[0].set(ylabel="prompt tokens")
        if usage:
            _draw_gauges(axes[1], theme, usage, _series(gauges, "hit_rate"))
        axes[-1].set(xlabel="seconds since the stage began", xlim=(0, None))
        handles = [axis.get_legend_handles_labels() for axis in axes]
        figure.legend([h for hs, _ in handles for h in hs], [x for _, xs in handles for x in xs], loc="outside lower center",
                      ncols=2, frameon=False)  # fmt: skip

    return Plot(name, title, caption, draw, height=5.2 if usage else 3.8)


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(number(e["t"]) or 0.0, value) for e in entries if (value := number(e.get(key))) is not None]


def _draw_gauges(axis: Any, theme: Theme, usage: Sequence[tuple[float, float]], hits: Sequence[tuple[float, float]]) -> None:
    axis.plot(*zip(*usage), color=theme.color(0), label="KV cache in use")
    if hits:
        axis.plot(*zip(*hits), color=theme.color(2), linestyle="--", label="server's hit rate")
    axis.set(ylabel="share", ylim=(0, 1.03))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
