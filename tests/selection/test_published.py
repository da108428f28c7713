"""What can be found equals what a cold run computes: for every method and block size, over turns, preemption and mixed batches.

Ground truth is another engine on the same model that reads the tokens of a published block as a prompt, from nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.cache.manager import BlockTable
from kvloom.engine.requests.plan import StepPlan
from kvloom.engine.requests.request import KVOptions, Request
from tests.selection.conftest import greedy

Make = Callable[..., LLM]
Job = tuple[Sequence[int], KVOptions]
Layers = list[tuple[Tensor, Tensor]]
"""K and V of every layer: [tokens, kv_heads, head_dim]."""

SPARSE = {"prefill_budget": 40, "chunk": 16}
OFTEN_DENSE = {"refresh": "dense", "stagger": False, "stride": 3}
KINDS: dict[str, KVOptions] = {
    "dense": KVOptions(),
    "sink_window": KVOptions(selection="sink_window", budget=24),
    "token_select": KVOptions(selection="token_select", budget=24),
    "sparse prompts": KVOptions(selection="token_select", budget=200, options=SPARSE),
    "sparse prompts, small cells": KVOptions(selection="token_select", budget=24, options={"prefill_budget": 24, "chunk": 12}),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=24),
    "tidal_decode, corrected": KVOptions(selection="tidal_decode", budget=24, options={"correct_every": 5}),
    "recycled": KVOptions(selection="recycled", budget=24),
    "recycled, seeded": KVOptions(selection="recycled", budget=24, options={"seed_rows": 6, "stride": 0, "similarity": -1.0}),
    "recycled, often dense": KVOptions(selection="recycled", budget=24, options=OFTEN_DENSE),
    "razor_view": KVOptions(selection="razor_view", options={"sinks": 4, "min_window": 20, "window_divisor": 100}),
    "drafts": KVOptions(selection="recycled", budget=24, draft=True, draft_tokens=3),
    "off": KVOptions(selection="sink_window", budget=24, reuse="off"),
}  # fmt: skip


def stored(llm: LLM, blocks: Sequence[int]) -> Layers:
    """What lies in these blocks."""
    pages = list(blocks)
    return [tuple(cache[pages].transpose(1, 2).flatten(0, 1).clone() for cache in kv) for kv in llm.core.cache.storage.layers]  # type: ignore[misc]


class Cold:
    """Reads tokens as a prompt, with nothing cached."""

    def __init__(self, make: Make, **config: Any) -> None:
        self._llm = make(**config)
        self._count = 0

    def run(self, tokens: Sequence[int], kv: KVOptions, count: int) -> tuple[Layers, list[Any]]:
        """KV of the tokens, and log-probabilities of `count` more."""
        core, found, entries = self._llm.core, [], []
        core.cache.evict()

        def look(request: Request, logits: Tensor) -> None:
            if not found:
                blocks = core._scheduler.table(request).blocks
                found.append([(k[: len(tokens)], v[: len(tokens)]) for k, v in stored(self._llm, blocks)])

        core.observer = look
        self._count += 1
        core.add(Request(id=f"cold {self._count}", prompt=tuple(tokens), sampling=greedy(count, logprobs=0), kv=kv))
        while core.busy:
            entries += [entry for output in core.step() for entry in output.logprobs]
        return found[0], entries


class Warm:
    """An engine that is used, and remembers which tables it opened for which tokens."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.seen: list[tuple[Request, BlockTable, KVOptions]] = []

    def run(self, jobs: Sequence[Job], count: int, preempt: Callable[[int], bool]) -> list[list[Any]]:
        """All jobs in one batch; before a step for which `preempt` says so, somebody loses his blocks."""
        core, steps = self.llm.core, 0
        found: dict[str, list[Any]] = {}
        for tokens, kv in jobs:
            request = Request(id=f"job {len(self.seen)}", prompt=tuple(tokens), sampling=greedy(count, logprobs=0), kv=kv)
            core.add(request)
            found[request.id] = []
            self.seen.append((request, core._scheduler.table(request), kv))
        while core.busy:
            steps += 1
            running = core._scheduler.running
            if running and preempt(steps):
                core._scheduler._preempt(running[steps % len(running)], StepPlan([], []))
            for output in core.step():
                found[output.id].extend(output.logprobs)
            core.check()
        return list(found.values())

    def assert_true(self, cold: Cold) -> int:
        """Every block that can be found holds what a cold run computes. Returns how many there are."""
        index, size, checked = self.llm.core.cache.index, self.llm.core.cache.block_size, 0
        for request, table, kv in self.seen:
            known = [i for i, key in enumerate(table.chain.keys) if key in index._entries]
            if not known:
                continue
            expected, _ = cold.run(request.tokens, kv, 1)
            for i in known:
                entry = index._entries[table.chain.keys[i]]
                for pair, truth in zip(stored(self.llm, [entry.block]), expected):
                    for held, computed in zip(pair, truth):
                        torch.testing.assert_close(held, computed[i * size : (i + 1) * size], atol=2e-4, rtol=1e-4)
            checked += len(known)
        return checked


def tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(3, 300) for _ in range(rng.randint(least, most))]


def turns(make: Make, kinds: Sequence[KVOptions], seed: int, block_size: int, often: float = 0.1) -> None:
    """Conversations of two turns side by side, one per kind, in a cache that they fight for."""
    rng = random.Random(seed)
    config: dict[str, Any] = {"block_size": block_size, "max_batched_tokens": 56, "max_num_seqs": 8, "max_model_len": 256}
    config |= {"shadow_interval": 0, "threads": 1}
    warm = Warm(make(kv_memory=rng.choice((300, 420)) * 2 * 2 * 16 * 4 * 3, **config))
    cold = Cold(make, **config)
    talks = [tokens(rng, 20, 80) for _ in kinds]
    for _ in range(2):
        jobs = list(zip(talks, kinds))
        found = warm.run(jobs, 18, lambda step: rng.random() < often)
        for (talk, kv), entries in zip(jobs, found):
            _, expected = cold.run(talk, kv, 18)
            assert [entry.token for entry in entries] == [entry.token for entry in expected]
            assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
        talks = [[*talk, *(entry.token for entry in entries), *tokens(rng, 3, 12)] for talk, entries in zip(talks, found)]
    assert warm.assert_true(cold) > 0 or all(kv.reuse == "off" for kv in kinds)


@pytest.mark.parametrize(("kind", "block_size"), [(kind, (1, 4, 16)[i % 3]) for i, kind in enumerate(KINDS)])
def test_what_is_found_is_what_a_cold_run_computes(make_llm: Make, kind: str, block_size: int) -> None:
    turns(make_llm, [KINDS[kind]] * 2, seed=block_size, block_size=block_size)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_in_mixed_batches(make_llm: Make, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [KINDS[rng.choice(list(KINDS))] for _ in range(5)]
    turns(make_llm, kinds, seed, (1, 4, 16)[seed])


@pytest.mark.parametrize("selection", [None, "recycled"])
def test_reused_kv_is_not_published(make_llm: Make, selection: str | None) -> None:
    """Approximate reuse, swept or not, with preemption: what stands behind a reused token is nobody else's."""
    rng, config = random.Random(1), {"block_size": 4, "threads": 1, "shadow_interval": 0}
    options = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "heal": false}'
    warm, cold = Warm(make_llm(kvshare_options=options, **config)), Cold(make_llm, **config)
    method: dict[str, Any] = {} if selection is None else {"selection": selection, "budget": 64}
    order = "position" if selection else "sweep"
    reuse = {"ratio": 0.2, "refresh": 4, "refresh_order": order}
    approx = KVOptions(reuse="approx", reuse_options=reuse, **method)
    donor = tokens(rng, 160, 160)
    warm.run([(donor, approx)], 4, lambda step: False)
    jobs = [([*tokens(rng, 20, 30), *donor[32:150], *tokens(rng, 10, 20)], approx) for _ in range(3)]
    warm.run(jobs, 20, lambda step: step in (5, 12, 17))
    assert warm.llm.stats().share.tokens["stale"] > 50
    warm.seen = [(request, table, KVOptions(reuse="off", **method)) for request, table, _ in warm.seen]
    assert warm.assert_true(cold) > 40


def test_sparse_cells_that_decode_rows_complete_are_not_found(make_llm: Make) -> None:
    """A budget that a conversation stays below: decode rows see everything, where rows of a sparse prompt do not."""
    llm, rng = make_llm(), random.Random(0)
    kv, text = KVOptions(selection="token_select", budget=300, options=SPARSE), tokens(rng, 119, 119)
    (first,) = llm.generate([text], greedy(40), kv=kv)
    talk = [*text, *first.tokens, *tokens(rng, 5, 5)]
    (second,) = llm.generate([talk], greedy(8, logprobs=0), kv=kv)
    assert second.usage is not None and second.usage.cached_tokens == 112, "whole cells of the prompt"
    (cold,) = make_llm(reuse="off").generate([talk], greedy(8, logprobs=0), kv=kv)
    assert [e.logprob for e in second.logprobs] == pytest.approx([e.logprob for e in cold.logprobs], abs=1e-5)


def test_generated_tokens_within_dense_cells_are_found(make_llm: Make) -> None:
    """Cells that begin below the prompt's budget see everything: there decode rows are as good."""
    llm = make_llm(block_size=4)
    kv, text = KVOptions(selection="token_select", budget=300, options=SPARSE), tokens(random.Random(0), 20, 20)
    (first,) = llm.generate([text], greedy(60), kv=kv)
    (second,) = llm.generate([[*text, *first.tokens, 5]], greedy(1), kv=kv)
    assert second.usage is not None and second.usage.cached_tokens == 48, "the third cell begins at 32, below 40"


def test_decode_rows_at_admission_are_not_published(make_llm: Make) -> None:
    """A preempted request that finds all but its last token: the row is a decode row, and reads a part."""
    llm, rng = make_llm(block_size=1), random.Random(0)
    core, kv = llm.core, KVOptions(selection="sink_window", budget=8)
    text = tokens(rng, 40, 40)
    request = Request(id="sparse", prompt=tuple(text), sampling=greedy(6), kv=kv)
    core.add(request)
    for _ in range(3):
        core.step()
    core._scheduler._preempt(request, StepPlan([], []))
    while core.busy:
        core.step()
    (dense,) = llm.generate([request.tokens], greedy(1, logprobs=0))
    assert dense.usage is not None and dense.usage.cached_tokens == 40
    assert llm.stats().replayed_tokens == 3
