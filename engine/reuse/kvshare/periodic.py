"""Text that repeats itself, which is never reused: one token over and over, a row of line breaks, a pattern of a few tokens.

Attention over it tells copies apart by their position alone, so a copied part answers for another one, and answers change by
far more than its deviation says. A position is periodic if it lies in

    a stretch of tokens with a period of p <= PERIODS, three periods long and at least LEAST + p tokens
    a window of WINDOW tokens of at most FEW different ones, in whatever order
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PERIODS = 64
"""Longest period."""
LEAST = 32
"""Tokens in a row that equal the one a period before them."""
WINDOW, FEW = 64, 3

Bools = npt.NDArray[np.bool_]


def periodic(tokens: npt.NDArray[np.integer]) -> Bools:
    """Mask of the positions of a text that repeats itself: [len]. Whole-array operations, PERIODS of them."""
    found = np.zeros(len(tokens), bool)
    for period in range(1, min(PERIODS, len(tokens) - 1) + 1):
        _mark(found, tokens[period:] == tokens[:-period], max(LEAST, 2 * period), period)
    if len(tokens) >= WINDOW:
        _mark(found, _poor(tokens), 1, WINDOW - 1)
    return found


def _mark(found: Bools, hits: Bools, least: int, more: int) -> None:
    """Mark `least` or more hits in a row, and so many positions behind the last of them."""
    edges = np.flatnonzero(np.diff(hits.astype(np.int8), prepend=0, append=0))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist()):
        if last - first >= least:
            found[first : last + more] = True


def _poor(tokens: npt.NDArray[np.integer]) -> Bools:
    """For every window, whether it has at most FEW different tokens: [len - WINDOW + 1].

    A token is the first of its kind in a window if its last occurrence lies before it; so those are counted that do.
    """
    order = np.argsort(tokens, kind="stable")
    previous = np.full(len(tokens), -1)
    same = tokens[order[1:]] == tokens[order[:-1]]
    previous[order[1:][same]] = order[:-1][same]
    windows = np.lib.stride_tricks.sliding_window_view(previous, WINDOW)
    poor: Bools = (windows < np.arange(len(windows))[:, None]).sum(axis=1) <= FEW
    return poor
