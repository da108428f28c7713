"""A plot as a value: what it shows, how it is drawn, or why it is not."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvloom.loadtest.report.theme import DPI, WIDTH, Theme, applied

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
