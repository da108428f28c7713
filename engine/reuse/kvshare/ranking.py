"""Which reused tokens are computed: boundaries first, then the top of a ranking, within one budget.

    policy     score of a reused token
    focus      deviation x sqrt(attention), all layers    ours: the root keeps a few loud tokens from taking the whole budget
    dhd        deviation x attention     the paper: what has changed counts where it is looked at (arXiv 2503.16525, DHD)
    blend      deviation                 CacheBlend (arXiv 2405.16444)
    query      attention, all layers     ProphetKV (arXiv 2602.02579): what the question looks at
    boundary   the first of every run    LegoLink (arXiv 2410.15332): a run's head has become a false attention sink
    random                               a control

The budget is `ratio` of the reused tokens, and all policies spend the same: so figures at one ratio cost the same. Sets are
nested: what is computed at a ratio is computed at every larger one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvloom.engine.reuse.kvshare.matching import Run
from kvloom.engine.reuse.kvshare.options import RATIOS, RepairOptions
from kvloom.engine.reuse.kvshare.repair import Floats, Ints, Repair

UNCOVERED = 0.3
"""Score mass that the adaptive ratio may leave stale."""


def choose(
    options: RepairOptions,
    runs: Sequence[Run],
    prefix: int,
    length: int,
    score: Floats,
    *,
    rejected: Sequence[bool] = (),
    deviation: Sequence[float] = (),
) -> Repair:
    """Divide positions [prefix, length) into rows to compute and stale ones.

    runs: ascending, disjoint, inside [prefix, length - 1); score: of every position of the runs, in order;
    rejected: of every run, whether all of it is computed.
    """
    keep = [not no for no in rejected] or [True] * len(runs)
    lengths = np.array([run.length for run in runs], np.int64)
    within = np.concatenate([np.arange(n) for n in lengths])
    of_run = np.repeat(np.arange(len(runs)), lengths)
    usable = np.array(keep)[of_run]
    reused = np.concatenate([np.arange(run.start, run.stop) for run in runs])[usable]
    within, of_run, score = within[usable], of_run[usable], score[usable]
    kept = np.where(keep, lengths, 0)
    budget = _budget(options, len(reused), length, score)
    heads = _boundaries(kept, budget, budget if options.policy == "boundary" else options.boundary)
    at_boundary = within < heads[of_run]
    ranked = _top(score, ~at_boundary, budget - int(heads.sum()))
    stale = ~at_boundary & ~ranked
    rows = np.ones(length, bool)
    rows[:prefix] = False
    rows[reused[stale]] = False
    kinds = Counter(
        prefix=prefix,
        stale=int(stale.sum()),
        boundary=int(heads.sum()),
        ranked=int(ranked.sum()),
        rejected=int(lengths.sum() - kept.sum()),
        fresh=length - prefix - int(lengths.sum()),
    )
    return Repair(
        options=options,
        prefix=prefix,
        length=length,
        runs=tuple(run for run, use in zip(runs, keep) if use),
        rows=np.flatnonzero(rows),
        stale=reused[stale],
        score=score[stale].astype(np.float32),
        kinds=kinds,
        deviation=tuple(deviation),
    )


def _budget(options: RepairOptions, reused: int, length: int, score: Floats) -> int:
    """Reused tokens to compute."""
    if not reused:  # every run was rejected
        return 0
    ratio = options.ratio
    if options.adaptive:
        covered = np.cumsum(np.sort(score)[::-1]) / max(float(score.sum()), 1e-30)
        ratio = next((r for r in RATIOS if r == 1 or covered[max(0, round(r * reused) - 1)] >= 1 - UNCOVERED), 1.0)
    least = reused - int(options.max_stale * length)
    return min(reused, max(round(ratio * reused), least))


def _boundaries(lengths: Ints, budget: int, most: int) -> Ints:
    """First tokens of every run that are computed: equally many, at most `most` and the run's length, `budget` in all."""
    heads = np.zeros_like(lengths)
    while budget > 0:
        open_ = np.flatnonzero(heads < np.minimum(lengths, most))
        if not len(open_):
            break
        share = max(1, budget // len(open_))
        for i in open_[: budget // share]:
            more = min(share, int(min(lengths[i], most) - heads[i]))
            heads[i] += more
            budget -= more
    return heads


def _top(score: Floats, candidates: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` candidates with the highest score, ties to the lower position."""
    chosen = np.zeros(len(score), bool)
    order = np.argsort(np.where(candidates, -score, np.inf), kind="stable")
    chosen[order[: max(0, min(count, int(candidates.sum())))]] = True
    return chosen
