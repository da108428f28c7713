"""Recycled Attention (arXiv 2411.05787 v1), in its second form RefreshKV (v2, ACL 2025): lists recycled from step to step.

In the paper's words and symbols, with N tokens known and K the budget:

    full cache C_f       all N tokens; here the paged cache itself
    small cache C_p      K of them per layer and KV head; here a list of positions (`KeptLists`), nothing is copied
    full step            dense attention; its scores give a new C_p (section 3, "refresh")
    partial step         attention over C_p and the tokens since the full step
    score of a position  attention probability, maximum over the g query heads of a KV head, then max-pooled over 7 positions
    first C_p            from the last row of the prompt, which is computed densely (`recycled_step.Seeding`)
    stride S             a full step every S steps ("fixed"), or wherever, at every QC-th step ("query comparison stride"), the
                         cosine of a layer's query and that of its last full step is at most s ("dynamic")

A decode row sees          [0, sinks) + K - sinks - recent best positions     then     [N_refresh - recent, N)

so tokens since the last refresh are always visible, on top of K. Where we depart from the paper, and why:

- Tokens since the refresh stay visible instead of pushing the worst entries out of C_p: a list is immutable until it is made
  anew, reads K + S/2 positions on average, and no token is ever invisible before it had a chance to be selected.
- Sinks and recent tokens are forced into the list (options; 0 gives the plain form): they hold most of the mass of most heads.
- Stride and trigger work together: the stride bounds a list's age, the trigger shortens it where a query moves away.
- Layers take turns (option `stagger`): layer l refreshes when N + phase(l) is a multiple of S, so that every step carries the
  same share of the cost. The schedule is a function of a request's own length; what else is in the batch does not matter.
- By default the first decode row makes the first lists, which reads better than any number of the prompt's last rows, and does
  not depend on how a prompt was cut into chunks (option `seed_rows`).
- A refresh may read K only and take its output from the new list (option `refresh`): half the bytes. The paper's ablation
  finds the scores, not the dense output, to matter.
- The softmax behind the scores runs over the candidates, so that a head whose mass lies in sinks and recent tokens, which are
  read anyway, has its say too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvloom.engine.bounds import MOST_TOKENS, POOLS, bounded
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.selection.base import EVERYWHERE, Geometry, MethodStats, check_fields
from kvloom.engine.selection.batch import Batch
from kvloom.engine.selection.lists import KeptLists
from kvloom.engine.selection.recycled_step import RecycledStep, Schedule, Seeding
from kvloom.engine.state import Record
from kvloom.kernels.interface import Kernels

MOST_SEED_ROWS = 64


@dataclass(frozen=True, slots=True)
class RecycledOptions:
    """Options of recycled."""

    stride: int = bounded(16, 0, MOST_TOKENS)
    """S: a list is made anew after this many tokens; 0 for never, 1 for always."""
    similarity: float = bounded(0.7, -1, 2)
    """s: a layer refreshes where its query's cosine with that of its last refresh is at most this; -1 never, above
    1, up to 2: always."""
    check_every: int = bounded(5, 1, MOST_TOKENS)
    """QC: queries are compared once in so many tokens."""
    compare: Literal["mean", "min", "flat"] = "mean"
    """Which cosine: of the mean over heads (the paper), the least of any head, or of all heads in one vector."""
    refresh: Literal["dense", "score"] = "score"
    """A refreshing row attends to everything, or only scores every key and attends to its new list: half the bytes."""
    sinks: int | None = bounded(None, 0, MOST_TOKENS)
    """First tokens that are always read; by default 4, or an eighth of a small budget."""
    recent: int | None = bounded(None, 0, MOST_TOKENS)
    """Last tokens that are always read at a refresh; by default 64, or half of a small budget."""
    pool: int = bounded(7, POOLS)
    """Scores are max-pooled over this many neighbours, odd; 1 for none."""
    seed_rows: int = bounded(0, 0, MOST_SEED_ROWS)
    """Last rows of the prompt that make the first lists, 1 in the paper; 0: the first decode row refreshes instead."""
    stagger: bool = True
    """Layers take turns in refreshing, instead of all in one step."""

    def __post_init__(self) -> None:
        check_fields(self, "recycled")


class Recycled:
    """`Selector`: lists per layer and KV head, made densely once in a while and recycled in between."""

    prompts: Literal["dense", "seed", "sparse"]
    grid = 0
    dense_until = EVERYWHERE
    domain = ""
    levels: tuple[int, ...] = ()

    def __init__(self, options: RecycledOptions, budget: int, geometry: Geometry, kernels: Kernels) -> None:
        self.options, self.budget, self.geometry = options, budget, geometry
        self.sinks = min(4, budget // 8) if options.sinks is None else options.sinks
        self.recent = min(64, budget // 2) if options.recent is None else options.recent
        self.chosen = budget - self.sinks - self.recent
        """Positions of a list that its scores choose."""
        if self.chosen < 1:
            raise InvalidRequestError(
                f"kv.recycled.sinks and recent are {self.sinks} and {self.recent}, which leaves nothing to select of a budget "
                f"of {budget}; make them smaller, or the budget larger",
                param="kv.recycled.recent" if self.recent else "kv.recycled.sinks",
            )
        self.prompts = "seed" if options.seed_rows else "dense"
        self.tail = options.seed_rows
        self.emits = options.refresh == "dense"
        """Whether a row that refreshes reads everything, and chooses by the logits of that."""
        self.stats = MethodStats()
        compares = options.similarity > -1.0
        self.schedule = Schedule.of(
            options.stride, options.check_every if compares else 0, geometry.layers, stagger=options.stagger
        )
        lists = [len(heads) for heads in geometry.heads]
        kept = [compares * geometry.head_dim * (1 if options.compare == "mean" else geometry.group * own) for own in lists]
        self.lists = KeptLists(lists, self.sinks + self.chosen, self.sinks, kept)
        self.records: tuple[Record, ...] = (self.lists,)
        self.renewal = self.lists.renewal(
            recent=self.recent,
            compare=options.compare if compares else "none",
            threshold=float(np.nextafter(np.float32(options.similarity), np.float32(np.inf))),  # at most s
            dense=self.emits,
        )

    def decode(self, batch: Batch) -> RecycledStep:
        return RecycledStep(self, batch)

    def prefill(self, batch: Batch) -> Seeding:
        return Seeding(self, batch)
