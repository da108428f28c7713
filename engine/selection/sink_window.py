"""Sinks and a window: the first tokens and the last ones, nothing between (StreamingLLM, arXiv 2309.17453, section 3.2).

The cheapest thing that a decode step can read, and so the baseline that every other method must beat at the same budget.
Departure: true positions instead of positions inside the cache, since all KV is kept and stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from kvloom.engine.bounds import MOST_TOKENS, bounded
from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.base import EVERYWHERE, check_fields, refuse
from kvloom.engine.selection.batch import Batch
from kvloom.engine.selection.geometry import Geometry
from kvloom.kernels.interface import Kernels


@dataclass(frozen=True, slots=True)
class SinkWindowOptions:
    """Options of sink_window."""

    sinks: int = bounded(4, 0, MOST_TOKENS)
    """Tokens at the beginning that are always read."""

    def __post_init__(self) -> None:
        check_fields(self, "sink_window")


class SinkWindow:
    """Reads `sinks` first tokens and the last `budget - sinks`. No state."""

    emits = False
    prompts: Literal["dense", "seed", "sparse"] = "dense"
    grid = tail = 0
    dense_until = EVERYWHERE
    domain = ""
    levels: tuple[int, ...] = ()
    records: tuple[Record, ...] = ()

    def __init__(self, options: SinkWindowOptions, budget: int, geometry: Geometry, kernels: Kernels) -> None:
        if options.sinks >= budget:
            raise refuse("sink_window", "sinks", options.sinks, f"less than the budget of {budget}")
        self.budget, self.sinks = budget, options.sinks
        self.stats = MethodStats()

    def decode(self, batch: Batch) -> SinkWindowStep:
        return SinkWindowStep(self, batch)

    def prefill(self, batch: Batch) -> SinkWindowStep:
        raise AssertionError("prompts are dense")


class SinkWindowStep:
    """The same rows in every layer."""

    program = ()

    def __init__(self, method: SinkWindow, batch: Batch) -> None:
        self._batch = batch
        start = batch.stops - (method.budget - method.sinks)
        self._plans = batch.seen("seen", start, batch.sinks(np.full_like(start, method.sinks)))

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        self._batch.attend(layer, self._plans, out, heads=heads, lse=lse)

    def finish(self) -> None:
        """Nothing is chosen."""
