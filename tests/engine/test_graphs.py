"""Steps captured for one number of rows each, as CUDA graphs are, on a simulated GPU that records: what is replayed gives what
a CPU gives, whatever has changed since it was captured, and padding leaves no trace."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, KVOptions
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.decoder import Decoder
from kvloom.engine.requests.request import Request
from kvloom.engine.step.runner import Runner, capture_sizes
from kvloom.kernels.cuda_graph import CudaGraph
from kvloom.kernels.graph import CaptureError
from tests.recorded import Recording, recordings
from tests.selection import test_guard
from tests.selection.conftest import greedy, retrieval_heads
from tests.selection.test_guard import EVERY, METHODS, config
from tests.simulated import GPU, STREAM, simulated_gpu

__all__ = ["recordings", "retrieval_heads"]
calibrated = test_guard.calibrated
Make = Callable[..., LLM]
SETTINGS = {"backend": "torch", "kv_memory": "1MiB", "max_num_seqs": 6, "max_batched_tokens": 256, "shadow_interval": 0}
GIVE_UP = Decoder._give_up
SIZES, LAYERS = [1, 2, 4, 6], 3
ARRIVALS = {0: (3, 8), 4: (2, 6)}
"""By step: how many requests come, and how many tokens the first of them gets; each later one gets one more."""
CASES = {**EVERY, "drafts": KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,)}, draft=True)}


def serve(llm: LLM, kvs: list[KVOptions]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log-probabilities of requests that come and go, with these options in turn."""
    rng, told, steps = random.Random(0), dict[str, list[tuple[int, float]]](), 0
    while llm.core.busy or steps <= max(ARRIVALS):
        count, tokens = ARRIVALS.get(steps, (0, 0))
        for i in range(count):
            prompt = [rng.randrange(3, 300) for _ in range(42 + 11 * i)]
            name, kv = f"{steps} {i}", kvs[len(told) % len(kvs)]
            told[name] = []
            llm.core.add(Request(id=name, prompt=prompt, sampling=greedy(tokens + i, logprobs=0), kv=kv))
        for output in llm.core.step():
            assert output.finish_reason != "error"
            told[output.id] += [(entry.token, entry.logprob) for entry in output.logprobs]
        steps += 1
    return told


def memory(llm: LLM) -> list[Tensor]:
    """All KV, and what methods remember, as fp32."""
    kv = [tensor for group in llm.core.cache.groups for pair in group.storage.layers for tensor in pair]
    return [getattr(tensor, "here", tensor) for tensor in (*kv, llm.core.states.words)]


def same_memory(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To the bit, but for numbers that were computed in batches of another size."""
    for one, other in zip(found, wanted, strict=True):
        values, others = one.view(torch.float32), other.view(torch.float32)
        near = ((values - others).abs() <= 1e-4) & (values.abs() > 1e-30) & (others.abs() > 1e-30)
        assert ((one == other) | near).all()


def same(found: dict[str, list[tuple[int, float]]], wanted: dict[str, list[tuple[int, float]]]) -> None:
    assert found.keys() == wanted.keys()
    for name, tokens in wanted.items():
        assert [token for token, _ in found[name]] == [token for token, _ in tokens]
        assert [logprob for _, logprob in found[name]] == pytest.approx([logprob for _, logprob in tokens], abs=1e-4)


def compare(make_llm: Make, monkeypatch: pytest.MonkeyPatch, kvs: list[KVOptions], **settings: Any) -> tuple[LLM, Counter[int]]:
    """Serve on a CPU and with captures: everything is the same. Returns the engine with captures, and how many rows its steps
    of single ones had, how often each."""
    cpu = make_llm(**SETTINGS, **settings)
    wanted = serve(cpu, kvs)
    with simulated_gpu(monkeypatch):
        gpu = make_llm(device="cuda", **SETTINGS, **settings)
        runner: Any = gpu.core.runner
        rows, run = Counter[int](), runner.run

        def counted(plan: Any, fed: Any) -> Any:
            if all(chunk.count == 1 for chunk in plan.chunks):
                rows[plan.rows] += 1
            return run(plan, fed)

        monkeypatch.setattr(runner, "run", counted)
        same(serve(gpu, kvs), wanted)
        same_memory(memory(gpu), memory(cpu))
        assert runner._kernels.counters == cpu.core.runner._kernels.counters
        found, expected = gpu.stats(), cpu.stats()
    assert {name: stats.decode_rows for name, stats in found.selection.items()} == {
        name: stats.decode_rows for name, stats in expected.selection.items()
    }
    for name, stats in expected.selection.items():
        assert asdict(found.selection[name]) == asdict(stats)
    return gpu, rows


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_give_what_a_cpu_gives(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], name: str
) -> None:
    """Requests come and go, and lengths, lists and tables change in between; most steps have fewer rows than were captured."""
    gpu, rows = compare(make_llm, monkeypatch, [CASES[name]], **config(name))
    steps, programs = gpu.stats().graph_steps, {key.program for key in gpu.core.runner.decoder._graphs if key.mode == "full"}
    assert 3 in rows and 3 not in SIZES and (5 in rows or name == "drafts"), "steps were padded"
    assert steps["full"] >= (1 if name == "drafts" else 4), "steps were replayed"
    assert (programs == {None}) == (CASES[name].selection is None)
    assert sum(recording.replays for recording in recordings) == steps["full"] + LAYERS * steps["piecewise"]


def test_steps_of_several_methods_are_replayed_but_for_attention(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    kvs = [METHODS[name] for name in ("dense", "recycled", "sink_window")]
    gpu, rows = compare(make_llm, monkeypatch, kvs)
    assert {3, 5} <= rows.keys() and gpu.stats().graph_steps["piecewise"] >= 3


def test_re_indexed_positions_run_eagerly(make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    kv = KVOptions(selection="token_select", budget=40, options={"positions": "reindexed", "theta": 0.3})
    gpu, rows = compare(make_llm, monkeypatch, [kv])
    assert {3, 5} <= rows.keys() and gpu.stats().graph_steps["full"] == 0


def test_graphs_are_captured_at_start(make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Of all sizes, the largest first; and the first step that decodes replays one."""
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **SETTINGS)
        decoder: Any = llm.core.runner.decoder
        assert [key.rows for key in decoder._graphs] == SIZES[::-1] and len(recordings) == len(SIZES)
        assert not any(tensor.any() for tensor in memory(llm)) and not any(asdict(llm.core.runner._kernels.counters).values())
        started = dict(llm.stats().graph_steps)
        llm.generate([[5] * 30, [7] * 9, [9] * 4], greedy(4))
        steps = llm.stats().graph_steps
        assert len(recordings) == len(SIZES) and {key.rows for key in decoder._graphs} == set(SIZES)
        assert (steps["full"], steps["none"] - started["none"]) == (3, 1)


def test_graphs_are_captured_with_progress(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    told: list[tuple[int, int]] = []
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **SETTINGS)
        llm.core.runner.capture(lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(5)]


def test_what_cannot_be_captured_ends_the_start_with_advice(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CudaGraph, "piece", fails)
    with simulated_gpu(monkeypatch), pytest.raises(ConfigError, match=r"not permitted .*; use --enforce-eager"):
        make_llm(device="cuda", **SETTINGS)


@pytest.mark.parametrize("error", [RuntimeError("the capture was invalidated"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_captures_that_fail_at_start_end_it(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], error: Exception
) -> None:
    def fails(recording: Recording) -> None:
        ended(recording)
        raise error

    ended = Recording.capture_end
    monkeypatch.setattr(Decoder, "_give_up", GIVE_UP)
    monkeypatch.setattr(Recording, "capture_end", fails)
    with simulated_gpu(monkeypatch), pytest.raises(ConfigError, match=r"invalidated; use --enforce-eager|CUDA|memory"):
        make_llm(device="cuda", **SETTINGS)


@pytest.mark.parametrize(
    ("when", "names"),
    [("capture_begin", ("recycled",)), ("in between", ("recycled",)), ("capture_end", ("dense", "recycled", "sink_window"))],
)
def test_steps_whose_capture_fails_run_eagerly(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], caplog: pytest.LogCaptureFixture, when: str,
    names: tuple[str, ...],
) -> None:  # fmt: skip
    """Nobody is harmed, and nothing is done twice: state and counters are those of a CPU. Each graph is tried once."""
    begin, end, give_up = Recording.capture_begin, Recording.capture_end, GIVE_UP
    tried: list[Any] = []

    def begins(recording: Recording, *args: Any, **kwargs: Any) -> None:
        if when == "capture_begin" and serving:
            raise RuntimeError("no capture")
        begin(recording, *args, **kwargs)

    def ends(recording: Recording) -> None:
        end(recording)
        if when == "capture_end" and serving:
            raise RuntimeError("no capture")

    def asked(self: Any, calls: Any) -> Any:
        def once() -> Any:
            if STREAM.captured is not None and when == "in between" and serving:
                calls()
                raise RuntimeError("no capture")
            return calls()

        return piece(self, once)

    def gives_up(decoder: Decoder, key: Any, error: CaptureError) -> None:
        tried.append(key)
        give_up(decoder, key, error)

    piece, serving = CudaGraph.piece, False
    monkeypatch.setattr(Decoder, "_give_up", gives_up)
    monkeypatch.setattr(Recording, "capture_begin", begins)
    monkeypatch.setattr(Recording, "capture_end", ends)
    monkeypatch.setattr(CudaGraph, "piece", asked)
    started = Runner.capture

    def starts(runner: Runner, told: Any) -> None:
        nonlocal serving
        serving = False
        started(runner, told)
        serving = True

    monkeypatch.setattr(Runner, "capture", starts)
    gpu, _ = compare(make_llm, monkeypatch, [METHODS[name] for name in names])
    stats = gpu.stats()
    assert tried and len(tried) == len(set(tried)) == stats.graph_failures == len(caplog.messages)
    assert all("cannot be captured, and run eagerly: no capture" in message for message in caplog.messages)
    assert not stats.graph_steps["piecewise"] and (stats.graph_steps["full"] == 0 or "dense" in names)


def test_eager_engines_capture_nothing(make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", enforce_eager=True, **SETTINGS)
        found = llm.generate([[5] * 30, [7] * 9, [9] * 4], greedy(4))
        steps = llm.stats().graph_steps
    assert not recordings and steps == {"none": 4, "piecewise": 0, "full": 0}
    assert [one.tokens for one in found] == [
        one.tokens for one in make_llm(device="cpu", **SETTINGS).generate([[5] * 30, [7] * 9, [9] * 4], greedy(4))
    ]


def test_sizes_are_those_of_vllm() -> None:
    assert capture_sizes(32) == [1, 2, 4, 8, 16, 24, 32] and capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert capture_sizes(1) == [1] and capture_sizes(3) == [1, 2, 3]


def test_what_a_capture_refuses_is_refused(monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    with simulated_gpu(monkeypatch):
        there, here = torch.arange(4.0, device=GPU), torch.arange(4.0)
        for asks in (
            lambda: there.sum().item(), there.tolist, lambda: there.nonzero(), lambda: bool((there > 1).any()),
            lambda: there.copy_(here), lambda: there.cpu(), lambda: there[there > 1], lambda: here.to(GPU),
        ):  # fmt: skip
            asks()
            with pytest.raises(CaptureError, match="while calls are captured"):
                CudaGraph(GPU).piece(asks)
            assert there.tolist() == [0, 1, 2, 3], "a failed capture ends"


def test_a_replay_reads_tensors_and_repeats_numbers(monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Nothing is computed while calls are captured; what they make is not to be read by others."""
    with simulated_gpu(monkeypatch):
        source, into, number = torch.arange(3.0, device=GPU), torch.zeros(3, device=GPU), 2.0
        kept: list[Tensor] = []

        def calls() -> None:
            kept.append(source * number)
            into.add_(kept[-1])

        graph = CudaGraph(GPU)
        graph.piece(calls)
        assert into.tolist() == [0, 2, 4] and kept[0].tolist() == [0, 2, 4] and kept[1].isnan().all()
        source.fill_(1.0)
        number = 50.0
        graph.replay(0, 3)
        assert into.tolist() == [2, 4, 6] and kept[1].isnan().all()
