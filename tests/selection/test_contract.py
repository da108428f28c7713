"""The selection contract, shown with the simplest method: what rows see, mixed batches, published KV, drafts, bad options."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions, Request
from tests.selection.conftest import Traced, greedy, masked_attention

Make = Callable[..., LLM]
WINDOW = KVOptions(selection="sink_window", budget=24)


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


def test_rows_see_sinks_and_window(make_llm: Make, trace: Callable[[LLM], Traced]) -> None:
    llm = make_llm()
    traced = trace(llm)
    llm.generate(prompts((60,)), greedy(8), kv=WINDOW)
    decode = [call for call in traced.calls if call.rows.size == 1]
    assert len(decode) == 3 * 7  # the first token comes from the prompt's last row
    for call in decode:
        stop = int(call.rows.stop[0])
        for seen in call.seen[0]:
            assert seen.tolist() == [0, 1, 2, 3, *range(stop - 20, stop)]
        torch.testing.assert_close(call.out.double(), masked_attention(call), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_below_budget_is_dense_bitwise(make_llm: Make, backend: str) -> None:
    llm = make_llm(backend=backend, reuse="off")
    dense = llm.generate(prompts((20, 33)), greedy(6, logprobs=0))
    sparse = llm.generate(prompts((20, 33)), greedy(6, logprobs=0), kv=KVOptions(selection="sink_window", budget=64))
    assert [r.logprobs for r in dense] == [r.logprobs for r in sparse]


def test_mixed_batch_equals_solo(make_llm: Make) -> None:
    texts = prompts((60, 70, 45, 80))
    kvs = [WINDOW, KVOptions(), KVOptions(selection="sink_window", budget=40, options={"sinks": 8}), WINDOW]
    llm = make_llm(reuse="off", max_batched_tokens=64)
    solo = [llm.generate([text], greedy(8, logprobs=0), kv=kv)[0] for text, kv in zip(texts, kvs)]
    requests = [
        Request(id=str(i), prompt=t, sampling=greedy(8, logprobs=0), kv=kv) for i, (t, kv) in enumerate(zip(texts, kvs))
    ]
    mixed: dict[str, list[Any]] = {request.id: [] for request in requests}
    for request in requests:
        llm.core.add(request)
    while llm.core.busy:
        for output in llm.core.step():
            mixed[output.id].extend(output.logprobs)
    for i in range(4):  # linear layers in fp32 round differently for other numbers of rows
        assert [entry.token for entry in mixed[str(i)]] == solo[i].tokens
        assert [entry.logprob for entry in mixed[str(i)]] == pytest.approx([e.logprob for e in solo[i].logprobs], abs=1e-4)


def test_sparse_kv_is_never_published(make_llm: Make) -> None:
    llm = make_llm(block_size=8)
    text = prompts((64,))[0]
    sparse = llm.generate([text], greedy(40), kv=WINDOW)[0]
    whole = text + sparse.tokens + [5]
    again = llm.generate([whole], greedy(1))[0]
    assert again.usage is not None and again.usage.cached_tokens == 64  # the dense prompt, and nothing after it
    dense = llm.generate([text], greedy(40))[0]
    again = llm.generate([text + dense.tokens + [5]], greedy(1))[0]
    assert again.usage is not None and again.usage.cached_tokens == 96


def test_counts_what_was_read(make_llm: Make) -> None:
    llm = make_llm()
    result = llm.generate(prompts((60,)), greedy(11), kv=WINDOW)[0]
    stats = llm.stats()
    assert stats.selection["sink_window"].decode_rows == 10
    assert stats.selection["sink_window"].attended == 3 * 10 * 24
    assert stats.selection["sink_window"].held == 3 * sum(range(61, 71))
    assert result.usage is not None
    assert (result.usage.attended_tokens, result.usage.held_tokens) == (240, sum(range(61, 71)))
    assert stats.kv_bytes["list"] == 10 * 3 * 4 * 2 * 2 * 16 * 4  # rows, layers, sinks, KV heads, K and V, dims, fp32


def test_covered_mass_is_measured(make_llm: Make) -> None:
    llm = make_llm(shadow_interval=1)
    llm.generate(prompts((60,)), greedy(5), kv=WINDOW)
    stats = llm.stats().selection["sink_window"]
    assert stats.mass_samples == 3 * 4
    assert 0.05 < stats.mass / stats.mass_samples < 1.0
    wide = make_llm(shadow_interval=1)
    wide.generate(prompts((60,)), greedy(5), kv=KVOptions(selection="sink_window", budget=60))
    more = wide.stats().selection["sink_window"]
    assert more.mass / more.mass_samples > stats.mass / stats.mass_samples


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.0, "top_p": 0.9, "seed": 3,
                                                                          "repetition_penalty": 1.3}])  # fmt: skip
def test_drafting_gives_the_dense_tokens(make_llm: Make, sampling: dict[str, Any]) -> None:
    llm = make_llm(reuse="off")
    texts = prompts((60, 50, 41, 70, 12))
    params = SamplingParams(**{"temperature": 0, **sampling}, max_tokens=24, ignore_eos=True)
    dense = llm.generate(texts, params)
    for tokens in (1, 3, 5):
        kv = KVOptions(selection="sink_window", budget=24, draft=True, draft_tokens=tokens)
        drafted = llm.generate(texts, params, kv=kv)
        assert [r.tokens for r in drafted] == [r.tokens for r in dense]
        used = [r.usage for r in drafted if r.usage is not None]
        assert sum(u.drafted_tokens for u in used) > 20
        assert 0 < sum(u.accepted_tokens for u in used) <= sum(u.drafted_tokens for u in used)
        assert all(u.completion_tokens == 24 for u in used)
    assert llm.stats().accepted_tokens > 0


def test_drafted_samples_follow_the_dense_distribution(make_llm: Make) -> None:
    """The third token after two forced ones: 2,000 seeds against the exact probabilities, by a chi-square test."""
    llm = make_llm(max_num_seqs=256)
    (text,) = prompts((60,))
    forced = (17, 230)
    logits: list[torch.Tensor] = []
    llm.core.observer = lambda request, row: logits.append(row.clone())
    llm.generate([text], SamplingParams(max_tokens=3, temperature=1.0, forced_tokens=forced, seed=0))
    llm.core.observer = None
    expected = torch.softmax(logits[-1][0].double(), 0) * 2000
    kv = KVOptions(selection="sink_window", budget=24, draft=True, draft_tokens=3)
    sampling = [SamplingParams(max_tokens=5, ignore_eos=True, forced_tokens=forced, seed=seed) for seed in range(2000)]
    results = llm.generate([text] * 2000, sampling, kv=kv)
    found = torch.bincount(torch.tensor([result.tokens[2] for result in results]), minlength=len(expected)).double()
    large = expected >= 8
    observed = torch.cat([found[large], found[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    freedom = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert freedom > 20
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert sum(result.usage.accepted_tokens for result in results if result.usage) > 1000


def test_drafting_under_preemption_and_stops(make_llm: Make) -> None:
    texts = prompts((60, 50, 41, 70))
    kv = KVOptions(selection="sink_window", budget=24, draft=True, draft_tokens=4)
    roomy = make_llm(reuse="off")
    plain = roomy.generate(texts, greedy(40))
    stop = plain[1].tokens[17]
    block_bytes = 16 * 2 * 2 * 16 * 4 * 3  # tokens, K and V, heads, dims, fp32, layers
    tight = make_llm(kv_memory=13 * block_bytes, max_model_len=160)
    drafted = tight.generate(texts, greedy(40, stop_token_ids=(stop,)), kv=kv)
    assert tight.stats().preemptions > 0
    for result, expected in zip(drafted, plain):
        wanted = expected.tokens
        if stop in wanted:
            wanted = wanted[: wanted.index(stop) + 1]
        assert result.tokens == wanted


def test_drafted_kv_is_exact_and_published(make_llm: Make) -> None:
    llm = make_llm(block_size=8)
    text = prompts((64,))[0]
    kv = KVOptions(selection="sink_window", budget=24, draft=True)
    result = llm.generate([text], greedy(40), kv=kv)[0]
    fresh = make_llm(block_size=8, reuse="off")
    follow_up = text + result.tokens + [5]
    again = llm.generate([follow_up], greedy(4, logprobs=0))[0]
    assert again.usage is not None and again.usage.cached_tokens >= 88
    clean = fresh.generate([follow_up], greedy(4, logprobs=0))[0]
    assert [entry.logprob for entry in again.logprobs] == pytest.approx([entry.logprob for entry in clean.logprobs], abs=1e-5)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (KVOptions(selection="nearest"), "kv.selection is 'nearest'; allowed: dense, sink_window"),
        (KVOptions(selection="sink_window", budget=0), "kv.budget is 0; allowed: 1 to 512"),
        (KVOptions(selection="sink_window", budget=513), "kv.budget is 513"),
        (KVOptions(budget=64), "the selection is dense"),
        (KVOptions(draft=True), "the selection is dense"),
        (KVOptions(selection="sink_window", budget=4), "kv.sink_window.sinks is 4; allowed: less than the budget of 4"),
        (KVOptions(selection="sink_window", options={"sink": 4}), "kv.sink_window.sink is not an option; allowed: sinks"),
        (KVOptions(selection="sink_window", options={"sinks": 1.5}), "kv.sink_window.sinks is 1.5"),
        (KVOptions(selection="sink_window", options={"sinks": True}), "kv.sink_window.sinks is true"),
        (KVOptions(selection="sink_window", draft_tokens=3), "set draft to true"),
        (KVOptions(selection="sink_window", draft=True, draft_tokens=17), "kv.draft_tokens is 17; allowed: 1 to 16"),
    ],
)
def test_bad_options_are_refused_by_name(make_llm: Make, kv: KVOptions, message: str) -> None:
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match=message.replace("(", r"\(")):
        llm.generate(prompts((20,)), greedy(2), kv=kv)


def test_server_defaults(make_llm: Make) -> None:
    llm = make_llm(selection="sink_window", budget=24, selection_options='{"sinks": 2}', draft=False)
    result = llm.generate(prompts((60,)), greedy(5))[0]
    assert result.usage is not None and result.usage.attended_tokens == 4 * 24
    dense = llm.generate(prompts((60,)), greedy(5), kv=KVOptions(selection="dense"))[0]
    assert dense.usage is not None and dense.usage.attended_tokens == dense.usage.held_tokens
    any_method = make_llm(budget=32).generate(prompts((60,)), greedy(5), kv=KVOptions(selection="sink_window"))[0]
    assert any_method.usage is not None and any_method.usage.attended_tokens == 4 * 32
    for bad in ({"selection": "sink_window", "budget": 0}, {"selection": "sink_window", "selection_options": "[1]"},
                {"budget": 513}, {"draft": True}, {"selection": "sink_window", "draft": True, "draft_tokens": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            make_llm(**bad)


def test_many_option_sets_are_forgotten(make_llm: Make) -> None:
    llm = make_llm()
    for budget in range(10, 110):
        llm.generate(prompts((12,)), greedy(1), kv=KVOptions(selection="sink_window", budget=budget))
    selectors: Any = llm.core._admission.selectors
    assert len(selectors._entries) <= 64
