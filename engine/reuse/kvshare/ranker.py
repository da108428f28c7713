"""From what was found of a prompt to the rows that are computed: copy it in, have rows looked at, check, score, choose.

refusal    is it worth while at all?
begin      copied; which rows are to be looked at depends on the policy (`ranking`)
settle     they have been: what contradicts the model goes, what deviates too far is computed, the rest is ranked
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvloom.engine.cache import Storage
from kvloom.engine.client import ShareStats
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.requests.plan import StepPlan
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.copying import copy_in, covered
from kvloom.engine.reuse.kvshare.matching import Match, Run
from kvloom.engine.reuse.kvshare.options import RepairOptions, ShareOptions
from kvloom.engine.reuse.kvshare.ranking import choose
from kvloom.engine.reuse.kvshare.repair import Floats
from kvloom.engine.reuse.kvshare.scan import Placed, Scan, Scanner
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.kernels.interface import Kernels

log = logging.getLogger("kvloom.engine")

COPY_WORK = 0.02
"""Work of copying one token in, in rows of a full pass; a first guess, measured from then on."""
TIMED_ROWS = 256
"""Rows of a step whose time tells what a row costs."""


class Candidate(NamedTuple):
    """An admitted prompt, and what was found for it."""

    match: Match
    placed: Placed
    prefix: int
    """Tokens that are exact and computed."""
    options: RepairOptions
    seed: int

    @property
    def reused(self) -> int:
        """Tokens that were found."""
        return sum(run.length for run in self.match.runs)

    @property
    def rest(self) -> int:
        """Tokens behind the prefix."""
        return len(self.placed.tokens) - self.prefix


class Ranker:
    """Decides for one engine."""

    def __init__(
        self,
        options: ShareOptions,
        store: SegmentStore,
        decoder: Decoder,
        storage: Storage,
        kernels: Kernels,
        stats: ShareStats,
    ) -> None:
        self._options, self._store, self._stats = options, store, stats
        self._storage, self._kernels, self._decoder = storage, kernels, decoder
        self._scanner = Scanner(storage, kernels, decoder.config, layer=options.check_layer)
        self._copy_work, self._row_seconds = COPY_WORK, 0.0

    def work(self, reused: int, rest: int, options: RepairOptions) -> float:
        """Rows of a full pass that a prompt takes with reuse. rest: tokens behind the prefix."""
        scan = self._scanner.work_per_row * rest if options.scans else 0.0
        return rest - reused + options.ratio * reused + self._copy_work * reused + scan

    def refusal(self, found: Candidate) -> str:
        """Why all of a prompt is computed; "" if it need not be."""
        least = self._options.min_reusable
        if found.reused < least:
            repeats = np.zeros(len(found.placed.tokens), bool)
            for start, stop, why in found.match.dropped:
                repeats[start:stop] |= why == "periodic"
            return "periodic" if found.reused + int(repeats.sum()) >= least else "too little to reuse"
        enough = self.work(found.reused, found.rest, found.options) <= (1 - self._options.min_gain) * found.rest
        return "" if enough else "too little to gain"

    def begin(self, found: Candidate) -> tuple[Scan, float]:
        """Copy what was found. Returns what is to be looked at, and the work of copying in rows of a full pass."""
        began = time.perf_counter()
        copy_in(found.match.runs, found.placed, self._storage, self._kernels, self._decoder.rotary.inv_freq)
        seconds = time.perf_counter() - began
        self._stats.copy_seconds += seconds
        self._stats.copied_tokens += found.reused
        if self._row_seconds:
            now = seconds / found.reused / self._row_seconds
            self._copy_work += 0.2 * (min(now, 1.0) - self._copy_work)
        return self._scan(found), self._copy_work * found.reused

    def settle(self, request: Request, found: Candidate, scan: Scan) -> str:
        """Set `request.repair` from what rows that were looked at have shown. Returns why not, or ""."""
        runs, options = found.match.runs, found.options
        if not scan.identity():
            self._distrust(runs)
            return "layer 0 differs"
        score, deviation = self._score(found, scan)
        rejected = [not mean <= self._options.reject_above for mean in deviation]  # NaN too
        self._judge(runs, deviation, rejected)
        length = len(found.placed.tokens)
        request.repair = choose(options, runs, found.prefix, length, score, rejected=rejected, deviation=deviation)
        return ""

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        """What a step took: what a row of a large one takes is the measure for what copying costs."""
        work, looking = plan.work, sum(chunk.work for chunk in plan.chunks if chunk.look is not None)
        self._stats.scan_seconds += seconds * looking / max(1.0, work)
        if work >= TIMED_ROWS:
            self._row_seconds += (0.2 if self._row_seconds else 1.0) * (seconds / work - self._row_seconds)

    def _scan(self, found: Candidate) -> Scan:
        """What is looked at of a prompt, by policy."""
        options, length = found.options, len(found.placed.tokens)
        positions = covered(found.match.runs)
        scan = self._scanner.scan(found.placed, positions)
        if not options.scans:
            return scan
        scan.all_rows(found.prefix)
        if options.policy != "blend":
            fresh = np.setdiff1d(np.arange(found.prefix, length), positions, assume_unique=True)  # computed in any case
            breaks = np.flatnonzero(np.diff(fresh) != 1)
            probe = fresh[breaks[-1] + 1 if len(breaks) else 0 :][-self._options.probe :]
            scan.watch(probe, None if options.policy == "dhd" else np.concatenate([np.arange(found.prefix), positions]))
        return scan

    def _score(self, found: Candidate, scan: Scan) -> tuple[Floats, list[float]]:
        """The policy's score of every reused position, and the mean relative deviation of every run if it was measured."""
        options, positions = found.options, covered(found.match.runs)
        if options.policy == "random":
            return np.random.default_rng(found.seed % 2**64).random(len(positions), np.float32), []
        if not options.scans:
            return np.ones(len(positions), np.float32), []
        moved = scan.deviation()
        bounds = np.cumsum([0, *(run.length for run in found.match.runs)])
        deviation = [float(moved.relative[a:b].mean()) for a, b in itertools.pairwise(bounds)]
        if options.policy == "blend":
            return moved.absolute, deviation
        attention = scan.attention()[positions]
        if options.policy == "query":
            return attention, deviation
        return moved.absolute * (attention if options.policy == "dhd" else np.sqrt(attention)), deviation

    def _judge(self, runs: Sequence[Run], deviation: Sequence[float], rejected: Sequence[bool]) -> None:
        """Remember what was seen of segments; those that keep being far off go."""
        for run, mean, bad in zip(runs, deviation, rejected):
            self._stats.deviation_sum += mean
            self._stats.deviation_runs += 1
            self._stats.rejected_runs += bad
            for piece in reversed(run.pieces):  # a chain's beginning is given up last
                if not run.domain.shared:  # others' segments may be far off for one prompt alone: none speaks for all
                    piece.segment.deviation += 0.3 * (mean - piece.segment.deviation)
                if bad and not run.domain.shared:
                    self._store.reject(piece.segment)
                elif not bad:
                    self._store.touch(piece.segment)

    def _distrust(self, runs: Sequence[Run]) -> None:
        """Layer 0 contradicts these segments: they do not hold what they claim to."""
        log.error("reused KV differs from the model's own at layer 0; %d runs are dropped", len(runs))
        self._stats.identity_failures += 1
        for segment in {piece.segment for run in runs for piece in run.pieces}:
            self._store.remove(segment)
