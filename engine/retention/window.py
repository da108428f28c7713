"""What local heads still read of a sequence: sinks in front, and a window at the end that grows with the sequence.

    kept       [0, sinks)  and  [begin(n), n)
    dropped    [sinks, begin(n))

RazorAttention (arXiv 2407.15891, section 3.3): a window of max(S0, N / C) tokens. `begin` is rounded down to a whole block, so
that what is dropped can be given back; the window is then up to a block longer than the paper's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvloom.engine.bounds import MOST_TOKENS, Range

SINKS, LENGTHS, DIVISORS, SEEDS = Range(0, 4096), Range(1, MOST_TOKENS), Range(1, MOST_TOKENS), Range(0, 2**32 - 1)
"""Of the options that both modes have: sinks, min_window, window_divisor, and the seed of random heads."""

Ints = npt.NDArray[np.integer]


class Window(NamedTuple):
    """How much local heads keep."""

    sinks: int = 4
    """N0: first tokens that stay."""
    shortest: int = 256
    """S0: shortest window, in tokens."""
    divisor: int = 5
    """C: the window is a C-th of the sequence, if that is more."""

    def begin(self, n: Ints, block_size: int) -> Ints:
        """Where the window of sequences of n tokens begins; 0 where nothing is dropped. Never falls as n grows."""
        window = np.maximum(self.shortest, -(-n // self.divisor))
        begin = np.maximum(0, n - window) // block_size * block_size
        return np.where(begin > self.sinks, begin, 0).astype(n.dtype)

    def until(self, n: int, block_size: int, most: int) -> int:
        """The largest number of tokens, at most n + most, whose window begins where that of n tokens does."""
        begins = self.begin(np.arange(n, n + most + 1), block_size)
        return n + int((begins == begins[0]).sum()) - 1
