"""The whole engine on the Triton back end, in its interpreter: a batch of every selection method and of dense requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.step.runner import Runner
from kvloom.kernels.cuda_graph import CudaGraph
from tests.conftest import native_kernels
from tests.recorded import Recording, launched, recordings
from tests.simulated import GPU, simulated_gpu

__all__ = ["recordings"]
pytest.importorskip("triton")
METHODS = ("sink_window", "tidal_decode", "recycled", "token_select")


def run(llm: LLM) -> list[list[Any]]:
    """Each job's greedy tokens with their log-probabilities; all jobs in one batch."""
    rng = random.Random(0)
    found: dict[str, list[Any]] = {}
    for name in ("dense", *METHODS):
        kv = KVOptions() if name == "dense" else KVOptions(selection=name, budget=16)
        prompt, sampling = [rng.randrange(300) for _ in range(22)], SamplingParams(temperature=0, max_tokens=3, logprobs=0)
        llm.core.add(Request(id=name, prompt=prompt, sampling=sampling, kv=kv))
        found[name] = []
    while llm.core.busy:
        for output in llm.core.step():
            assert output.finish_reason != "error"
            found[output.id].extend(output.logprobs)
    return list(found.values())


def test_every_method_gives_the_log_probabilities_of_the_native_back_end(make_llm: Callable[..., LLM]) -> None:
    native_kernels()
    native, triton = (run(make_llm(backend=backend, reuse="off")) for backend in ("native", "triton"))
    for one, other in zip(native, triton):
        assert len(one) == 3 and [entry.token for entry in one] == [entry.token for entry in other]
        assert [e.logprob for e in one] == pytest.approx([e.logprob for e in other], abs=1e-4)


def test_what_no_kernel_serves_is_refused_at_start(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="block size is 256; the triton back end takes up to 128; choose another --backend"):
        make_llm(backend="triton", block_size=256)


@pytest.mark.parametrize("method", [None, "token_select"])
def test_captured_launches_are_made_again(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], method: str | None
) -> None:
    """Three requests in a graph of four rows: a replay repeats launches with their numbers, and torch's calls."""
    from triton.runtime.interpreter import InterpretedFunction

    from kvloom.kernels.triton import TritonKernels

    settings: dict[str, Any] = {"kv_memory": "256KiB", "max_num_seqs": 4, "max_batched_tokens": 72, "shadow_interval": 0}
    kv = KVOptions() if method is None else KVOptions(selection=method, budget=16)
    prompts, sampling = [[3 + i] * (19 + i) for i in range(3)], SamplingParams(temperature=0, max_tokens=5, logprobs=0)

    def told(llm: LLM) -> list[list[Any]]:
        return [list(result.logprobs) for result in llm.generate(prompts, sampling, kv=kv)]

    wanted = told(make_llm(backend="torch", **settings))
    monkeypatch.setattr(TritonKernels, "graph", lambda self: CudaGraph(GPU))
    monkeypatch.setattr(InterpretedFunction, "run", launched(InterpretedFunction.run))
    monkeypatch.setattr(Runner, "capture", lambda self, told: None)  # not beforehand
    with simulated_gpu(monkeypatch):
        llm = make_llm(backend="triton", device="cuda", **settings)
        found, steps = told(llm), llm.stats().graph_steps
    assert steps["full"] >= 2 and sum(recording.replays for recording in recordings) == steps["full"]
    for one, other in zip(found, wanted, strict=True):
        assert [entry.token for entry in one] == [entry.token for entry in other]
        assert [entry.logprob for entry in one] == pytest.approx([entry.logprob for entry in other], abs=1e-4)
