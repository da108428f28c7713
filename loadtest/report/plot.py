"""A plot as a value: what it shows, how it is drawn, or why it is not; and how plots look.

One light and one dark theme, in colours that colour-blind readers can tell apart (Okabe and Ito). Plots are drawn narrow, with
large type, so that they can be read on a phone without zooming.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

matplotlib.use("Agg")

from matplotlib.colors import Colormap, ListedColormap

WIDTH = 5.8
"""Inches. At 360 CSS pixels, the width of a phone, type of 11 points is then 9.5 pixels high."""
DPI = 160


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one theme."""

    name: str
    paper: str
    ink: str
    faint: str
    """Grid lines and secondary marks."""
    series: tuple[str, ...]
    """In the order of use; line styles and markers take over when they run out."""
    bad: str
    """Failures."""
    scale: tuple[float, float]
    """The part of viridis that stands out from the paper."""

    def color(self, index: int) -> str:
        return self.series[index % len(self.series)]

    @property
    def colormap(self) -> Colormap:
        low, high = self.scale
        viridis = matplotlib.colormaps["viridis"]
        return ListedColormap([viridis(low + (high - low) * i / 255) for i in range(256)])


LIGHT = Theme("light", "#ffffff", "#1c2024", "#d9dde2", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
              "#b3261e", (0.0, 0.88))  # fmt: skip
DARK = Theme("dark", "#171a1f", "#e4e7eb", "#3a4048", ("#56b4e9", "#e69f00", "#2fbf95", "#e08fbd", "#f0e442", "#ff8f4d"),
             "#ff7a70", (0.22, 1.0))  # fmt: skip
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


@contextmanager
def applied(theme: Theme) -> Iterator[None]:
    """Draw in this theme."""
    settings: dict[str, Any] = {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint, "axes.titlecolor": theme.ink,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint, "legend.facecolor": theme.paper,
        "legend.edgecolor": theme.faint, "legend.labelcolor": theme.ink, "legend.framealpha": 0.9,
        "font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "legend.fontsize": 9.5,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "grid.linewidth": 0.6, "lines.linewidth": 2.0, "lines.markersize": 6, "figure.constrained_layout.use": True,
    }  # fmt: skip
    with plt.rc_context(settings):  # type: ignore[arg-type]  # its keys are literals
        yield


LONG_LABEL = 30
"""Characters beyond which two labels do not fit beside each other under a plot."""
Draw = Callable[[Figure, Theme], None]


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of a report. Without data it has no `draw` and says `why`: no empty frame is ever shown."""

    name: str
    """The file's name without .png."""
    title: str
    caption: str
    """What to look for, in a sentence."""
    draw: Draw | None = None
    why: str = ""
    height: float = 3.5
    """Inches."""


def render(plot: Plot, theme: Theme) -> bytes:
    """The plot as PNG."""
    assert plot.draw is not None
    with applied(theme):
        figure = plt.figure(figsize=(WIDTH, plot.height))
        try:
            plot.draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            return buffer.getvalue()
        finally:
            plt.close(figure)


def time_unit(milliseconds: float) -> tuple[float, str]:
    """What to divide milliseconds by so that values up to this one read well, and the unit's name."""
    return (1e3, "s") if milliseconds >= 10_000 else (1.0, "ms")


def short_number(value: float) -> str:
    """Three digits at least, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def log_axis(axis: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axis: Axes, columns: int = 2) -> None:
    """A legend that never hides data."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        across = 1 if max(map(len, labels)) > LONG_LABEL else min(columns, len(labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)


def shorten(text: str, length: int = 28) -> str:
    """A label that fits, its ends kept."""
    return text if len(text) <= length else text[: length - 9] + "…" + text[-8:]
