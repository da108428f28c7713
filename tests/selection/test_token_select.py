"""TokenSelect: what decode rows see, the vote, the Selection Cache, what they cost (T1 to T6, T9 of the specification)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import kernels
from kvloom.engine import LLM
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.kernels.reference import ReferenceKernels
from tests.selection.conftest import Call, Traced, greedy, masked_attention

Make = Callable[..., LLM]
Trace = Callable[[LLM], Traced]
LAYERS = 3
NEVER = 2.0
"""A theta above every cosine: no Selection Cache."""


def using(budget: int, **options: Any) -> KVOptions:
    return KVOptions(selection="token_select", budget=budget, options=options)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(length)]


def decode_calls(traced: Traced) -> list[Call]:
    """Of one request, layer by layer, step by step."""
    return [call for call in traced.calls if call.rows.size == 1]


def votes(call: Call, first: int, last: int, *, scale: float = 1.0, window: int = 1) -> Tensor:
    """Eq. 7 in fp64, from the whole cache: [candidates]."""
    table = call.rows.tables[int(call.rows.request[0])].long()
    group = call.q.shape[1] // call.k.shape[1]
    total = torch.zeros(last - first, dtype=torch.float64)
    for head in range(call.q.shape[1]):
        keys = call.k[table, head // group].flatten(0, 1)[first:last].double()
        total += torch.softmax(keys @ call.q[0, head].double() * scale, 0)
    pooled = torch.nn.functional.max_pool1d(total[None], window, stride=1, padding=window // 2)
    return pooled[0]


def best(scores: Tensor, k: int, first: int) -> list[int]:
    return sorted((torch.sort(scores, descending=True, stable=True).indices[:k] + first).tolist())


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_first_step_beyond_the_budget_drops_one(make_llm: Make, trace: Trace, backend: str) -> None:
    """T1, T2: at N = n_init + k + n_local everything is seen and dense bit for bit; one token later all but one position."""
    llm = make_llm(backend=backend, reuse="off")
    text = prompt(30)
    dense = llm.generate([text], greedy(4, logprobs=0))
    traced = trace(llm)
    sparse = llm.generate([text], greedy(4, logprobs=0), kv=using(32))
    assert [entry.logprob for entry in sparse[0].logprobs[:3]] == [entry.logprob for entry in dense[0].logprobs[:3]]
    for call in decode_calls(traced):
        stop = int(call.rows.stop[0])
        assert len(call.seen[0][0]) == min(stop, 32)
        assert call.seen[0][0].tolist() == call.seen[0][1].tolist()


@pytest.mark.parametrize(
    ("backend", "options", "scale", "window"),
    [("native", {}, 1.0, 1), ("torch", {}, 1.0, 1), ("reference", {"pool": 5}, 1.0, 5), ("native", {"vote": "scaled"}, 0.25, 1),
     ("native", {"pool": 5}, 1.0, 5), ("native", {"sinks": 0, "local": 1}, 1.0, 1),
     ("native", {"sinks": 7, "local": 20}, 1.0, 1)],
)  # fmt: skip
def test_lists_are_the_votes_of_all_heads(
    make_llm: Make, trace: Trace, backend: str, options: dict[str, Any], scale: float, window: int
) -> None:
    """T3, T9: sinks, the k candidates with most votes, and the local window; attention over exactly these."""
    llm = make_llm(backend=backend, block_size=8)
    sinks, local = options.get("sinks", 4), options.get("local", 4)
    traced = trace(llm)
    llm.generate([prompt(70)], greedy(6), kv=using(32, theta=NEVER, **options))
    calls = decode_calls(traced)
    assert len(calls) == 5 * LAYERS
    for call in calls:
        stop = int(call.rows.stop[0])
        scores = votes(call, sinks, stop - local, scale=scale, window=window)
        expected = [*range(sinks), *best(scores, 32 - sinks - local, sinks), *range(stop - local, stop)]
        assert [seen.tolist() for seen in call.seen[0]] == [expected, expected]
        torch.testing.assert_close(call.out.double(), masked_attention(call), atol=1e-5, rtol=0)


def test_vote_ignores_what_a_softmax_ignores() -> None:
    """T5, T6: constants per head and the order of heads change nothing, the scale does; votes of head shards add up."""
    back_end = kernels.load("native")
    logits = torch.randn(1, 6, 300, generator=torch.Generator().manual_seed(1)) * 3
    first, last = torch.zeros(1, dtype=torch.int32), torch.full((1,), 300, dtype=torch.int32)

    def pooled(values: Tensor) -> Tensor:
        return back_end.pool(values.contiguous(), first, last, 1, how="sum", window=1, out=torch.empty(1, 1, 300))

    def chosen(values: Tensor) -> list[int]:
        picked: list[int] = back_end.select(pooled(values)[:, 0], last, 40)[0][0].tolist()
        return picked

    lists = chosen(logits)
    assert chosen(logits + torch.tensor([3.0, -2, 0, 7, 1, -5])[None, :, None]) == lists
    assert chosen(logits[:, [3, 1, 5, 0, 2, 4]]) == lists
    assert chosen(logits / 8) != lists
    torch.testing.assert_close(pooled(logits[:, :2]) + pooled(logits[:, 2:]), pooled(logits))


def simulated_cache(calls: list[Call], inv_freq: Tensor, theta: float, max_gap: int | None) -> list[int]:
    """Algorithm 1 over one layer's calls, queries turned back to position 0: the length at which each list was made."""
    made, kept, found = 0, np.zeros(0), []
    for call in calls:
        stop = int(call.rows.stop[0])
        back = torch.tensor([1 - stop], dtype=torch.int32)
        query = ReferenceKernels().rotate(call.q.double(), back, inv_freq, torch.empty(call.q.shape).double()).flatten().numpy()
        alike = made and query @ kept / math.sqrt((query @ query) * (kept @ kept)) >= theta
        if not alike or (max_gap is not None and stop - made > max_gap):
            made, kept = stop, query
        found.append(made)
    return found


@pytest.mark.parametrize(("theta", "max_gap"), [(NEVER, None), (-1.0, None), (-1.0, 5), (0.1, 6), (0.2, None), (0.3, None)])
def test_selection_cache(make_llm: Make, trace: Trace, theta: float, max_gap: int | None) -> None:
    """T4 and between: tails begin at N_sel - n_local and lists stay, wherever Algorithm 1 says so and nowhere else."""
    llm = make_llm()
    traced = trace(llm)
    tokens = 24
    llm.generate([prompt(70)], greedy(tokens), kv=using(32, theta=theta, max_gap=max_gap))
    calls, selections = decode_calls(traced), 0
    for layer in range(LAYERS):
        own = calls[layer::LAYERS]
        made = simulated_cache(own, llm.core.runner.geometry.inv_freq, theta, max_gap)
        selections += len(set(made))
        kept: dict[int, list[int]] = {}
        for call, at in zip(own, made):
            stop, seen = int(call.rows.stop[0]), call.seen[0][0].tolist()
            assert seen[28:] == list(range(at - 4, stop))  # tokens since the selection are never invisible
            assert kept.setdefault(at, seen[:28]) == seen[:28]
    stats = llm.stats().selection["token_select"]
    assert stats.selections == selections
    assert stats.selections + stats.reused == LAYERS * (tokens - 1)
    if theta == -1.0 and max_gap is None:
        assert stats.selections == LAYERS
    if theta == NEVER:
        assert stats.reused == 0
    if 0 < theta < 1:
        assert stats.reused and stats.selections > LAYERS


def test_hits_read_lists_only(make_llm: Make) -> None:
    """Bytes follow the formula: a selection reads the candidates' keys, every row its list and tail, and nothing else."""
    llm = make_llm()
    start, tokens, budget, local = 70, 12, 32, 4
    llm.generate([prompt(start)], greedy(1))
    before = llm.stats().kv_bytes
    llm.generate([prompt(start)], greedy(tokens), kv=using(budget, theta=-1.0, max_gap=None))
    after = llm.stats().kv_bytes
    key = 2 * 16 * 4  # KV heads, dims, fp32
    candidates = start + 1 - 4 - local
    assert after["score"] - before["score"] == LAYERS * candidates * key
    rows = tokens - 1
    assert after["list"] - before["list"] == LAYERS * rows * (budget - local) * 2 * key
    stats = llm.stats().selection["token_select"]
    assert stats.attended == LAYERS * sum(budget + gap for gap in range(rows))
    assert (stats.selections, stats.reused) == (LAYERS, LAYERS * (rows - 1))


@pytest.mark.parametrize("budget", [16, 32, 40])
def test_recall_grows_with_the_budget(make_llm: Make, budget: int) -> None:
    """V8: covered mass is measured, is a share, and grows with k."""

    def mass(size: int) -> float:
        llm = make_llm(shadow_interval=1)
        llm.generate([prompt(90)], greedy(6), kv=using(size, theta=NEVER))
        stats = llm.stats().selection["token_select"]
        assert stats.mass_samples == 5 * LAYERS
        return stats.mass / stats.mass_samples

    assert 0.05 < mass(budget) < mass(budget + 24) < 1.0


def test_drafts_that_are_rejected(make_llm: Make) -> None:
    """Lists made for drafts outlive them: the sequence grows shorter, and goes on."""
    llm = make_llm(reuse="off")
    texts = [prompt(length, length) for length in (60, 50, 41)]
    dense = llm.generate(texts, greedy(30))
    for theta in (NEVER, 0.5, -1.0):
        kv = KVOptions(selection="token_select", budget=24, draft=True, options={"theta": theta})
        assert [r.tokens for r in llm.generate(texts, greedy(30), kv=kv)] == [r.tokens for r in dense]
    stats = llm.stats()
    assert stats.drafted_tokens > stats.accepted_tokens > 0


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (24, {"sinks": 20, "local": 4}, "sinks and local are 20 and 4, which leaves nothing to select of a budget of 24"),
        (24, {"sinks": -1}, "kv.token_select.sinks is -1; allowed: 0 to"),
        (24, {"local": 0}, "kv.token_select.local is 0; allowed: 1 to"),
        (24, {"vote": "hard"}, "kv.token_select.vote is 'hard'; allowed: unscaled, scaled"),
        (24, {"pool": 4}, "kv.token_select.pool is 4; allowed: an odd number"),
        (24, {"theta": 3.0}, "kv.token_select.theta is 3.0"),
        (24, {"theta": "high"}, "kv.token_select.theta is 'high'"),
        (24, {"max_gap": 0}, "kv.token_select.max_gap is 0"),
        (24, {"prefill_budget": -5}, "kv.token_select.prefill_budget is -5"),
        (24, {"prefill_budget": 4, "local": 4}, "nothing to select of a token_select.prefill_budget of 4"),
        (24, {"prefill_budget": 64, "chunk": 0}, "kv.token_select.chunk is 0"),
        (24, {"prefill_budget": 64, "chunk": 5000}, "computes prompts in pieces of 5000 tokens"),
        (24, {"positions": "none"}, "kv.token_select.positions is 'none'; allowed: true, reindexed"),
        (512, {"positions": "reindexed"}, "kv.budget is 512; allowed: less than 512"),
        (64, {"positions": "reindexed", "prefill_budget": 500}, "with re-indexed positions together at most 512"),
        (24, {"n_local": 4}, "kv.token_select.n_local is not an option"),
    ],
)
def test_bad_options_are_refused_by_name(make_llm: Make, budget: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_llm().generate([prompt(20)], greedy(2), kv=using(budget, **options))


@pytest.mark.parametrize("budget", [2, 3, 7, 16, 33])
def test_defaults_fit_every_budget(make_llm: Make, trace: Trace, budget: int) -> None:
    llm = make_llm()
    traced = trace(llm)
    llm.generate([prompt(60)], greedy(3), kv=using(budget, theta=NEVER))
    assert {len(call.seen[0][0]) for call in decode_calls(traced)} == {budget}
