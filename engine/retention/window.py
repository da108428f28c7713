"""What local heads still read of a sequence: sinks in front, and a window at the end that grows with the sequence.

    kept       [0, sinks)  and  [begin(n), n)
    dropped    [sinks, begin(n))

RazorAttention (arXiv 2407.15891, section 3.3): a window of max(S0, N / C) tokens. `begin` is rounded down to a whole block, so
that what is dropped can be given back; the window is then up to a block longer than the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvloom.engine.bounds import MOST_TOKENS, bounded
from kvloom.engine.calibration import find_razor
from kvloom.engine.calibration.razor import ECHO_SHARE, INDUCTION_SHARE, HeadClasses

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RazorHeads:
    """Options of both modes: which heads are local, and what they read."""

    induction_share: float = bounded(INDUCTION_SHARE, 0, 1)
    """Share of all KV heads that are retrieval heads, and keep everything, for their induction score; at least one head."""
    echo_share: float = bounded(ECHO_SHARE, 0, 1)
    """The same for their echo score."""
    sinks: int = bounded(Window().sinks, 0, 4096)
    """N0: first tokens that local heads read."""
    min_window: int = bounded(Window().shortest, 1, MOST_TOKENS)
    """S0: shortest window of local heads, in tokens."""
    window_divisor: int = bounded(Window().divisor, 1, MOST_TOKENS)
    """C: the window is a C-th of the sequence, if that is more."""
    compensation: bool = True
    """Whether a token stands for what local heads do not read."""
    heads: Literal["calibrated", "random"] = "calibrated"
    """Which are retrieval heads: the calibrated ones, or as many anywhere (to compare with)."""
    seed: int = bounded(0, 0, 2**32 - 1)
    """Of random heads."""

    @property
    def window(self) -> Window:
        return Window(self.sinks, self.min_window, self.window_divisor)

    def classes(self, model_key: str) -> HeadClasses | None:
        """The heads of a model; None if it has no calibration."""
        calibration = find_razor(model_key)
        if calibration is None:
            return None
        seed = self.seed if self.heads == "random" else None
        return calibration.classes(self.induction_share, self.echo_share, random_seed=seed)
