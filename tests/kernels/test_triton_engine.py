"""The whole engine on the Triton back end, in its interpreter: every method, retention, reuse and drafts give the logits of the
native back end, and no decode step asks a tensor for its value."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.step.runner import Runner
from kvloom.kernels.cuda_graph import CudaGraph
from tests.native import native_kernels
from tests.recorded import Recording, launched, recordings
from tests.selection import test_guard
from tests.selection.conftest import greedy
from tests.selection.test_guard import NoQuestions
from tests.simulated import GPU, simulated_gpu

__all__ = ["recordings"]
pytest.importorskip("triton")

Make = Callable[..., LLM]
calibrated = test_guard.calibrated
RAZOR = {"sinks": 3, "min_window": 8, "window_divisor": 4}
MIXED: dict[str, KVOptions] = {
    "dense": KVOptions(),
    "sink_window": KVOptions(selection="sink_window", budget=16),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=16, options={"layers": (1,)}),
    "tidal_decode, dense output": KVOptions(selection="tidal_decode", budget=16, options={"layers": (1,), "output": "dense"}),
    "recycled": KVOptions(selection="recycled", budget=16, options={"stride": 2}),
    "token_select": KVOptions(selection="token_select", budget=16, options={"theta": 0.3}),
    "sparse prompts": KVOptions(selection="token_select", budget=20, options={"prefill_budget": 20, "chunk": 16}),
    "razor_view": KVOptions(selection="razor_view", options=RAZOR),
    "razor_view, with another method": KVOptions(selection="razor_view", budget=24, options={**RAZOR, "retrieval": "recycled"}),
    "drafts": KVOptions(selection="recycled", budget=16, draft=True, draft_tokens=2),
}
SETTINGS: dict[str, Any] = {"kv_memory": "256KiB", "max_batched_tokens": 128, "max_num_seqs": 16}
SHARED = (
    '{"verified": true, "min_match": 32, "min_reusable": 32, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": false}'
)


def prompt(name: str, length: int) -> list[int]:
    source = random.Random(name)
    return [source.randrange(3, 300) for _ in range(length)]


class Watched:
    """An engine, and the logits of every token that it has drawn."""

    def __init__(self, llm: LLM) -> None:
        self.core, self.logits = llm.core, dict[str, list[Tensor]]()
        llm.core.observer = lambda request, logits: self.logits.setdefault(request.id, []).append(logits[0].clone())
        self.usage: dict[str, Any] = {}

    def add(self, name: str, tokens: list[int], kv: KVOptions, count: int = 3) -> None:
        self.core.add(Request(id=name, prompt=tokens, sampling=greedy(count), kv=kv))

    def step(self) -> None:
        for output in self.core.step():
            assert output.finish_reason != "error", output.id
            self.usage[output.id] = output.usage

    def finish(self) -> Watched:
        while self.core.busy:
            self.step()
        return self


def same(native: Watched, triton: Watched, names: Mapping[str, Any]) -> None:
    """Logits, and so tokens, of all requests."""
    assert native.logits.keys() == triton.logits.keys() >= names.keys()
    for name, wanted in native.logits.items():
        found = triton.logits[name]
        assert len(found) == len(wanted) >= 3
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_every_method_in_one_batch(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the prompts come while the others decode."""
    native_kernels()
    runs, guarded = [], []
    for backend in ("native", "triton"):
        llm = make_llm(backend=backend, reuse="off", **SETTINGS)
        assert llm.model.backend == backend
        watched, runner = Watched(llm), llm.core.runner
        run = runner.run

        def guard(plan: Any, fed: Any, run: Any = run, backend: str = backend) -> Any:
            if any(chunk.prefills for chunk in plan.chunks):
                return run(plan, fed)
            guarded.append(backend)
            with NoQuestions():
                return run(plan, fed)

        monkeypatch.setattr(runner, "run", guard)
        for i, (name, kv) in enumerate(MIXED.items()):
            watched.add(name, prompt(name, 38 + i), kv)
            if i % 5 == 4:
                watched.step()
        runs.append(watched.finish())
        stats = llm.stats().selection
        assert all(stats[kv.selection].attended < stats[kv.selection].held for kv in MIXED.values() if kv.selection)
        assert watched.usage["drafts"].drafted_tokens > 0
    same(*runs, MIXED)
    assert guarded.count("triton") == guarded.count("native") >= 2


def test_retention_beside_selection(make_llm: Make) -> None:
    kvs, runs = {name: MIXED[name] for name in ("dense", "recycled")}, []
    for backend in ("native", "triton"):
        llm = make_llm(backend=backend, **SETTINGS, **test_guard.config(test_guard.RETENTION))
        watched = Watched(llm)
        for name, kv in kvs.items():
            watched.add(name, prompt(name, 70), kv)
        runs.append(watched.finish())
        assert all(usage.attended_tokens < usage.held_tokens for usage in watched.usage.values())
    same(*runs, kvs)


@pytest.mark.parametrize("reuse", ["exact", "approx"])
def test_reuse(make_llm: Make, reuse: str) -> None:
    document, runs = prompt("document", 48), []
    kv = KVOptions(reuse=reuse, reuse_options={"policy": "query", "boundary": 4} if reuse == "approx" else {})
    front = [7] * 6 if reuse == "exact" else [9] * 9
    for backend in ("native", "triton"):
        watched = Watched(make_llm(backend=backend, kvshare_options=SHARED, segment_memory="1MiB", **SETTINGS))
        watched.add("first", [7] * 6 + document, kv)
        watched.finish().add("second", front + document + [11] * 5, kv)
        runs.append(watched.finish())
        usage = watched.usage["second"]
        assert usage.cached_tokens >= 48 if reuse == "exact" else usage.reused_tokens > 0
    same(*runs, {"first": kv, "second": kv})


def test_what_no_kernel_serves_is_refused_at_start(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.kernels.triton.LARGEST_BLOCK", 128)
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
