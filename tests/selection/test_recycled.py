"""Recycled Attention against its definition: the limits R1 to R7 of the specification, by what rows saw and what they gave.

The oracle of a list is computed from a traced call's queries and keys, densely and without the engine's kernels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from tests.selection.conftest import Call, Traced, greedy, logprobs_of, masked_attention

Make = Callable[..., LLM]
Trace = Callable[[LLM], Traced]
LAYERS = 3


def recycled(budget: int, **options: Any) -> KVOptions:
    """Without the trigger, unless a test asks for it."""
    return KVOptions(selection="recycled", budget=budget, options={"similarity": -1.0, **options})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(length)]


class Step(NamedTuple):
    """A decode row in one layer."""

    layer: int
    stop: int
    lists: list[list[int]]
    """[kv head]: positions in front of the tail."""
    tail: int
    call: Call

    @property
    def full(self) -> bool:
        return self.tail == 0


def decode_steps(traced: Traced) -> list[Step]:
    """Decode rows of a traced engine that ran one request alone."""
    steps = []
    single = [call for call in traced.calls if call.rows.size == 1]
    for i, call in enumerate(single):
        tail = int(call.rows.start[0])
        lists = [[p for p in seen.tolist() if p < tail] for seen in call.seen[0]]
        steps.append(Step(i % LAYERS, int(call.rows.stop[0]), lists, tail, call))
    return steps


def ranking(q: Tensor, call: Call, first: int, last: int, window: int) -> Tensor:
    """[kv heads, last - first]: the paper's scores of candidates for one query [q_heads, head_dim]."""
    table = call.rows.tables[int(call.rows.request[-1])].long()
    group, rows = q.shape[0] // call.k.shape[1], []
    for head in range(call.k.shape[1]):
        keys = call.k[table, head].flatten(0, 1)[first:last].double()
        shares = torch.softmax(keys @ q[head * group : (head + 1) * group].double().T * call.scale, dim=0).amax(1)
        padded = torch.nn.functional.pad(shares, (window // 2, window // 2), value=-math.inf)
        rows.append(padded.unfold(0, window, 1).amax(1))
    return torch.stack(rows)


def best(scores: Tensor, first: int, k: int) -> list[list[int]]:
    """The k best columns of each row, ties to the lower one, as ascending positions."""
    order = torch.sort(scores, descending=True, stable=True).indices[:, :k]
    return [sorted((row + first).tolist()) for row in order]


# R1, R2: nothing to lose --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_stride_one_is_dense(make_llm: Make, backend: str) -> None:
    """R1."""
    llm = make_llm(backend=backend)
    dense = logprobs_of(llm, [prompt(60), prompt(41)], 8)
    assert logprobs_of(llm, [prompt(60), prompt(41)], 8, kv=recycled(24, stride=1, refresh="dense")) == dense
    assert llm.stats().selection["recycled"].selections == 2 * 7 * LAYERS
    assert logprobs_of(llm, [prompt(60), prompt(41)], 8, kv=recycled(24, stride=4, refresh="dense")) != dense


@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"stride": 0}, {"refresh": "score"}, {"similarity": 2.0, "recent": 0}])
def test_a_budget_that_holds_everything_is_dense(make_llm: Make, options: dict[str, Any]) -> None:
    """R2."""
    llm = make_llm()
    texts = [prompt(n) for n in (1, 2, 7, 40)]
    assert logprobs_of(llm, texts, 8, kv=recycled(48, **options)) == logprobs_of(llm, texts, 8)
    assert llm.stats().selection["recycled"].selections == 0


# R3, R4: what rows see ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize(("sinks", "recent"), [(2, 6), (0, 0), (0, 5), (3, 0)])
def test_lists_change_at_refreshes_only(make_llm: Make, trace: Trace, stagger: bool, sinks: int, recent: int) -> None:
    """R3, R4: full steps by the stride; between them the list stands still, and all tokens since then are seen."""
    llm = make_llm()
    traced = trace(llm)
    kv = recycled(24, stride=6, stagger=stagger, sinks=sinks, recent=recent, refresh="dense", seed_rows=2)
    llm.generate([prompt(60)], greedy(30), kv=kv)
    steps = decode_steps(traced)
    assert len(steps) == 29 * LAYERS
    kept: dict[int, Step] = {}
    refreshed = dict.fromkeys(range(LAYERS), 60)
    for step in steps:
        phase = step.layer * 6 // LAYERS if stagger else 0
        assert step.full == ((step.stop + phase) % 6 == 0)
        if step.full:
            refreshed[step.layer] = step.stop
            kept.pop(step.layer, None)
            continue
        assert step.tail == refreshed[step.layer] - recent  # so [tail, stop) holds all since the refresh
        for found in step.lists:
            assert len(found) == 24 - recent and found == sorted(set(found)) and found[:sinks] == list(range(sinks))
        before = kept.setdefault(step.layer, step)
        assert step.lists == before.lists
    for call in traced.calls[-2 * LAYERS :]:
        torch.testing.assert_close(call.out.double(), masked_attention(call), atol=1e-5, rtol=0)


def test_layers_take_turns(make_llm: Make, trace: Trace) -> None:
    """A step refreshes its share of the layers, no more; without turns, all of them."""
    for stagger, most in ((True, 1), (False, LAYERS)):
        llm = make_llm(reuse="off")
        traced = trace(llm)
        llm.generate([prompt(60)], greedy(13), kv=recycled(24, stride=6, stagger=stagger, refresh="dense", seed_rows=1))
        full: dict[int, int] = {}
        for step in decode_steps(traced):
            full[step.stop] = full.get(step.stop, 0) + step.full
        assert max(full.values()) == most and sum(full.values()) == 2 * LAYERS


# R5: the trigger ----------------------------------------------------------------------------------------------------------


def test_never_refreshing_is_snapkv(make_llm: Make, trace: Trace) -> None:
    """R5: without stride and trigger, the prompt's list is all there is: the paper's scores of its last row."""
    llm = make_llm()
    traced = trace(llm)
    kv = recycled(24, stride=0, similarity=-1.0, seed_rows=1, sinks=0, recent=0)
    llm.generate([prompt(60)], greedy(20), kv=kv)
    stats = llm.stats().selection["recycled"]
    assert (stats.selections, stats.refreshes, stats.reused) == (LAYERS, 0, 19 * LAYERS)
    prefill = traced.calls[:LAYERS]
    for step in decode_steps(traced):
        scores = ranking(prefill[step.layer].q[-1], prefill[step.layer], 0, 60, window=7)
        assert step.lists == best(scores, 0, 24) and step.tail == 60


@pytest.mark.parametrize("compare", ["mean", "min", "flat"])
def test_trigger_always_refreshes_at_every_check(make_llm: Make, trace: Trace, compare: str) -> None:
    """R5."""
    llm = make_llm()
    traced = trace(llm)
    kv = recycled(24, stride=0, similarity=2.0, check_every=4, compare=compare, stagger=False, refresh="dense",
                  seed_rows=1)  # fmt: skip
    llm.generate([prompt(60)], greedy(20), kv=kv)
    for step in decode_steps(traced):
        assert step.full == (step.stop % 4 == 0)
    assert llm.stats().selection["recycled"].refreshes == 4 * LAYERS


@pytest.mark.parametrize("refresh", ["dense", "score"])
@pytest.mark.parametrize("compare", ["mean", "min", "flat"])
def test_trigger_compares_with_the_last_refresh(make_llm: Make, trace: Trace, compare: str, refresh: str) -> None:
    """A layer refreshes where the cosine, computed here anew, is at most s; the query of the last refresh stays the measure."""
    llm = make_llm()
    traced = trace(llm)
    level = {"mean": 0.3, "min": -0.4, "flat": 0.2}[compare]
    kv = recycled(24, stride=0, similarity=level, check_every=2, compare=compare, stagger=False, refresh=refresh,
                  seed_rows=1, recent=6)  # fmt: skip
    llm.generate([prompt(60)], greedy(40), kv=kv)
    prefill = traced.calls[:LAYERS]
    kept = {layer: (prefill[layer].q[-1], 60) for layer in range(LAYERS)}
    outcomes = []
    recent = 6
    for step in decode_steps(traced):
        query, since = kept[step.layer]
        now = step.call.q[0]
        pairs = {
            "mean": [(now.mean(0), query.mean(0))],
            "min": list(zip(now, query)),
            "flat": [(now.flatten(), query.flatten())],
        }[compare]
        cosine = min(float(torch.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs)
        refreshes = step.stop % 2 == 0 and cosine <= level
        if refreshes:
            kept[step.layer] = (now, step.stop)
        assert step.tail == ((0 if refresh == "dense" else step.stop - recent) if refreshes else since - recent)
        outcomes.append(refreshes)
    assert 5 < sum(outcomes) < len(outcomes) // 2 - 5  # the trigger decides something
    assert llm.stats().selection["recycled"].refreshes == sum(outcomes)


# R6, R7: lists against oracles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize(("sinks", "recent"), [(2, 6), (0, 0)])
def test_lists_are_top_k_of_the_oracle(make_llm: Make, trace: Trace, backend: str, pool: int, sinks: int, recent: int) -> None:
    """R7, and R6 by way of it: logits that attention emits, and logits scored alone, give the oracle's list."""
    for refresh in ("dense", "score"):
        llm = make_llm(backend=backend, reuse="off")
        traced = trace(llm)
        kv = recycled(24, stride=5, sinks=sinks, recent=recent, pool=pool, refresh=refresh)
        llm.generate([prompt(60)], greedy(16), kv=kv)
        expected: dict[int, list[list[int]]] = {}
        checked = 0
        for step in decode_steps(traced):
            due = (step.stop + step.layer * 5 // LAYERS) % 5 == 0
            if due:
                scores = ranking(step.call.q[0], step.call, sinks, step.stop - recent, pool)
                expected[step.layer] = [[*range(sinks), *row] for row in best(scores, sinks, 24 - sinks - recent)]
            if step.layer in expected and not step.full:
                assert step.lists == expected[step.layer]
                checked += 1
        assert checked >= 8 * LAYERS


@pytest.mark.parametrize(("rows", "recent"), [(1, 6), (5, 6), (16, 6), (16, 0)])
def test_seeds_are_votes_of_the_last_rows(make_llm: Make, trace: Trace, rows: int, recent: int) -> None:
    llm = make_llm()
    traced = trace(llm)
    llm.generate([prompt(60)], greedy(2), kv=recycled(24, stride=0, seed_rows=rows, sinks=2, recent=recent))
    prefill = traced.calls[:LAYERS]
    for step in decode_steps(traced):
        call, votes = prefill[step.layer], torch.zeros(2, 58 - recent, dtype=torch.float64)
        for position in range(60 - rows, 60):
            seen = ranking(call.q[position], call, 2, min(60 - recent, position + 1), window=7)
            votes[:, : seen.shape[1]] += seen
        assert step.lists == [[0, 1, *row] for row in best(votes, 2, 22 - recent)]


def test_without_seeds_the_first_row_refreshes(make_llm: Make, trace: Trace) -> None:
    llm = make_llm()
    traced = trace(llm)
    llm.generate([prompt(60)], greedy(6), kv=recycled(24, stride=0, seed_rows=0, refresh="dense"))
    steps = decode_steps(traced)
    assert [step.full for step in steps] == [True] * LAYERS + [False] * 4 * LAYERS
    stats = llm.stats().selection["recycled"]
    assert (stats.selections, stats.refreshes, stats.reused) == (LAYERS, 0, 4 * LAYERS)


# Requests come and go --------------------------------------------------------------------------------------------------------


def test_a_request_that_grows_beyond_its_budget(make_llm: Make, trace: Trace) -> None:
    """Everything is seen up to the budget; the first row beyond it makes the first list."""
    llm = make_llm()
    traced = trace(llm)
    llm.generate([prompt(20)], greedy(12), kv=recycled(24, stride=0, recent=6, refresh="score"))
    for step in decode_steps(traced):
        assert step.tail == (0 if step.stop <= 24 else 25 - 6)


@pytest.mark.parametrize("refresh", ["dense", "score"])
@pytest.mark.parametrize("recent", [0, 6])
def test_drafts_that_are_rejected_leave_a_usable_state(make_llm: Make, refresh: str, recent: int) -> None:
    """A list made while drafting may end beyond the tokens that verification keeps: then it is made anew."""
    llm = make_llm(reuse="off")
    texts = [prompt(60), prompt(45, 1), prompt(30, 2)]
    dense = llm.generate(texts, greedy(30))
    kv = KVOptions(selection="recycled", budget=24, draft=True, draft_tokens=4,
                   options={"stride": 3, "refresh": refresh, "recent": recent, "sinks": 2})  # fmt: skip
    drafted = llm.generate(texts, greedy(30), kv=kv)
    assert [r.tokens for r in drafted] == [r.tokens for r in dense]
    used = [r.usage for r in drafted if r.usage is not None]
    assert 0 < sum(u.accepted_tokens for u in used) < sum(u.drafted_tokens for u in used)


def test_preempted_requests_seed_again(make_llm: Make) -> None:
    block_bytes = 16 * 2 * 2 * 16 * 4 * LAYERS
    texts = [prompt(n, n) for n in (60, 50, 41, 70)]
    tight = make_llm(kv_memory=18 * block_bytes, max_model_len=200)
    results = tight.generate(texts, greedy(60), kv=recycled(24, stride=0, similarity=-1.0, seed_rows=4))
    assert tight.stats().preemptions > 0
    assert all(len(result.tokens) == 60 for result in results)
    assert tight.stats().selection["recycled"].selections > 4 * LAYERS


def test_bytes_follow_the_formula(make_llm: Make) -> None:
    """Section 7.3: a full step reads all K and V, a score-only refresh all K of the candidates and then K + V of the list."""
    one = 2 * 16 * 4  # KV heads, dims, fp32: K of a position in a layer
    for refresh in ("dense", "score"):
        llm = make_llm(reuse="off")
        warm = llm.stats()
        llm.generate([prompt(60)], greedy(1))
        prefill = llm.stats().kv_bytes_read - warm.kv_bytes_read
        llm.generate([prompt(60)], greedy(13), kv=recycled(24, stride=6, recent=6, sinks=2, refresh=refresh, seed_rows=0))
        full = partial = scored = 0
        for layer in range(LAYERS):
            since = 0
            for stop in range(61, 73):
                if stop == 61 or (stop + 2 * layer) % 6 == 0:
                    since = stop
                    full += 2 * stop * one if refresh == "dense" else 0
                    scored += (stop - 8) * one if refresh == "score" else 0
                    partial += 2 * 24 * one if refresh == "score" else 0
                else:
                    partial += 2 * (24 + stop - since) * one
        stats = llm.stats()
        assert stats.kv_bytes["score"] - warm.kv_bytes["score"] == scored
        assert stats.kv_bytes_read - warm.kv_bytes_read - 2 * prefill == full + partial + scored


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (24, {"stride": -1}, "kv.recycled.stride is -1; allowed: 0 to"),
        (24, {"similarity": 3.0}, "kv.recycled.similarity is 3.0; allowed: -1"),
        (24, {"check_every": 0}, "kv.recycled.check_every is 0; allowed: 1 to"),
        (24, {"compare": "max"}, "kv.recycled.compare is 'max'; allowed: mean, min, flat"),
        (24, {"refresh": "never"}, "kv.recycled.refresh is 'never'; allowed: dense, score"),
        (24, {"pool": 4}, "kv.recycled.pool is 4; allowed: an odd number"),
        (24, {"seed_rows": 65}, "kv.recycled.seed_rows is 65; allowed: 0 to 64"),
        (24, {"sinks": -1}, "kv.recycled.sinks is -1; allowed: 0 to"),
        (24, {"sinks": 10, "recent": 14}, "sinks and recent are 10 and 14, which leaves nothing to select of a budget of 24"),
        (24, {"recent": 24, "sinks": 0}, "leaves nothing to select"),
        (24, {"steps": 4}, "kv.recycled.steps is not an option"),
    ],
)
def test_bad_options_are_refused_by_name(make_llm: Make, budget: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message.replace("(", r"\(")):
        make_llm().generate([prompt(20)], greedy(2), kv=recycled(budget, **options))


@pytest.mark.parametrize("budget", [1, 2, 16, 100, 512])
def test_defaults_fit_every_budget(make_llm: Make, budget: int) -> None:
    results = make_llm().generate([prompt(120)], greedy(20), kv=KVOptions(selection="recycled", budget=budget))
    assert len(results[0].tokens) == 20
