"""The engine end to end on a tiny random model, against transformers: every way through the scheduler gives the same text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.errors import ConfigError, ContextLengthError, InvalidRequestError
from kvloom.engine.requests.stats import STEP_PROMPT_ROWS

MakeLLM = Callable[..., LLM]
BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 16  # layers, K and V, heads, head_dim, fp32, tokens


def prompts(count: int, *, seed: int = 0, low: int = 1, high: int = 90) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 300) for _ in range(source.randint(low, high))] for _ in range(count)]


def greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from transformers, end of sequence ignored."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.cat([tokens, oracle(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batched_tokens": 7},
        {"max_batched_tokens": 1},
        {"max_num_seqs": 2},
        {"block_size": 1},
        {"block_size": 64, "max_batched_tokens": 33},
        {"kv_memory": 11 * BLOCK_BYTES, "max_model_len": 160},
        {"backend": "reference"},
        {"backend": "torch"},
    ],
    ids=lambda config: ",".join(f"{k}={v}" for k, v in config.items()) or "default",
)
def test_greedy_text_equals_transformers(make_llm: MakeLLM, oracle: Any, config: dict[str, Any]) -> None:
    llm = make_llm(**config)
    batch = prompts(6)
    for _ in range(2):  # the second time with prefix hits
        results = llm.generate(batch, GREEDY)
        for prompt, result in zip(batch, results):
            assert result.tokens == greedy(oracle, prompt, 64)
            assert result.finish_reason == "length"
    if "kv_memory" in config:  # nothing of the first time is left; what is computed again after a preemption is no hit
        assert llm.stats().preemptions > 0
    else:
        assert llm.stats().prefix_hit_tokens > 0


def test_steps_are_counted_by_their_rows_of_prompts(make_llm: MakeLLM) -> None:
    llm = make_llm(max_batched_tokens=40)
    llm.generate([list(range(3, 103))], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    stats = llm.stats()
    by_rows = dict(zip(STEP_PROMPT_ROWS, stats.step_prompt_rows))
    assert {bound: count for bound, count in by_rows.items() if count} == {64: 2, 32: 1, 0: 4}, "40, 40, 20, decoding"
    assert stats.step_prompt_rows_sum == 100 and sum(stats.step_times) == 7
    before = llm.stats().step_times_sum
    llm.core.step()
    after = llm.stats()
    assert after.steps == stats.steps + 1 and after.step_times_sum == before, "a step without rows counts in neither"


def test_log_probabilities_equal_transformers(make_llm: MakeLLM, oracle: Any) -> None:
    llm = make_llm(max_batched_tokens=13)
    prompt = prompts(1, seed=3, low=60)[0]
    sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=4, prompt_logprobs=2)
    result = llm.generate(prompt, sampling)[0]
    with torch.inference_mode():
        expected = torch.log_softmax(oracle(torch.tensor([prompt + result.tokens])).logits[0].double(), -1)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    found = [*result.prompt_logprobs[1:], *result.logprobs]
    assert len(found) == len(prompt) + 9 - 1
    for i, (entry, token) in enumerate(zip(found, (prompt + result.tokens)[1:])):
        assert entry is not None
        assert entry.token == token
        assert entry.logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
        values, ids = expected[i].topk(len(entry.top))
        assert [t for t, _ in entry.top] == ids.tolist()
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.rank == int((expected[i] > expected[i, token]).sum()) + 1
    assert len(result.logprobs[0].top) == 4


def test_prompt_log_probabilities_survive_hits_and_preemption(make_llm: MakeLLM) -> None:
    roomy, tight = make_llm(), make_llm(kv_memory=11 * BLOCK_BYTES, max_model_len=160, max_batched_tokens=32)
    batch = prompts(5, seed=9, low=25, high=32)
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=0)
    expected = [roomy.generate(prompt, sampling)[0] for prompt in batch]
    for result, other in zip(tight.generate(batch, sampling), expected):
        assert result.prompt_logprobs is not None and other.prompt_logprobs is not None
        pairs = list(zip(result.prompt_logprobs[1:], other.prompt_logprobs[1:]))
        assert len(pairs) == len(result.prompt_tokens) - 1
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs if a and b)
    assert tight.stats().preemptions > 0
    again = roomy.generate(batch[0], sampling)[0]
    assert again.usage is not None and again.usage.cached_tokens == 0
    assert again.prompt_logprobs is not None and len(again.prompt_logprobs) == len(batch[0])


def test_same_seed_same_text_whatever_the_batch(make_llm: MakeLLM) -> None:
    llm = make_llm(kv_memory=14 * BLOCK_BYTES, max_model_len=200, max_batched_tokens=24)
    batch = prompts(6, seed=1)
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=40, ignore_eos=True) for i in range(6)]
    alone = [llm.generate(prompt, p)[0].tokens for prompt, p in zip(batch, params)]
    together = [result.tokens for result in llm.generate(batch, params)]
    assert alone == together
    assert llm.stats().preemptions > 0
    other = llm.generate(batch[0], SamplingParams(temperature=0.9, seed=99, max_tokens=40, ignore_eos=True))[0].tokens
    assert other != alone[0]


def test_n_completions(make_llm: MakeLLM) -> None:
    llm = make_llm()
    results = llm.generate([5, 6, 7], SamplingParams(n=3, seed=4, max_tokens=12, ignore_eos=True))
    assert len({tuple(result.tokens) for result in results}) == 3
    second = llm.generate([5, 6, 7], SamplingParams(seed=5, max_tokens=12, ignore_eos=True))[0]
    assert second.tokens == results[1].tokens


def test_a_shared_beginning_is_computed_once_in_the_same_step(make_llm: MakeLLM, oracle: Any) -> None:
    llm = make_llm()
    beginning = prompts(1, seed=11, low=70, high=70)[0]
    batch = [[*beginning, *end] for end in prompts(4, seed=12, low=3, high=20)]
    results = llm.generate(batch, GREEDY)
    assert [r.usage.cached_tokens for r in results if r.usage] == [0, 64, 64, 64]
    for prompt, result in zip(batch, results):
        assert result.tokens == greedy(oracle, prompt, 64)


def test_generated_tokens_are_reused_in_the_next_turn(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = prompts(1, seed=5, low=30, high=30)[0]
    first = llm.generate(prompt, GREEDY)[0]
    second = llm.generate([*prompt, *first.tokens, 9, 10], GREEDY)[0]
    assert second.usage is not None
    assert second.usage.cached_tokens == (30 + 63) // 16 * 16  # the last token's KV was never needed


def test_reuse_can_be_switched_off(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = prompts(1, seed=6, low=40)[0]
    off = KVOptions(reuse="off")
    for kv, cached in ((off, 0), (off, 0), (KVOptions(), 0), (off, 0), (KVOptions(), (len(prompt) - 1) // 16 * 16)):
        usage = llm.generate(prompt, SamplingParams(max_tokens=2), kv=kv)[0].usage
        assert usage is not None and usage.cached_tokens == cached


def test_what_is_kept_of_a_prompt_is_counted_once(make_llm: MakeLLM) -> None:
    llm = make_llm()
    beginning = prompts(1, seed=13, low=70, high=70)[0]
    batch = [[*beginning, *end] for end in prompts(3, seed=14, low=10, high=40)]
    written = [result.usage.written_tokens for result in llm.generate(batch, GREEDY) if result.usage]
    full = [len(prompt) // 16 * 16 for prompt in batch]
    assert written == [full[0], full[1] - 64, full[2] - 64]
    assert [r.usage.written_tokens for r in llm.generate(batch, GREEDY) if r.usage] == [0, 0, 0]
    off = llm.generate(prompts(1, seed=15, low=40)[0], GREEDY, kv=KVOptions(reuse="off"))[0].usage
    assert off is not None and off.written_tokens == 0


def test_what_is_kept_after_preemption_is_no_more_than_the_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm(kv_memory=14 * BLOCK_BYTES, max_model_len=200, max_batched_tokens=24)
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    results = llm.generate(prompts(6, seed=1, low=33, high=60), sampling)
    assert llm.stats().preemptions > 0
    for result in results:
        assert result.usage is not None
        assert result.usage.cached_tokens + result.usage.written_tokens == len(result.prompt_tokens) // 16 * 16


def test_ends(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = prompts(1, seed=7, low=10)[0]
    free = llm.generate(prompt, GREEDY)[0]
    text = free.text
    stop_token = free.tokens[5]
    at = free.tokens.index(stop_token)

    by_token = llm.generate(
        prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop_token_ids=(stop_token,))
    )[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", stop_token)
    assert by_token.tokens == free.tokens[: at + 1]
    assert text.startswith(by_token.text)

    stop = text[8:11]
    by_text = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop=(stop,)))[0]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", stop)
    assert by_text.text == text[: text.index(stop)]
    kept = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate(prompt, kept)[0].text == text[: text.index(stop) + len(stop)]

    later = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop_token_ids=(stop_token,), min_tokens=20)
    result = llm.generate(prompt, later)[0]
    assert len(result.tokens) >= 20
    assert stop_token not in result.tokens[:19]


def test_end_of_sequence_ends_unless_ignored(make_llm: MakeLLM) -> None:
    llm = make_llm()
    forced = {"temperature": 0.0, "max_tokens": 5, "logit_bias": {2: 100.0}}
    ended = llm.generate([5, 6], SamplingParams(**forced))[0]
    assert (ended.tokens, ended.finish_reason, ended.stop_reason, ended.text) == ([2], "stop", None, "")
    ignored = llm.generate([5, 6], SamplingParams(**forced, ignore_eos=True))[0]
    assert (ignored.tokens, ignored.finish_reason) == ([2] * 5, "length")


def test_a_request_may_fill_the_context_and_no_more(make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=40)
    assert len(llm.generate([5] * 30, SamplingParams(ignore_eos=True))[0].tokens) == 10
    assert len(llm.generate([5] * 39, SamplingParams(ignore_eos=True))[0].tokens) == 1
    for prompt, sampling in (([5] * 40, SamplingParams()), ([5] * 30, SamplingParams(max_tokens=11))):
        with pytest.raises(ContextLengthError, match="40"):
            llm.generate(prompt, sampling)


@pytest.mark.parametrize(
    ("prompt", "sampling", "kv", "word"),
    [
        ([], {}, {}, "empty"),
        ([5, 10**6], {}, {}, "vocabulary"),
        ([5, -1], {}, {}, "vocabulary"),
        ([5], {"logit_bias": {10**6: 1.0}}, {}, "vocabulary"),
        ([5], {}, {"selection": "psychic"}, "psychic"),
        ([5], {}, {"reuse": "maybe"}, "off, exact"),
    ],
)
def test_refused_requests_leave_nothing_behind(make_llm: MakeLLM, prompt: list[int], sampling: dict[str, Any],
                                               kv: dict[str, str], word: str) -> None:  # fmt: skip
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match=word):
        llm.generate([[7, 8, 9], prompt], SamplingParams(max_tokens=3, **sampling), kv=KVOptions(**kv))
    assert not llm.core.busy


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"kv_memory": 100}, "at least"),
        ({"kv_memory": "many"}, "4GiB"),
        ({"max_model_len": 10**6}, "512"),
        ({"max_model_len": 500, "kv_memory": 4 * BLOCK_BYTES}, "holds 64 tokens"),
        ({"block_size": 3}, "power of two"),
        ({"scheduler": "chaos"}, "fcfs"),
        ({"bock_size": 16}, "unknown setting"),
        ({"dtype": "fp8"}, "bf16"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_llm: MakeLLM, config: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_llm(**config)


def test_chat_goes_through_the_template(make_llm: MakeLLM) -> None:
    llm = make_llm()
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    single = llm.chat([{"role": "user", "content": "hello"}], sampling)[0]
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert llm.tokenizer.decode(single.prompt_tokens, skip_special_tokens=False) == text
    both = llm.chat([[{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]], sampling)
    assert [r.tokens == single.tokens for r in both] == [True, False]


def test_half_precision_runs_and_agrees_with_full(make_llm: MakeLLM) -> None:
    prompt = prompts(1, seed=8, low=50)[0]
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    expected = make_llm().generate(prompt, sampling)[0].prompt_logprobs
    for dtype, tolerance in (("bf16", 0.15), ("fp16", 0.02)):
        found = make_llm(dtype=dtype, weights="bf16").generate(prompt, sampling)[0].prompt_logprobs
        assert found is not None and expected is not None
        assert max(abs(a.logprob - b.logprob) for a, b in zip(found[1:], expected[1:]) if a and b) < tolerance
