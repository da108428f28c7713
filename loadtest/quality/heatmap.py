"""A picture of what is found where: length across, depth down, a panel per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvloom.loadtest.study.pictures import picture

DEPTHS = 8


class Grid:
    """Mean score by length and depth; cells without trials are NaN."""

    def __init__(self, lengths: Sequence[int], depths: int = DEPTHS) -> None:
        self.lengths = list(lengths)
        self._sums, self._counts = (np.zeros((depths, len(lengths))) for _ in range(2))

    def add(self, length: int, depth: float, score: float) -> None:
        """depth: from 0, the beginning of the text, to 1."""
        cell = min(int(depth * len(self._sums)), len(self._sums) - 1), self.lengths.index(length)
        self._sums[cell] += score
        self._counts[cell] += 1

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """[depths, lengths]"""
        with np.errstate(invalid="ignore"):
            return self._sums / np.where(self._counts == 0, np.nan, self._counts)


def draw(path: Path, title: str, grids: Mapping[str, Grid]) -> None:
    """Write a PNG with a panel per grid. Raises ValueError without any."""
    if not grids:
        raise ValueError("there is no grid to draw")
    across = min(4, len(grids))
    down = -(-len(grids) // across)
    with picture(path, down, across, (1.2 + 3.0 * across, 0.8 + 2.9 * down)) as (figure, axes):
        for axis in axes.flat[len(grids) :]:
            axis.axis("off")
        for axis, (name, grid) in zip(axes.flat, grids.items()):
            means = grid.means
            image = axis.imshow(means, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (row, column), value in np.ndenumerate(means):
                if not np.isnan(value):
                    axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
            axis.set_title(name, fontsize=9)
            axis.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths], fontsize=8)
            axis.set_yticks(range(len(means)), [f"{100 * i // len(means)}%" for i in range(len(means))], fontsize=8)
        figure.supxlabel("tokens of context")
        figure.supylabel("depth of the fact")
        figure.suptitle(title)
        figure.colorbar(image, ax=axes, label="right answers", shrink=0.8)
