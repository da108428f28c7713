"""How plots look: one light and one dark theme, in colours that colour-blind readers can tell apart (Okabe and Ito).

Plots are drawn narrow, with large type, so that they can be read on a phone without zooming.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
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
