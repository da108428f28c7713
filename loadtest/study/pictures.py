"""Pictures as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def picture(
    path: Path, down: int, across: int, size: tuple[float, float], dpi: int = 110, **more: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure of `down` x `across` panels and its axes [down, across], written to `path` at the end. `size`: inches."""
    import matplotlib  # not before it is drawn: of the `bench` extra

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", **more)
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    finally:
        plt.close(figure)
