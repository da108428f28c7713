"""How sure a figure is: confidence intervals from the measured values alone.

Neighbouring tokens of a text are alike, and so are questions about one haystack: values come with a block each, and the
bootstrap draws whole blocks (Kunsch 1989). Counts of right answers use Wilson's interval (1927), which also holds at 0 and 1.

One value, or one block of them, says nothing of how far the next one may lie: its interval is None, and no table prints one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


def _mean(values: Floats) -> float:
    return float(values.mean())


def bootstrap(
    values: npt.ArrayLike,
    blocks: npt.ArrayLike | None = None,
    statistic: Callable[[Floats], float] = _mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """95% percentile interval of a statistic over values that are drawn block by block; None for a single block.

    values, blocks: [n]; equal numbers in `blocks` belong together; without blocks each value is its own. Raises ValueError if
    there are no values, or not one block per value.
    """
    data = np.asarray(values, np.float64)
    names = np.arange(len(data)) if blocks is None else np.asarray(blocks)
    if len(data) == 0 or len(names) != len(data):
        raise ValueError(f"{len(data)} values with {len(names)} blocks; give at least one value, and a block for each")
    groups = [data[names == name] for name in np.unique(names)]
    if len(groups) == 1:
        return None
    draws = np.random.default_rng(seed).integers(0, len(groups), (resamples, len(groups)))
    if statistic is _mean:  # the mean needs no concatenation
        sums, counts = (np.array([f(group) for group in groups]) for f in (np.sum, len))
        found = sums[draws].sum(1) / counts[draws].sum(1)
    else:
        found = np.array([statistic(np.concatenate([groups[i] for i in draw])) for draw in draws])
    return _edges(found)


def exponential(interval: Interval | None) -> Interval | None:
    """The interval of exp(x), from that of x: of a perplexity, from that of a mean loss."""
    return None if interval is None else Interval(math.exp(interval.low), math.exp(interval.high))


def wilson(right: float, count: int) -> Interval | None:
    """95% interval of a share of `count` independent trials; None for a single one. Raises ValueError without trials."""
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} right of {count}; give at least one trial, and 0 to that many right")
    if count == 1:
        return None
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At 0 and 1 the bounds are exact in theory; rounding must not push them past the share itself.
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return Interval(min(max(0.0, low), share), max(min(1.0, high), share))


def _medians(values: npt.ArrayLike, generator: np.random.Generator, resamples: int) -> Floats:
    data = np.asarray(values, np.float64)
    return np.median(data[generator.integers(0, len(data), (resamples, len(data)))], axis=1)


def bootstrap_median(values: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """Interval of the median of values that are drawn one by one, in their unit; None for fewer than two."""
    return _edges(_medians(values, np.random.default_rng(seed), resamples)) if np.size(values) > 1 else None


def ratio(above: npt.ArrayLike, below: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """Interval of median(above) / median(below), both drawn anew: how sure a speed-up is. None if either is a single value."""
    if np.size(above) == 1 or np.size(below) == 1:
        return None
    generator = np.random.default_rng(seed)
    upper, lower = (_medians(values, generator, resamples) for values in (above, below))
    return _edges(upper / lower)


def _edges(found: Floats) -> Interval:
    return Interval(*(float(edge) for edge in np.percentile(found, (2.5, 97.5))))
