"""Cutting token sequences by their content, and the fingerprints they are found by.

    cut             spans that end where a rolling hash says so: the same text is cut alike wherever it stands
    fingerprints    winnowing (Schleimer et al. 2003): of every WINDOWS consecutive windows the one with the least hash, so any
                    two texts with a common run of WINDOW + WINDOWS - 1 tokens share one

Hashes are of WINDOW tokens: polynomial prefix sums modulo 2^64 over random-looking numbers per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WINDOW = 16
"""Tokens under one hash."""
WINDOWS = 16
"""Consecutive windows of which one is chosen."""
LEAST, MOST, MASK = 32, 256, 63
"""Tokens of a span; it ends where the hash modulo MASK + 1 is 0, so the mean is about LEAST + MASK + 1."""

Hashes = npt.NDArray[np.uint64]
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64


def window_hashes(tokens: npt.NDArray[np.integer]) -> Hashes:
    """One hash per window [i, i + WINDOW), the same wherever it stands: [len - WINDOW + 1], or none."""
    count = len(tokens) - WINDOW + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    terms = _mixed(np.asarray(tokens).astype(np.uint64)) * _powers(_BASE, len(tokens))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return _mixed((prefix[WINDOW:] - prefix[:count]) * _powers(pow(_BASE, -1, 1 << 64), count))


def cut(tokens: npt.NDArray[np.integer], *, barriers: npt.NDArray[np.bool_] | None = None) -> list[tuple[int, int]]:
    """Half-open spans of LEAST to MOST tokens, cut by content alone. A barrier belongs to no span and ends one; what is left
    before one, shorter than LEAST, belongs to none either."""
    hashes = window_hashes(tokens)
    ends = np.flatnonzero((hashes & np.uint64(MASK)) == 0) + WINDOW  # a span may end behind such a window
    walls = np.flatnonzero(barriers) if barriers is not None else np.zeros(0, np.int64)
    spans: list[tuple[int, int]] = []
    for first, last in zip([0, *(walls + 1).tolist()], [*walls.tolist(), len(tokens)]):
        while last - first >= LEAST:
            i = int(np.searchsorted(ends, first + LEAST))
            end = min(int(ends[i]) if i < len(ends) else last, first + MOST, last)
            spans.append((first, end))
            first = end
    return spans


def fingerprints(tokens: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], Hashes]:
    """Offsets of the chosen windows, ascending, and their hashes. A text of at least WINDOW tokens has one."""
    hashes = window_hashes(tokens)
    if len(hashes) <= WINDOWS:
        at = len(hashes) - 1 - int(hashes[::-1].argmin()) if len(hashes) else 0
        offsets = np.array([at] if len(hashes) else [], np.int64)
    else:
        groups = np.lib.stride_tricks.sliding_window_view(hashes, WINDOWS)
        rightmost = WINDOWS - 1 - groups[:, ::-1].argmin(axis=1)
        offsets = np.unique(np.arange(len(groups)) + rightmost)
    return offsets, hashes[offsets]


def _powers(base: int, count: int) -> Hashes:
    """base^0 ... base^(count - 1), modulo 2^64."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers, dtype=np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """A fixed random-looking 64-bit number for each (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
