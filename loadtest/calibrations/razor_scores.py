"""Induction and echo scores of every head, from prompts of repeated random tokens (RazorAttention, arXiv 2407.15891).

    [BOS]  t0 t1 ... t(L-1)  t0 t1 ... t(L-1)  ...           L random tokens, several times over
                                 i                            a row of a later copy, i >= L
              j  j+1                                          j = i - L, i - 2L, ...: the earlier copies of token i

    echo      = mean over rows i of  sum over j of A[i, j]          looks at earlier copies of its own token
    induction = mean over rows i of  sum over j of A[i, j + 1]      looks at what followed them, which is what comes next

A is the softmax attention of one query head, as the engine computes it: after RoPE, over everything a row may see. No map is
ever held: attention gives its log-sum-exp beside the output, and A[i, j] = exp(scale q_i . k_j - lse_i) is worked out for
these positions alone, chunk by chunk of the prompt. As many as `repeats - 1` products per row and score, and no more memory
than a chunk's queries.

Where the ids suffice, tokens are drawn without replacement: then the earlier copies of a token are where they are counted and
nowhere else. (The paper only says random.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvloom.engine.cache import BlockTable
from kvloom.engine.calibration.razor import HeadClasses, Scores
from kvloom.engine.errors import ConfigError
from kvloom.engine.llm import LLM
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.requests.traits import Layer, Record
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection.batch import Batch
from kvloom.engine.selection.geometry import Geometry
from kvloom.kernels.interface import PagedKV, Rows

_CHUNK = 256

PAPER_TOKENS = 2500
PAPER_IDS = range(10_000, 12_500)
CONTEXT_SHARE = 3
"""A pattern fills a third of the context if nobody says otherwise, as the paper's does at 32768 positions. Near the end of what
a small model was trained for it stops copying, and seeds no longer agree on the heads that do it."""


class Pattern(NamedTuple):
    """Random tokens, several times over."""

    tokens: int
    """L: random tokens of one copy."""
    repeats: int
    """Copies of them."""
    ids: range
    """Where they are drawn from."""
    bos: int | None
    """What stands in front, once."""

    @classmethod
    def fitting(
        cls, longest: int, vocab: int, bos: int | None, tokens: int | None = None, repeats: int = 4, ids: range | None = None
    ) -> Pattern:
        """The paper's pattern (2500 tokens of ids 10000 to 12499, four times), shortened to a third of `longest` positions.

        A vocabulary that is smaller gives the upper half of its ids. Raises ConfigError if what was asked for does not fit.
        """
        if repeats < 2:
            raise ConfigError(f"repeats is {repeats}; allowed: 2 or more, as scores are of earlier copies")
        most = (longest - 1) // repeats
        if tokens is None:
            tokens = max(2, min(PAPER_TOKENS, longest // (CONTEXT_SHARE * repeats)))
            tokens -= tokens % 100 if tokens >= 100 else 0
        if not 2 <= tokens <= most:
            raise ConfigError(
                f"tokens is {tokens}; allowed for {repeats} repeats in a context of {longest} positions: 2 to {most}"
            )
        if ids is None:
            ids = PAPER_IDS if vocab >= PAPER_IDS.stop else range(vocab // 2, vocab)
        if not (0 <= ids.start < ids.stop <= vocab and ids.step == 1):
            raise ConfigError(f"ids are {ids.start}:{ids.stop}; allowed: a range inside 0:{vocab}, its end not included")
        return cls(tokens, repeats, ids, bos)

    @property
    def offset(self) -> int:
        """Position of the first random token."""
        return 0 if self.bos is None else 1

    @property
    def length(self) -> int:
        return self.offset + self.tokens * self.repeats

    @property
    def scored(self) -> int:
        """Rows that have an earlier copy."""
        return self.tokens * (self.repeats - 1)

    def prompt(self, seed: int) -> list[int]:
        rng = random.Random(seed)
        draw = rng.sample if self.tokens <= len(self.ids) else rng.choices
        copy = draw(self.ids, k=self.tokens)
        return ([] if self.bos is None else [self.bos]) + copy * self.repeats


class HeadScores(NamedTuple):
    """Of every query head, each [layers, q_heads] fp64, in [0, 1] up to the rounding of attention."""

    induction: Tensor
    echo: Tensor

    def of_kv_heads(self, kv_heads: int) -> tuple[Scores, Scores]:
        """(induction, echo) of KV heads: the best query head's of each group. A group is kept whole or not at all."""
        induction, echo = (score.unflatten(1, (kv_heads, -1)).amax(-1).tolist() for score in self)
        return tuple(map(tuple, induction)), tuple(map(tuple, echo))


def mean_scores(scores: Sequence[HeadScores]) -> HeadScores:
    """Mean over seeds."""
    return HeadScores(*(torch.stack(part).mean(0) for part in zip(*scores)))


def overlaps(classes: Sequence[HeadClasses]) -> list[float]:
    """Jaccard overlap (common heads / heads of either) of every pair of head sets."""
    sets = [set(found.heads) for found in classes]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]


def measure(llm: LLM, pattern: Pattern, seed: int, progress: Callable[[int, int], None] | None = None) -> HeadScores:
    """Run one prompt through the engine, beside its queue, on blocks of its own, and score every head.

    progress: told of positions done and in all. Raises ConfigError if the KV cache cannot hold the prompt.
    """
    core = llm.core
    prompt, cache = pattern.prompt(seed), core.cache
    if cache.blocks_for(len(prompt)) > cache.pool.available:
        raise ConfigError(f"the pattern has {len(prompt)} tokens; the KV cache holds {cache.capacity_tokens}; raise kv_memory")
    probe = ScoreProbe(core.runner.geometry, pattern)
    table = cache.open(core.domain("", ""), publishes=False, looks_up=False)
    try:
        cache.reserve(table, len(prompt))
        request = Request(id="razor", prompt=prompt, sampling=SamplingParams(), tokens=prompt, selector=probe)
        for start in range(0, len(prompt), _CHUNK):
            _step(llm, request, table, start)
            if progress is not None:
                progress(min(start + _CHUNK, len(prompt)), len(prompt))
    finally:
        cache.close(table)
    return probe.scores()


def _step(llm: LLM, request: Request, table: BlockTable, start: int) -> None:
    count = min(_CHUNK, len(request.tokens) - start)
    llm.core.runner.run(StepPlan([Chunk(request, table, start, count)], []))


class ScoreProbe:
    """A selector for one prompt: dense attention, and what its weights at the pattern's positions add up to."""

    budget, grid, tail, dense_until = 0, 0, 0, 0
    levels: tuple[int, ...] = ()
    records: tuple[Record, ...] = ()
    emits = False
    prompts: Literal["dense", "seed", "sparse"] = "sparse"
    domain = ""

    def __init__(self, geometry: Geometry, pattern: Pattern) -> None:
        self.stats = MethodStats()
        self.pattern = pattern
        shape = (geometry.layers, geometry.q_heads)
        self.induction, self.echo = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        """[layers, q_heads]: sums over rows."""

    def decode(self, batch: Batch) -> _ScoreStep:
        raise AssertionError("there is only a prompt")

    def prefill(self, batch: Batch) -> _ScoreStep:
        return _ScoreStep(self, batch)

    def scores(self) -> HeadScores:
        """Means over the rows that have an earlier copy."""
        return HeadScores(self.induction / self.pattern.scored, self.echo / self.pattern.scored)


class _ScoreStep:
    """One chunk of the prompt: everything is seen."""

    program = None

    def __init__(self, probe: ScoreProbe, batch: Batch) -> None:
        assert len(batch.counts) == 1, "one chunk of one prompt"
        self._probe, self._batch = probe, batch
        geometry, rows = batch.geometry, batch.rows
        self._first = int(batch.begins[0])
        stops = torch.arange(self._first + 1, self._first + rows + 1, dtype=torch.int32)
        table = torch.full((rows,), int(batch.of[0]), dtype=torch.int32)
        self._plans = batch.plan("razor", Rows(batch.tables, table, torch.zeros(rows, dtype=torch.int32), stops))
        self._blocks = batch.tables[int(batch.of[0])].long()
        self._lse = batch.scratch.take("razor lse", rows, geometry.q_heads)

    def attend(self, layer: Layer, out: Tensor, heads: Tensor | None = None, lse: Tensor | None = None) -> None:
        """Attend densely, then add up the weights of this chunk's rows at the pattern's positions."""
        batch, pattern = self._batch, self._probe.pattern
        batch.attend(layer, self._plans, out, heads=heads, lse=self._lse)
        q, last = layer.q.float(), self._first + batch.rows
        for back in range(pattern.tokens, pattern.tokens * pattern.repeats, pattern.tokens):
            first = max(self._first, pattern.offset + back)  # the first row with a copy so far back
            if first < last:
                self._add(layer, q, first, last, back)

    def finish(self) -> None:
        """Nothing is chosen."""

    def _add(self, layer: Layer, q: Tensor, first: int, last: int, back: int) -> None:
        """Of rows at positions [first, last): their weights at `back` positions before them, and one after that."""
        geometry, own = self._batch.geometry, slice(first - self._first, last - self._first)
        keys = self._keys(layer.kv, first - back, last - back + 1)
        q = q[own].unflatten(1, (geometry.kv_heads, -1))
        lse = self._lse[own].unflatten(1, (geometry.kv_heads, -1))
        for sums, k in ((self._probe.echo, keys[:-1]), (self._probe.induction, keys[1:])):
            weights = (torch.einsum("rhgd,rhd->rhg", q, k) * geometry.scale - lse).exp()
            sums[layer.layer] += weights.double().sum(0).flatten()

    def _keys(self, kv: PagedKV, first: int, last: int) -> Tensor:
        """[last - first, kv_heads, head_dim] fp32: keys of these positions."""
        positions, size = torch.arange(first, last), kv.k.shape[2]
        return kv.k[self._blocks[positions // size], :, positions % size].float()
