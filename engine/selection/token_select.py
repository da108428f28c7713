"""TokenSelect (arXiv 2411.02886 v4, EMNLP 2025): the tokens that the heads of a layer vote for, one list per layer.

In the paper's words and symbols, with N tokens known, H query heads and h the KV head that query head h reads:

    criticality (Eq. 7)      vote[n] = sum_h softmax_n(Q_h . K_h[n]) over the candidates n in [n_init, N - n_local): the "soft
                             vote". The product is not divided by sqrt(d), which sharpens the vote (option `vote`)
    selection                [0, n_init)  +  TopK(vote, k)  +  [N - n_local, N), one list for all heads of the layer
    Selection Cache (Alg. 1) a layer keeps the query C_Q, all heads in one vector, and the list C_I of its last selection. While
                             cos(Q, C_Q) >= theta the list is used again; C_Q is not updated by that, so drift adds up
    prompts                  chunks of c queries share a list, chosen by the mean of their rotated queries

    decode row     [0, n_init) + k best     then    [N_sel - n_local, N)         N_sel: N at the last selection
    prompt cell    [0, n_init) + k best     then    [begin + 1 - n_local, p]     for every row p of [begin, begin + c)

A row with N <= n_init + k + n_local sees everything; so does a prompt cell whose first row does.

Where we depart from the paper or its release, and why:

- Prompts are dense unless `prefill_budget` says otherwise: their KV is then exact, and shared with all other requests.
- Tokens that leave the local window between two selections stay visible until the next one (the tail begins at
  N_sel - n_local). The paper drops them: they are in no set. `max_gap` bounds how many there may be.
- The cosine compares queries turned back to position 0 (the paper does not say, its release has the cache switched off): a
  few more tokens use a list again, at the same divergence from dense.
- Query head i votes with KV head i // g, as in attention. The release pairs i mod Hkv, which no such model does.
- Votes are summed in fp32, and ties go to the lower position; in the release bf16 makes ties common.
- Cells lie on an absolute grid of c positions, so a list depends neither on the scheduler's chunks nor on a prefix hit, and
  a row always has n_local neighbours: the release lets the first row of a chunk see none.
- Keys keep their true positions by default. "reindexed" gives them those of the release (`token_select_positions`).
- The vote may be max-pooled over neighbours (`pool`); the release does so for some data sets without saying.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.bounds import MOST_TOKENS, POOLS, bounded
from kvloom.engine.client import MethodStats
from kvloom.engine.device import upload
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.selection.base import EVERYWHERE, Counting, RowsInStep, check_fields, refuse
from kvloom.engine.selection.batch import Batch, Ints, Plans
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.selection.lists import KeptLists, Renewed
from kvloom.engine.selection.token_select_positions import Reindexed, TurnBack, neutral_query, neutral_scores
from kvloom.kernels.interface import Kernels, Lists, Rows

MOST_LOCAL = 512
"""n_local of the paper: what large budgets get by default."""

MOST_BLOCK = 256
"""Tokens of the largest block."""


@dataclass(frozen=True, slots=True)
class TokenSelectOptions:
    """Options of token_select."""

    sinks: int | None = bounded(None, 0, MOST_TOKENS)
    """n_init: first tokens that are always read; by default 4, or an eighth of a small budget."""
    local: int | None = bounded(None, 1, MOST_TOKENS)
    """n_local: last tokens that are always read, at least 1; by default an eighth of the budget, at most 512."""
    vote: Literal["unscaled", "scaled"] = "unscaled"
    """Whether the products in the vote are divided by sqrt(head_dim), as attention's are; the paper does not."""
    pool: int = bounded(1, POOLS)
    """Votes are max-pooled over this many neighbours, odd; 1 for none."""
    theta: float = bounded(0.9, -1, 2)
    """Selection Cache: a list is used again while the query's cosine with that of its selection is at least this; above 1, up
    to 2: never, -1 always."""
    max_gap: int | None = bounded(128, 1, MOST_TOKENS)
    """A list is made anew after this many tokens even so, which bounds what a row reads; null for no bound."""
    prefill_budget: int | None = bounded(None, 0, MOST_TOKENS)
    """Positions that a row of the prompt reads, the rows of its own chunk before it beside that; null or 0: all."""
    chunk: int = bounded(512, 1, MOST_TOKENS)
    """c: rows of the prompt that share a list."""
    positions: Literal["true", "reindexed"] = "true"
    """Positions of keys in attention: their own, or their place among those that are read, which never leaves the trained
    length: with prefill_budget, prompts may be longer than that."""

    def __post_init__(self) -> None:
        check_fields(self, "token_select")


class Split(NamedTuple):
    """How a budget is spent."""

    sinks: int
    """n_init"""
    chosen: int
    """k"""
    local: int
    """n_local"""

    @property
    def budget(self) -> int:
        return sum(self)

    @property
    def width(self) -> int:
        """Entries of a list: sinks and chosen positions."""
        return self.sinks + self.chosen

    @classmethod
    def of(cls, budget: int, options: TokenSelectOptions, name: str) -> Split:
        """Raises InvalidRequestError if sinks and local leave nothing to choose of the budget that `name` says."""
        sinks = min(4, budget // 8) if options.sinks is None else options.sinks
        local = min(MOST_LOCAL, max(1, budget // 8)) if options.local is None else options.local
        if sinks + local >= budget:
            raise InvalidRequestError(
                f"kv.token_select.sinks and local are {sinks} and {local}, which leaves nothing to select of a {name} of "
                f"{budget}; make them smaller, or the {name} larger",
                param="kv.token_select.local" if options.local is not None else f"kv.{name}",
            )
        return cls(sinks, budget - sinks - local, local)


class TokenSelect:
    """`Selector`: a list per layer, voted for by all query heads, kept while the query stays alike."""

    tail = 0
    levels: tuple[int, ...] = ()
    emits = False
    prompts: Literal["dense", "seed", "sparse"]

    def __init__(self, options: TokenSelectOptions, budget: int, geometry: Geometry, kernels: Kernels) -> None:
        self.options, self.budget, self.geometry = options, budget, geometry
        if options.prefill_budget is not None and options.prefill_budget > geometry.max_len:
            allowed = f"0 to {geometry.max_len}, this server's context, or null"
            raise refuse("token_select", "prefill_budget", options.prefill_budget, allowed)
        self.split = Split.of(budget, options, "budget")
        self.prompt = (
            Split.of(options.prefill_budget, options, "token_select.prefill_budget") if options.prefill_budget else None
        )
        self.reindexed = options.positions == "reindexed"
        self.prompts = "sparse" if self.prompt else "dense"
        self.grid = options.chunk if self.prompt else 0
        self.dense_until = -(-self.prompt.budget // self.grid) * self.grid if self.prompt else EVERYWHERE
        self.domain = self._domain()
        self.extrapolates = self.reindexed and self.prompt is not None
        self.whole = (
            "others read at true positions, so that re-indexed ones go nowhere; leave positions out" if self.reindexed else ""
        )
        self.max_gap = self._max_gap()
        self.scale = geometry.scale if options.vote == "scaled" else 1.0
        compares = -1.0 < options.theta <= 1.0
        self.due = 2 if compares else 1 if options.theta > 1.0 else 0
        """Whether queries are compared; else lists are always made anew, or never."""
        voters = [geometry.group * len(heads) for heads in geometry.heads]
        kept = [compares * geometry.head_dim * heads for heads in voters]
        self.lists = KeptLists([min(1, heads) for heads in voters], self.split.width, self.split.sinks, kept)
        self.records: tuple[Record, ...] = (self.lists,)
        self.renewal = self.lists.renewal(
            recent=self.split.local,
            most=self.max_gap,
            compare="flat" if compares else "none",
            threshold=options.theta,
        )
        self.stats = MethodStats()

    def decode(self, batch: Batch) -> RowsInStep:
        return ReindexedStep(self, batch) if self.reindexed else DecodeStep(self, batch)

    def prefill(self, batch: Batch) -> PromptStep:
        return PromptStep(self, batch)

    def turn_back(self) -> TurnBack:
        """Over every position there can be, made when first wanted."""
        return _turn_back(self.geometry.max_len + MOST_BLOCK, self.geometry.inv_freq)  # the last block may reach beyond

    def _domain(self) -> str:
        """Everything that the KV of a sparse prompt depends on."""
        if self.prompt is None:
            return ""
        options = self.options
        return "token_select " + " ".join(
            map(str, (*self.prompt, options.chunk, options.vote, options.pool, options.positions))
        )

    def _max_gap(self) -> int:
        """Tokens after which a list is made anew. Re-indexed positions never leave the trained length.

        Raises InvalidRequestError if they would.
        """
        gap = np.iinfo(np.int32).max if self.options.max_gap is None else self.options.max_gap
        if not self.reindexed:
            return int(gap)
        trained, options = self.geometry.trained_len, self.options
        if self.budget >= trained:
            raise refuse("token_select", "budget", self.budget, f"less than {trained}, the model's trained length")
        if self.prompt is not None and self.prompt.budget + options.chunk > trained:
            raise InvalidRequestError(
                f"kv.token_select.prefill_budget and chunk are {self.prompt.budget} and {options.chunk}; with re-indexed "
                f"positions together at most {trained}, the model's trained length",
                param="kv.token_select.prefill_budget",
            )
        return min(int(gap), trained - self.budget)


@functools.lru_cache(1)
def _turn_back(length: int, inv_freq: Tensor) -> TurnBack:
    """One for all selectors of an engine: it takes as much memory as half a layer's KV of the longest sequence."""
    return TurnBack(np.arange(length, dtype=np.int32), inv_freq)


MOST_LOGITS = 1 << 22
"""Scores that are made at once: a prompt of small cells has many queries, and work space is kept."""


class DecodeStep:
    """Decode rows, one per request."""

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal, _angles(batch), shared=True)
        self._due = batch.tensor("due", np.full(batch.rows, method.due))
        self._span = batch.span("candidates", method.split.sinks, batch.stops - method.split.local)
        self.program = self._span.width

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        method, batch, rows, span = self._method, self._batch, self._rows, self._span
        words = rows.renew(layer, self._due)
        logits = batch.score(layer, span, method.scale, rows.active)
        ranking = batch.rank(logits, span.zeros, span.columns, 1, how="sum", window=method.options.pool, active=rows.active)
        method.lists.select(batch, words, ranking, span, rows.active)
        batch.attend(layer, rows.plans, out, positions=words, heads=heads, lse=lse)

    def finish(self) -> Counting:
        """See `RowsInStep`."""
        return self._rows.finish()


class ReindexedStep:
    """The same with re-indexed positions: chooses by scores of turned keys, and attends to turned copies of what it chose.

    Copies are cut to what a step reads, so their shapes depend on which rows renew: the host asks for that in every layer.
    """

    program = None

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        self._method, self._batch = method, batch
        self._rows = Renewed(batch, method.lists, method.renewal, _angles(batch), shared=True)
        self._due = batch.tensor("due", np.full(batch.rows, method.due))
        self._reindexed: Reindexed | None = None

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        assert heads is None, "re-indexed positions are for all heads of a layer"
        method, batch, rows = self._method, self._batch, self._rows
        words = rows.renew(layer, self._due)
        runs = len(batch.stops)  # and no padding
        at = method.lists.offsets(rows.at[:runs], 1)[:, 0].long()
        places = at[:, None] + torch.arange(method.split.width, device=at.device)
        lists = words[places]
        misses = (rows.active[:runs] >= 0).nonzero()[:, 0]
        if len(misses):
            which = misses.cpu().numpy()
            lists[misses] = vote(method, batch, method.split, layer._replace(q=layer.q[misses]), batch.of[which],
                                 batch.stops[which] - 1)  # fmt: skip
            words[places[misses]] = lists[misses]
        starts = rows.start[:runs].cpu().numpy()
        if self._reindexed is None or not np.array_equal(self._reindexed.starts, starts):
            self._reindexed = Reindexed(batch, np.arange(runs), starts, method.split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, lists, out, batch.read[:runs])

    def finish(self) -> Counting:
        """See `RowsInStep`."""
        return self._rows.finish()


class PromptStep:
    """Sparse prompts, a run per cell. Cells that begin within the budget see everything."""

    program = None

    def __init__(self, method: TokenSelect, batch: Batch) -> None:
        assert method.prompt is not None, "prompts are dense"
        self._method, self._batch, self._split = method, batch, method.prompt
        sparse = batch.begins >= self._split.budget
        (self._runs,) = sparse.nonzero()
        self._first_rows = np.cumsum(batch.counts) - batch.counts
        self._begins = batch.begins[self._runs]
        self._starts = self._begins + np.int32(1 - self._split.local)
        if method.reindexed:  # rows of sparse cells see only their own cell at first, and are written anew
            start, lengths = np.where(sparse, batch.begins, 0), np.zeros_like(batch.begins)
        else:
            start = np.where(sparse, batch.begins + np.int32(1 - self._split.local), 0)
            lengths = np.where(sparse, np.int32(self._split.width), 0)
        self._lists = batch.ints("prompt lists", len(batch.counts), self._split.width)
        self._which = upload(self._runs, batch.geometry.device)
        self._counts = upload(batch.counts, batch.geometry.device)
        self._reindexed: Reindexed | None = None
        self._plans = self._planned(start, lengths)

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """See `RowsInStep`."""
        batch = self._batch
        lists = None
        if len(self._runs):
            means = layer._replace(q=self._means(layer.q))
            lists = vote(self._method, batch, self._split, means, batch.of[self._runs], self._begins)
            self._lists[self._which] = lists
        batch.attend(layer, self._plans, out, heads=heads, lse=lse)
        if lists is None or not self._method.reindexed:
            return
        if self._reindexed is None:
            self._reindexed = Reindexed(batch, self._runs, self._starts, self._split.width, layer.kv.k.shape[2])
        self._reindexed.attend(layer, lists, out)

    def finish(self) -> None:
        """See `RowsInStep`."""
        self._batch.stats.selections += len(self._runs) * self._batch.geometry.own_layers

    def _planned(self, start: Ints, lengths: Ints) -> Plans:
        """Rows of a run share its list and start. start, lengths: [runs]."""
        batch, width = self._batch, self._split.width
        run = np.repeat(np.arange(len(batch.counts)), batch.counts)
        stop = batch.begins[run] + np.arange(batch.rows) - self._first_rows[run] + 1
        table, starts, stops, offsets, counts = (
            batch.tensor(f"rows' {name}", values)
            for name, values in (("table", batch.of[run]), ("start", start[run]), ("stop", stop),
                                 ("offsets", run[:, None] * width), ("lengths", lengths[run][:, None]))
        )  # fmt: skip
        return batch.plan("prompt", Rows(batch.tables, table, starts, stops, Lists(self._lists.flatten(), offsets, counts)))

    def _means(self, q: Tensor) -> Tensor:
        """Mean queries of the sparse cells: [sparse runs, q_heads, head_dim] in the model's dtype."""
        sums = torch.segment_reduce(q.float().flatten(1), "sum", lengths=self._counts, unsafe=True)[self._which]
        return (sums / self._counts[self._which, None]).to(q.dtype).view(-1, *q.shape[1:])


def _angles(batch: Batch) -> tuple[Tensor, Tensor]:
    """cos, sin [rows, rotary/2] fp32 of decode rows' positions."""
    turns = (batch.stop.double() - 1.0)[:, None] * batch.geometry.inv_freq.double()
    return batch.floats("cos", turns.cos()), batch.floats("sin", turns.sin())


def vote(method: TokenSelect, batch: Batch, split: Split, layer: Layer, of: Ints, positions: Ints) -> Tensor:
    """Sinks and the k candidates with most votes (Eq. 7): [queries, width] int32 (scratch), ascending.

    layer.q: [queries, q_heads, head_dim], each at its position p: candidates are [n_init, p + 1 - n_local), more than k of
    them. of: [queries] rows of `tables`.
    """
    lists = batch.ints("votes", len(of), split.width)
    lists[:, : split.sinks] = torch.arange(split.sinks, dtype=torch.int32, device=lists.device)
    at_once = max(1, MOST_LOGITS // (layer.q.shape[1] * max(1, int(positions.max(initial=0)))))
    for first in range(0, len(of), at_once):
        part = slice(first, first + at_once)
        _vote(method, batch, split, layer._replace(q=layer.q[part]), of[part], positions[part], lists[part, split.sinks :])
    return lists


def _vote(method: TokenSelect, batch: Batch, split: Split, layer: Layer, of: Ints, positions: Ints, chosen: Tensor) -> None:
    """The same for as many queries as there is work space for. chosen: [queries, k], written."""
    first, last = np.full(len(of), split.sinks, np.int32), positions + np.int32(1 - split.local)
    if method.reindexed:
        q = neutral_query(batch, layer.q, positions, split.local)
        logits = neutral_scores(batch, method.turn_back(), q, layer.kv, of, first, last, method.scale)
        begin, columns = (upload(values, layer.q.device) for values in (first, last - first))
        zeros = torch.zeros_like(begin)
    else:
        span = batch.spans("votes", batch.tensor("votes of", of), first, last)
        logits = batch.score(layer, span, method.scale)
        begin, columns, zeros = span.first, span.columns, span.zeros
    ranking = batch.rank(logits, zeros, columns, 1, how="sum", window=method.options.pool)
    batch.kernels.select(ranking[:, 0], columns, split.chosen, offset=begin, out=(chosen, None))
