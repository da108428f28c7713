"""After how many uses reuse has paid for what it took to have something to reuse.

    context     the donor's prompt was computed for its own sake; what reuse adds is copying its KV out
    isolated    every document is computed once more, alone, and copied out

Times to the first token of all uses so far, beside the same with full passes; production is charged in front.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvloom.engine import LLM
from kvloom.engine.request import KVOptions, Request, SamplingParams
from kvloom.loadtest.quality.reuse_prompts import Case
from kvloom.loadtest.quality.reuse_runs import Times, donate, race
from kvloom.loadtest.study.results import Column, Row

COLUMNS = (
    Column("donors", "donors"),
    Column("uses", "uses"),
    Column("production ms", "production_ms", ".1f"),
    Column("full passes, ms in all", "exact_ms", ".0f"),
    Column("KVShare with production, ms in all", "share_ms", ".0f"),
    Column("of full", "cost_share", ".2f"),
    Column("has paid", "paid"),
)
IDENTITY = ("model", "dtype", "weights", "donors", "uses", "policy", "ratio", "boundary", "documents", "document_len", "sets",
            "seed", "kvshare_options", "corpus")  # fmt: skip


class Charged(NamedTuple):
    """One case."""

    production: float
    """Seconds."""
    times: Times
    """Of its uses, in order."""


def charge(llm: LLM, case: Case, kind: str, options: Mapping[str, Any]) -> Charged:
    """Produce donors and use them, once by every use of the case, with and without reuse in turns."""
    production, times = produce(llm, case, kind), Times([], [])
    for use in case.uses:
        race(llm, use, options, 1, times)
    return Charged(production, times)


def produce(llm: LLM, case: Case, kind: str) -> float:
    """As `donate`; returns the seconds that nobody would have spent without reuse."""
    if kind == "isolated":
        llm.core.purge("")
        began = time.perf_counter()
        donate(llm, case, kind)
        return time.perf_counter() - began
    core = llm.core
    core.purge("")
    core.cache.evict()
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    request = Request(id="donor", prompt=case.donor, sampling=sampling, kv=KVOptions(reuse="approx"), arrival=time.monotonic())
    core.add(request)
    try:
        while request.generated == 0:
            core.step()
        assert core.share is not None
        began = time.perf_counter()
        core.share.between_steps()  # what the next step would do first: copy out
        return time.perf_counter() - began
    finally:
        core.abort(request.id)


def cumulative(found: Sequence[Charged]) -> list[Row]:
    """A row for every number of uses: medians over cases of the sums up to there."""
    production = [one.production for one in found]
    exact, share = (np.cumsum([getattr(one.times, name) for one in found], axis=1) for name in ("exact", "approximate"))
    rows = []
    for uses in range(1, exact.shape[1] + 1):
        full, reusing = np.median(exact[:, uses - 1]), np.median(share[:, uses - 1] + production)
        rows.append({
            "uses": uses, "production_ms": float(np.median(production)) * 1e3, "exact_ms": float(full) * 1e3,
            "share_ms": float(reusing) * 1e3, "cost_share": float(reusing / full), "paid": "yes" if reusing < full else "no",
        })  # fmt: skip
    return rows
