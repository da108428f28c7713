"""The built-in model on real text, against transformers, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.startup.catalog import resolve
from kvloom.loadtest.bench.peers import busy
from kvloom.server.console import FIRST_QUESTION

TEXT = topics.topics["for"] + topics.topics["yield"]
PROMPTS = ("Once upon a time, in a village by the sea,", "def fibonacci(n):\n", "The three laws of thermodynamics are")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("smollm2", dtype="fp32", weights="bf16", kv_memory="512MiB", max_batched_tokens=200)
    yield llm
    llm.core.check()
    assert llm.core.cache.pool.in_use == 0


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    path: Path = resolve("smollm2").path
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=config
    ).eval()


def test_log_probabilities_of_real_text(llm: LLM, oracle: Any) -> None:
    tokens = llm.tokenizer.encode(TEXT)[:700]
    result = llm.generate(tokens, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    with torch.inference_mode():
        expected = torch.log_softmax(oracle(torch.tensor([tokens])).logits[0].double(), -1)
    assert result.prompt_logprobs is not None
    for i, entry in enumerate(result.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[i, tokens[i + 1]].item(), abs=1e-3)
    found = torch.tensor([entry.logprob for entry in result.prompt_logprobs[1:] if entry])
    wanted = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert (found - wanted).abs().mean() < 1e-4


def test_greedy_text(llm: LLM, oracle: Any) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, sampling)):
        tokens = torch.tensor([llm.tokenizer.encode(prompt)])
        with torch.inference_mode():
            expected = oracle.generate(tokens, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, tokens.shape[1] :]
        assert result.tokens == expected.tolist()


def test_a_conversation(llm: LLM) -> None:
    answer = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=40)
    )[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|" not in answer.text


def test_a_first_question_is_answered_right_at_default_settings() -> None:
    """Twenty seeds with the sampling of the model's card, which the server uses where a request says nothing."""
    llm, default = LLM("smollm2", kv_memory="64MiB"), resolve("smollm2").sampling
    asked = [[{"role": "user", "content": FIRST_QUESTION}]] * 20
    sampling = [
        SamplingParams(temperature=default.temperature, top_p=default.top_p, max_tokens=16, seed=seed) for seed in range(20)
    ]
    assert {done.text for done in llm.chat(asked, sampling)} == {"The capital of Japan is Tokyo."}


def test_seeded_tokens_are_the_same_beside_busy_processes() -> None:
    """Whichever thread takes which piece of work, and whenever: with codes of 4 bits, in a batch, captured steps."""
    llm = LLM("smollm2", kv_memory="512MiB", reuse="off")
    sampling = [SamplingParams(temperature=0.9, seed=seed, max_tokens=24, ignore_eos=True, logprobs=0) for seed in range(3)]

    def run() -> list[tuple[list[int], list[float]]]:
        results = llm.generate(PROMPTS, sampling)
        return [(result.tokens, [entry.logprob for entry in result.logprobs]) for result in results]

    idle = run()
    with busy(2):
        assert [run() for _ in range(3)] == [idle] * 3
