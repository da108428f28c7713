"""Preemption does not show: tokens, log-probabilities and counts are those of a request that kept its blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.requests.plan import StepPlan
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.sampling import SamplingParams
from tests.selection.conftest import greedy, stepped

Make = Callable[..., LLM]
RECYCLED = KVOptions(selection="recycled", budget=24)
SEEDED = KVOptions(selection="recycled", budget=24, options={"seed_rows": 12, "stride": 0, "similarity": -1.0})
KINDS: dict[str, KVOptions] = {
    "sink_window": KVOptions(selection="sink_window", budget=24),
    "token_select": KVOptions(selection="token_select", budget=24),
    "sparse prompts": KVOptions(selection="token_select", budget=24, options={"prefill_budget": 40, "chunk": 16}),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=24, options={"correct_every": 7}),
    "recycled": RECYCLED,
    "seeded": SEEDED,
    "razor_view": KVOptions(selection="razor_view", options={"sinks": 4, "min_window": 20, "window_divisor": 100}),
    "razor_view+recycled": KVOptions(selection="razor_view", budget=24, options={"min_window": 20, "retrieval": "recycled"}),
    "drafts": KVOptions(selection="token_select", budget=24, draft=True),
}  # fmt: skip


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(3, 300), length)


def run(llm: LLM, requests: Sequence[Request], lose: Callable[[int], int | None] = lambda step: None) -> list[list[Any]]:
    """Log-probabilities of all requests in one batch. lose: which of them loses its blocks before a step."""
    found: dict[str, list[Any]] = {request.id: [] for request in requests}
    for output in stepped(llm, requests, lose):
        found[output.id].extend(output.logprobs)
        requests[int(output.id)].arrival = output.usage.attended_tokens  # kept for the comparison
    return list(found.values())


def made(sampling: SamplingParams, kv: KVOptions, lengths: Sequence[int] = (60, 33, 18)) -> list[Request]:
    return [Request(id=str(i), prompt=tuple(text(n, n)), sampling=sampling, kv=kv) for i, n in enumerate(lengths)]


def assert_same(found: list[list[Any]], expected: list[list[Any]]) -> None:
    for row, other in zip(found, expected, strict=True):
        assert [entry.token for entry in row] == [entry.token for entry in other]
        assert [entry.logprob for entry in row] == pytest.approx([entry.logprob for entry in other], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_counts_are_the_same(make_llm: Make, kind: str) -> None:
    """Short and long requests, which lose their blocks one after the other, again and again, also while they replay."""
    kv, config = KINDS[kind], {"block_size": 4, "max_batched_tokens": 64, "max_num_seqs": 8, "threads": 1}
    requests = made(greedy(24, logprobs=0), kv)
    expected = run(make_llm(**config), requests)
    again, llm = made(greedy(24, logprobs=0), kv), make_llm(**config)
    found = run(llm, again, lambda step: (step // 7) % 3 if step % 7 == 0 else 1 if step % 16 == 15 else None)
    assert_same(found, expected)
    assert llm.stats().preemptions > 4 and (llm.stats().replayed_tokens > 8 or kv.draft)
    if not kv.draft:  # a verification reads other positions when drafts were made anew
        assert [request.arrival for request in again] == [request.arrival for request in requests], "attended tokens"


def test_forced_and_sampled_tokens_and_penalties(make_llm: Make) -> None:
    forced = SamplingParams(temperature=0.8, seed=5, max_tokens=30, ignore_eos=True, logprobs=0, presence_penalty=1.5,
                            repetition_penalty=1.2, forced_tokens=tuple(text(12, 9)))  # fmt: skip
    expected = run(make_llm(threads=1), made(forced, RECYCLED))
    llm = make_llm(threads=1)
    assert_same(run(llm, made(forced, RECYCLED), lambda step: step % 3 if step % 5 == 0 else None), expected)
    assert llm.stats().replayed_tokens > 0
    assert llm.stats().generation_tokens == 90, "a token that is replayed is not generated again"


def test_several_choices_of_a_prompt(make_llm: Make) -> None:
    """They share the prompt, also in the step that computes it: what looks at the prompt's last rows sees as many of them."""
    sampling = SamplingParams(n=3, temperature=0.7, seed=1, max_tokens=20, ignore_eos=True, logprobs=0)
    llm = make_llm(threads=1, max_batched_tokens=48, max_num_seqs=8)
    shared = llm.generate([text(70)], sampling, kv=SEEDED)
    assert llm.stats().hit_rate > 0
    for choice, found in zip(sampling.choices(), shared):
        (alone,) = make_llm(threads=1, reuse="off").generate([text(70)], choice, kv=SEEDED)
        assert_same([found.logprobs], [alone.logprobs])


def test_how_a_prompt_is_cut_does_not_show_in_seeds(make_llm: Make) -> None:
    """The last rows of a prompt stay together, whatever room a step has for them."""
    expected = run(make_llm(threads=1), made(greedy(12, logprobs=0), SEEDED, (65,)))
    for room in (61, 62, 64, 30):
        llm = make_llm(threads=1, max_batched_tokens=room, max_num_seqs=8)
        assert_same(run(llm, made(greedy(12, logprobs=0), SEEDED, (65,))), expected)


def test_abort_during_a_replay(make_llm: Make) -> None:
    """What was generated counts, and nothing stays behind."""
    llm = make_llm(threads=1)
    core, (request,) = llm.core, made(greedy(40), RECYCLED, (50,))
    core.add(request)
    for _ in range(12):
        core.step()
    core._scheduler._preempt(request, StepPlan([], []))
    assert llm.stats().queued_tokens == 62
    for _ in range(4):
        assert core.step() == [], "nothing is handed out twice"
    assert request.replay
    output = core.abort("0")
    assert output is not None and output.usage.completion_tokens == 12
    core.check()
    assert not core.busy and llm.stats().queued_tokens == 0 and llm.stats().selection_bytes == 0


def test_displaced_by_priority(make_llm: Make) -> None:
    config = {"threads": 1, "scheduler": "priority", "max_num_seqs": 1, "reuse": "off"}
    expected = run(make_llm(**config), made(greedy(20, logprobs=0), RECYCLED, (50,)))
    llm = make_llm(**config)
    (request,) = made(greedy(20, logprobs=0), RECYCLED, (50,))
    llm.core.add(request)
    found = [entry for _ in range(8) for output in llm.core.step() for entry in output.logprobs]
    llm.core.add(Request(id="urgent", prompt=tuple(text(30)), sampling=greedy(5), priority=-1))
    while llm.core.busy:
        found += [entry for output in llm.core.step() if output.id == "0" for entry in output.logprobs]
    assert llm.stats().preemptions == 1
    assert_same([found], expected)


def test_heads_that_drop_kv_drop_it_again(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention razor: rows beyond the prompt were computed on sinks, a window and a compensation token."""
    scores = RazorCalibration(
        model_key="", model="tiny", induction=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4)), echo=((0.0, 0.0),) * 3
    )
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda key: scores)
    options = '{"induction_share": 0.33, "echo_share": 0.0, "sinks": 3, "min_window": 24, "window_divisor": 4}'
    config = {"threads": 1, "retention": "razor", "retention_options": options, "block_size": 4, "max_batched_tokens": 32}
    expected = run(make_llm(**config), made(greedy(30, logprobs=0), KVOptions()))
    llm = make_llm(**config)
    found = run(llm, made(greedy(30, logprobs=0), KVOptions()), lambda step: step % 3 if step % 5 == 0 else None)
    assert_same(found, expected)
    assert llm.stats().replayed_tokens > 20


def test_dense_requests_replay_nothing(make_llm: Make) -> None:
    llm = make_llm(threads=1)
    run(llm, made(greedy(20, logprobs=0), KVOptions()), lambda step: step % 3 if step % 4 == 0 else None)
    assert llm.stats().preemptions > 2 and llm.stats().replayed_tokens == 0
