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

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.bounds import MOST_TOKENS, POOLS, bounded
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.base import EVERYWHERE, Counting, check_fields
from kvloom.engine.selection.batch import Batch, Ints
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.selection.lists import KeptLists, Renewed
from kvloom.kernels.interface import Kernels, Rows

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


Bools = npt.NDArray[np.bool_]


class Schedule(NamedTuple):
    """Due lengths: layer l at every N with (N + phase[l]) % stride == 0; the same for comparing queries."""

    stride: int
    """0: never."""
    check_every: int
    """0: never."""
    phase: npt.NDArray[np.int64]
    """[layers]"""
    check_phase: npt.NDArray[np.int64]

    @classmethod
    def of(cls, stride: int, check_every: int, layers: int, *, stagger: bool) -> Schedule:
        """Spread the layers evenly over a stride, so that every step has the same share of due ones."""
        order = np.arange(layers) if stagger else np.zeros(layers, np.int64)
        return cls(stride, check_every, order * max(1, stride) // layers, order * max(1, check_every) // layers)

    def due(self, stops: Ints) -> Ints:
        """[layers, len(stops)]: 1 where the stride makes a layer refresh at these lengths, 2 where queries are compared."""
        checks = _multiples(stops, self.check_phase, self.check_every)
        return np.where(_multiples(stops, self.phase, self.stride), 1, np.where(checks, 2, 0)).astype(np.int32)


def _multiples(stops: Ints, phase: npt.NDArray[np.int64], every: int) -> Bools:
    if every == 0:
        return np.zeros((len(phase), len(stops)), np.bool_)
    found: Bools = (stops[None, :] + phase[:, None]) % every == 0
    return found


class RecycledStep:
    """Decode rows, one per request."""

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal)
        self._due = [batch.column(f"due {layer}", due) for layer, due in enumerate(method.schedule.due(batch.stops))]
        """By layer, each at a place that does not depend on how many rows there are."""
        self._span = batch.span("candidates", method.sinks, batch.stops - method.recent)
        self._width = self._span.width + method.sinks + method.recent
        batch.reserve(self._width)
        self.program = self._span.width

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        method, batch, rows, span = self._method, self._batch, self._rows, self._span
        words = rows.renew(layer, self._due[layer.layer])
        if method.emits:
            logits = batch.logits(layer.q, self._width)
            batch.attend(layer, rows.plans, out, positions=words, logits=logits, heads=heads, lse=lse)
            first, last = span.first, span.last
        else:
            logits = batch.score(layer, span, active=rows.active)
            first, last = span.zeros, span.columns
        ranking = batch.rank(logits, first, last, layer.heads, how="max", window=method.options.pool, active=rows.active)
        method.lists.select(batch, words, ranking, span, rows.active)
        if not method.emits:
            batch.attend(layer, rows.plans, out, positions=words, heads=heads, lse=lse)

    def finish(self) -> Counting:
        """See `RowsInStep`."""
        return self._rows.finish(refreshes=True)


class Seeding:
    """Prompts' last chunks: dense, and looked at. A pass that verifies drafts goes by unused."""

    program = None

    def __init__(self, method: Recycled, batch: Batch) -> None:
        self._method, self._batch = method, batch
        run = np.repeat(np.arange(len(batch.counts)), batch.counts)
        first = np.cumsum(batch.counts) - batch.counts
        stop = batch.begins[run] + np.arange(batch.rows) - first[run] + 1
        table, stops = batch.tensor("row table", batch.of[run]), batch.tensor("row stop", stop)
        self._plans = batch.plan("seeding", Rows(batch.tables, table, torch.zeros_like(stops), stops))
        self._seeds = [
            _Seed(method, batch, i, int(end))
            for i, (request, end) in enumerate(zip(batch.requests, np.cumsum(batch.counts)))
            if not request.verifying and batch.stops[i] > method.budget
        ]

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        self._batch.attend(layer, self._plans, out, heads=heads, lse=lse)
        for seed in self._seeds:
            seed.make(layer)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._batch.stats.selections += len(self._seeds) * self._batch.geometry.own_layers


class _Seed:
    """One prompt's lists: the sum of its last rows' rankings. Each row scores what it sees itself."""

    def __init__(self, method: Recycled, batch: Batch, run: int, end: int) -> None:
        """run: of the batch, whose last row is end - 1."""
        self._method, self._batch = method, batch
        rows, stop = min(method.options.seed_rows, int(batch.counts[run])), int(batch.stops[run])
        self._rows = slice(end - rows, end)
        last = np.clip(np.arange(stop - rows, stop) + 1, method.sinks, stop - method.recent).astype(np.int32)
        self._columns = (last - method.sinks).tolist()
        table = batch.tensor(f"seed table {run}", np.full(rows, batch.of[run]))
        self._span = span = batch.spans(f"seed {run}", table, np.full(rows, method.sinks, np.int32), last)
        self._last = replace(span, first=span.first[-1:], columns=span.columns[-1:])
        self._kept = Renewed(_alone(batch, run), method.lists, method.renewal)
        self._due = batch.tensor("seed due", [1])

    def make(self, layer: Layer) -> None:
        """The list of a layer."""
        method, batch = self._method, self._batch
        own = layer._replace(q=layer.q[self._rows])
        span = self._span
        ranking = batch.rank(
            batch.score(own, span), span.zeros, span.columns, layer.heads, how="max", window=method.options.pool
        )
        votes = ranking[-1:]  # the last row sees the most
        for row, columns in enumerate(self._columns[:-1]):
            votes[0, :, :columns] += ranking[row, :, :columns]
        words = self._kept.renew(own._replace(q=own.q[-1:]), self._due)
        method.lists.select(batch, words, votes, self._last, self._kept.active)


def _alone(batch: Batch, run: int) -> Batch:
    """The last row of a run as a batch of its own."""
    one = slice(run, run + 1)
    return replace(
        batch,
        requests=batch.requests[run : run + 1],
        counts=np.ones(1, np.int32),
        begins=batch.stops[one] - np.int32(1),
        of=batch.of[one],
        read=batch.read[:1],
        name=f"{batch.name} run {run}",
    )
