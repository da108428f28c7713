"""TokenSelect's sparse prompts: cells on an absolute grid, whatever the scheduler does (T7), and whose KV may be shared."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvloom.engine import LLM
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from tests.selection.conftest import Call, Traced, greedy, masked_attention

Make = Callable[..., LLM]
Trace = Callable[[LLM], Traced]
LAYERS = 3


def using(budget: int = 48, **options: Any) -> KVOptions:
    return KVOptions(selection="token_select", budget=budget, options={"prefill_budget": 48, "chunk": 16, **options})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(length)]


def prompt_calls(traced: Traced) -> list[Call]:
    return [call for call in traced.calls if call.rows.size > 1]


def scored(llm: LLM, text: list[int], kv: KVOptions, tokens: int = 4) -> list[float]:
    """Log-probabilities of the prompt and of what follows."""
    result = llm.generate([text], greedy(tokens, logprobs=0, prompt_logprobs=0), kv=kv)[0]
    assert result.prompt_logprobs is not None
    return [entry.logprob for entry in (*result.prompt_logprobs[1:], *result.logprobs) if entry is not None]


def test_cells_share_the_list_of_their_mean_query(make_llm: Make, trace: Trace) -> None:
    llm = make_llm(max_batched_tokens=256)
    traced = trace(llm)
    llm.generate([prompt(90)], greedy(1), kv=using())
    calls = prompt_calls(traced)
    assert len(calls) == LAYERS
    for call in calls:
        for position in range(90):
            seen = [head.tolist() for head in call.seen[position]]
            assert seen == [cell_sees(call, position // 16 * 16, 90) + list(range(position // 16 * 16, position + 1))] * 2
    torch.testing.assert_close(calls[-1].out.double(), masked_attention(calls[-1]), atol=1e-5, rtol=0)
    stats = llm.stats().selection["token_select"]
    assert stats.selections == LAYERS * 3


def cell_sees(call: Call, begin: int, length: int) -> list[int]:
    """What rows of the cell [begin, begin + 16) see before it: Eq. 7 with their mean query, in fp64."""
    sinks, local, chosen = 4, 6, 38
    if begin < 48:  # such a cell's first row has nothing to leave out
        return list(range(begin))
    cell = call.q[begin : min(begin + 16, length)].double().mean(0)
    table, group = call.rows.tables[0].long(), call.q.shape[1] // call.k.shape[1]
    keys = call.k[table].transpose(1, 2).flatten(0, 1)[sinks : begin + 1 - local].double()
    votes = torch.softmax(torch.einsum("nhd,hd->nh", keys.repeat_interleave(group, dim=1), cell), 0).sum(1)
    best = sorted((torch.sort(votes, descending=True, stable=True).indices[:chosen] + sinks).tolist())
    return [*range(sinks), *best, *range(begin + 1 - local, begin)]


def test_cells_of_one_are_the_decode_rule(make_llm: Make) -> None:
    """T7: a prompt in cells of one token, and the same tokens decoded one by one."""
    text, budget = prompt(90), 40
    options: dict[str, Any] = {"theta": 2.0}
    llm = make_llm(reuse="off")
    sparse = scored(llm, text, using(budget, chunk=1, prefill_budget=budget, **options), tokens=1)
    decoded = llm.generate(
        [text[:budget]], greedy(50, logprobs=0, forced_tokens=tuple(text[budget:])),
        kv=KVOptions(selection="token_select", budget=budget, options=options),
    )[0]  # fmt: skip
    assert sparse[budget - 1 : 89] == pytest.approx([entry.logprob for entry in decoded.logprobs], abs=1e-4)
    dense = scored(llm, text, KVOptions(), tokens=1)
    assert sparse[: budget - 1] == pytest.approx(dense[: budget - 1], abs=1e-5)
    assert sparse[budget:] != pytest.approx(dense[budget:], abs=1e-3)


@pytest.mark.parametrize("positions", ["true", "reindexed"])
def test_the_scheduler_changes_nothing(make_llm: Make, positions: str) -> None:
    """Steps of any size, other requests beside it: the cells are the same. No token comes twice: re-indexed, two would tie."""
    text, kv = random.Random(0).sample(range(300), 150), using(positions=positions)
    expected = scored(make_llm(reuse="off", max_batched_tokens=512), text, kv)
    for room in (130, 97):
        llm = make_llm(reuse="off", max_batched_tokens=room, max_num_seqs=8)
        assert scored(llm, text, kv) == pytest.approx(expected, abs=1e-4)
        together = llm.generate([prompt(70, 1), text, prompt(90, 2)], greedy(4, logprobs=0), kv=kv)[1]
        assert [entry.logprob for entry in together.logprobs] == pytest.approx(expected[-4:], abs=1e-4)


def test_prefixes_are_shared_with_the_same_options_only(make_llm: Make) -> None:
    llm = make_llm(block_size=8)
    text = prompt(150)
    first = llm.generate([text], greedy(4, logprobs=0), kv=using())[0]
    again = llm.generate([text], greedy(4, logprobs=0), kv=using())[0]
    assert again.usage is not None and again.usage.cached_tokens == 144  # whole cells
    assert [e.logprob for e in again.logprobs] == pytest.approx([e.logprob for e in first.logprobs], abs=1e-5)
    decode_only = {"theta": 0.5, "max_gap": 9}  # what prompts do not depend on
    for kv, cached in (
        (KVOptions(), 0), (using(chunk=32), 0), (using(prefill_budget=64), 0), (using(vote="scaled"), 0), (using(pool=3), 0),
        (using(positions="reindexed"), 0), (using(32, **decode_only), 144),
    ):  # fmt: skip
        result = llm.generate([text], greedy(2), kv=kv)[0]
        assert result.usage is not None and result.usage.cached_tokens == cached


def test_dense_prompts_are_shared_with_everybody(make_llm: Make) -> None:
    llm = make_llm(block_size=8)
    text = prompt(150)
    llm.generate([text], greedy(2), kv=KVOptions(selection="token_select", budget=48))
    for kv in (KVOptions(), KVOptions(selection="token_select", budget=64, options={"prefill_budget": 0, "vote": "scaled"})):
        result = llm.generate([text], greedy(2), kv=kv)[0]
        assert result.usage is not None and result.usage.cached_tokens == 144


def test_preempted_prompts_are_computed_again(make_llm: Make) -> None:
    texts = [prompt(length, length) for length in (60, 50, 41, 70)]
    roomy = make_llm(reuse="off").generate(texts, greedy(40), kv=using())
    block_bytes = 16 * 2 * 2 * 16 * 4 * LAYERS
    tight = make_llm(kv_memory=13 * block_bytes, max_model_len=160)
    results = tight.generate(texts, greedy(40), kv=using())
    assert tight.stats().preemptions > 0
    assert [result.tokens for result in results] == [result.tokens for result in roomy]


def test_drafting_needs_dense_prompts(make_llm: Make) -> None:
    kv = KVOptions(selection="token_select", budget=48, draft=True, options={"prefill_budget": 48})
    with pytest.raises(InvalidRequestError, match=r"kv\.draft verifies against dense KV"):
        make_llm().generate([prompt(20)], greedy(2), kv=kv)


def test_partial_cells_are_not_shared(make_llm: Make) -> None:
    """A prompt that ends inside a cell chooses with the mean of what it has: nobody else may build on that."""
    text = prompt(160)
    expected = make_llm(reuse="off").generate([[*text, 7]], greedy(4, logprobs=0), kv=using(chunk=32))[0]
    llm = make_llm(block_size=8)
    llm.generate([text[:120]], greedy(1), kv=using(chunk=32))  # [96, 120) is part of the cell [96, 128)
    llm.generate([text[:160]], greedy(1), kv=using(chunk=32))
    found = llm.generate([[*text, 7]], greedy(4, logprobs=0), kv=using(chunk=32))[0]
    assert found.usage is not None and found.usage.cached_tokens == 160
    assert [e.logprob for e in found.logprobs] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
