"""What local heads still read of a sequence: sinks in front, and a window at the end that grows with the sequence.

    kept       [0, sinks)  and  [begin(n), n)
    dropped    [sinks, begin(n))

RazorAttention (arXiv 2407.15891, section 3.3): a window of max(S0, N / C) tokens. `begin` is rounded down to a whole block, so
that what is dropped can be given back; the window is then up to a block longer than the paper's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


class Window(NamedTuple):
    """How much local heads keep."""

    sinks: int = 4
    """N0: first tokens that stay."""
    least: int = 256
    """S0: shortest window, in tokens."""
    share: int = 5
    """C: the window is a C-th of the sequence, if that is more."""

    def begin(self, n: Ints, block_size: int) -> Ints:
        """Where the window of sequences of n tokens begins; 0 where nothing is dropped. Never falls as n grows."""
        window = np.maximum(self.least, -(-n // self.share))
        begin = np.maximum(0, n - window) // block_size * block_size
        return np.where(begin > self.sinks, begin, 0).astype(n.dtype)


def out_of_bounds(options: Any) -> tuple[str, str] | None:
    """The first of RazorAttention's options that is out of bounds, and what is allowed; both modes have the same."""
    for name, ok, allowed in (
        ("induction_share", 0.0 <= options.induction_share <= 1.0, "0 to 1"),
        ("echo_share", 0.0 <= options.echo_share <= 1.0, "0 to 1"),
        ("sinks", options.sinks >= 0, "0 or more"),
        ("least", options.least >= 1, "1 or more"),
        ("share", options.share >= 1, "1 or more"),
        ("heads", options.heads in ("calibrated", "random"), "calibrated, random"),
    ):
        if not ok:
            return name, allowed
    return None
