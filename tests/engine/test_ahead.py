"""Steps that are launched before the tokens of the one in front are known, on a simulated GPU:
tokens, KV and figures are those of steps that wait for one another."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.core import Pending
from kvloom.engine.requests.request import Request, RequestOutput
from tests.recorded import Recording, recordings
from tests.selection import test_guard
from tests.selection.conftest import retrieval_heads
from tests.selection.test_guard import EVERY, METHODS, config
from tests.simulated import simulated_gpu

__all__ = ["recordings", "retrieval_heads"]
calibrated = test_guard.calibrated
Make = Callable[..., LLM]
SETTINGS = {"backend": "torch", "kv_memory": "1MiB", "max_num_seqs": 3, "max_batched_tokens": 256, "shadow_interval": 0}
DRAWN = SamplingParams(max_tokens=7, temperature=0.9, ignore_eos=True)


def request(name: str, kv: KVOptions, sampling: SamplingParams = DRAWN, length: int = 50) -> Request:
    rng = random.Random(name)
    return Request(id=name, prompt=[rng.randrange(3, 300) for _ in range(length)], sampling=replace(sampling, seed=7), kv=kv)


def serve(llm: LLM, arrivals: dict[int, list[Request]], between: Callable[[int], Any] = lambda step: None) -> dict[str, Any]:
    """Tokens of requests that come before these steps, and how they ended. between: called before every step."""
    told: dict[str, Any] = {one.id: [] for some in arrivals.values() for one in some}
    step = 0
    while llm.core.busy or step <= max(arrivals):
        between(step)
        for one in arrivals.get(step, []):
            llm.core.add(one)
        note(told, llm.core.step())
        step += 1
        assert step < 300
    return told


def note(told: dict[str, Any], outputs: list[RequestOutput]) -> None:
    for output in outputs:
        told[output.id] += [*output.tokens, *([output.finish_reason] if output.finish_reason else [])]


def coming(kvs: list[KVOptions], sampling: SamplingParams = DRAWN) -> dict[int, list[Request]]:
    """Two requests at once, and later more than there are slots for."""

    def some(step: int, count: int) -> list[Request]:
        return [request(f"{step} {i}", kvs[i % len(kvs)], sampling, 37 + 4 * i) for i in range(count)]

    return {0: some(0, 2), 4: some(4, 2)}


def compare(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, arrivals: Callable[[], dict[int, list[Request]]], **settings: Any
) -> tuple[int, dict[str, Any]]:
    """Serve with and without. Returns the steps that were launched ahead, and what was told."""
    with simulated_gpu(monkeypatch):
        waiting = make_llm(device="cuda", async_scheduling=False, **SETTINGS, **settings)
        wanted = serve(waiting, arrivals())
        ahead = make_llm(device="cuda", **SETTINGS, **settings)
        assert serve(ahead, arrivals()) == wanted
        assert waiting.stats().ahead_steps == 0
        return ahead.stats().ahead_steps, wanted


CASES = ("dense", "token_select", "razor_view, with another method", "retention razor", "retention razor, recycled")


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_steps_that_wait(make_llm: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    steps, told = compare(make_llm, monkeypatch, lambda: coming([EVERY[name]]), **config(name))
    assert steps >= 6 and all(len(tokens) == 8 and tokens[-1] == "length" for tokens in told.values())


def test_several_methods_at_once(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = compare(make_llm, monkeypatch, lambda: coming([METHODS[name] for name in ("recycled", "dense", "token_select")]))
    assert steps >= 6


def test_a_token_that_ends_a_request_drops_the_row_behind_it(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a high temperature the end comes soon, and nobody knows when."""
    sampling = SamplingParams(max_tokens=12, temperature=5.0, stop_token_ids=tuple(range(3, 60)))
    steps, told = compare(make_llm, monkeypatch, lambda: coming([METHODS["recycled"], KVOptions()], sampling))
    ends = {len(tokens) for tokens in told.values()}
    assert steps >= 3 and len(ends) > 1 and any(tokens[-1] == "stop" for tokens in told.values())


def test_forced_tokens_are_fed(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = SamplingParams(max_tokens=7, temperature=0.9, forced_tokens=tuple(range(100, 105)), ignore_eos=True)
    steps, told = compare(make_llm, monkeypatch, lambda: coming([KVOptions()], forced))
    assert steps >= 6 and all(tokens[:5] == list(range(100, 105)) for tokens in told.values())


@pytest.mark.parametrize(
    ("sampling", "kv"),
    [
        (replace(DRAWN, frequency_penalty=0.5), KVOptions()),
        (replace(DRAWN, repetition_penalty=1.2), KVOptions()),
        (replace(DRAWN, logprobs=2), KVOptions()),
        (DRAWN, KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,)}, draft=True)),
        (DRAWN, KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,), "correct_every": 2})),
    ],
)  # fmt: skip
def test_what_the_host_must_know_is_waited_for(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, kv: KVOptions
) -> None:
    steps, _ = compare(make_llm, monkeypatch, lambda: coming([kv], sampling))
    assert steps == 0


def test_bias_and_least_tokens_need_no_waiting(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(max_tokens=7, min_tokens=6, temperature=0.9, logit_bias={5: 20.0, 2: 30.0})
    steps, told = compare(make_llm, monkeypatch, lambda: coming([KVOptions()], sampling))
    assert steps >= 6 and all(tokens == [5] * 6 + [2, "stop"] for tokens in told.values())


def test_launched_before_collected(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step but the first and last is queued while the one in front has not been computed."""
    events: list[str] = []
    with simulated_gpu(monkeypatch):
        llm: Any = make_llm(device="cuda", **SETTINGS)
        launch, collect = llm.core._launch, llm.core._collect

        def launched(plan: Any, before: Pending | None = None) -> Pending:
            events.append("launch")
            made: Pending = launch(plan, before)
            return made

        def collected(pending: Pending, outputs: list[RequestOutput]) -> None:
            events.append("collect")
            collect(pending, outputs)

        monkeypatch.setattr(llm.core, "_launch", launched)
        monkeypatch.setattr(llm.core, "_collect", collected)
        serve(llm, {0: [request("a", KVOptions(), replace(DRAWN, max_tokens=6))]})
    prompt, decodes = ["launch", "collect"], ["launch", *["launch", "collect"] * 4, "collect"]
    assert events == [*prompt, *decodes]


def test_aborts_between(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a request whose row is under way, and whose id another takes at once: the others get what they would have got."""
    with simulated_gpu(monkeypatch):
        alone = serve(make_llm(device="cuda", **SETTINGS), {0: [request("b", KVOptions())]})["b"]
        llm = make_llm(device="cuda", **SETTINGS)
        again = replace(DRAWN, max_tokens=3)

        def between(step: int) -> None:
            if step == 3:
                assert llm.core._ahead is not None
                ended = llm.core.abort("a")
                assert ended is not None and ended.finish_reason == "abort"
                llm.core.add(request("a", KVOptions(), again, 90))

        told = serve(llm, {0: [request("a", KVOptions()), request("b", KVOptions())]}, between)
        fresh = serve(make_llm(device="cuda", **SETTINGS), {0: [request("a", KVOptions(), again, 90)]})["a"]
    assert told["b"] == alone and told["a"][3:] == fresh


def test_everybody_is_aborted(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **SETTINGS)
        alone = serve(make_llm(device="cuda", **SETTINGS), {0: [request("b", KVOptions())]})["b"]
        llm.core.add(request("a", KVOptions()))
        for _ in range(4):
            llm.core.step()
        llm.core.abort("a")
        assert not llm.core.busy and llm.core.cache.pool.in_use == 0
        llm.core.check()
        assert serve(llm, {0: [request("b", KVOptions())]})["b"] == alone


def test_logits_that_are_not_finite_end_their_request(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch):
        alone = serve(make_llm(device="cuda", **SETTINGS), {0: [request("b", KVOptions())]})["b"]
        llm: Any = make_llm(device="cuda", **SETTINGS)
        steps, logits = iter(range(1000)), llm.core.runner.logits

        def broken(result: Any, rows: list[int]) -> torch.Tensor:
            found = logits(result, rows)
            if next(steps) == 3:
                found[0] = torch.nan
            made: torch.Tensor = found
            return made

        monkeypatch.setattr(llm.core.runner, "logits", broken)
        told = serve(llm, {0: [request("a", KVOptions()), request("b", KVOptions())]})
        assert llm.stats().ahead_steps > 2
    assert told["a"][3:] == ["error"] and told["b"] == alone


def test_a_step_that_cannot_be_launched_ends_its_own_requests(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in front is collected all the same, and the engine goes on."""
    with simulated_gpu(monkeypatch):
        llm: Any = make_llm(device="cuda", **SETTINGS)
        run = llm.core.runner.run

        def fails(plan: Any, fed: Any = None) -> Any:
            if fed is not None and len(plan.chunks) == 2:
                raise RuntimeError("the driver is gone")
            return run(plan, fed)

        monkeypatch.setattr(llm.core.runner, "run", fails)
        told = serve(llm, {0: [request("a", KVOptions()), request("b", KVOptions())]})
        assert told == {"a": [told["a"][0], "error"], "b": [told["b"][0], "error"]}
        llm.core.check()
        alone = serve(llm, {0: [request("c", KVOptions())]})["c"]
        assert alone == serve(make_llm(device="cuda", **SETTINGS), {0: [request("c", KVOptions())]})["c"]


def test_memory_for_one_more_token_is_not_taken_from_others(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks run out, the next step is planned as ever: somebody is preempted, and both end as they would alone."""
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **{**SETTINGS, "kv_memory": "84KiB", "max_model_len": 80})
        arrivals = [request(name, METHODS["recycled"], replace(DRAWN, max_tokens=14), 40) for name in "ab"]
        told = serve(llm, {0: arrivals})
        assert llm.stats().preemptions > 0 and llm.stats().ahead_steps > 6
        for name in "ab":
            one = request(name, METHODS["recycled"], replace(DRAWN, max_tokens=14), 40)
            assert told[name] == serve(llm, {0: [one]})[name]


def test_whoever_comes_is_let_in_at_once(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slot free: the step under way is collected, and the next is planned with the newcomer."""
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **SETTINGS)
        llm.core.add(request("a", KVOptions()))
        for _ in range(4):
            llm.core.step()
        llm.core.add(request("b", KVOptions()))
        told: dict[str, Any] = {"a": [], "b": []}
        for _ in range(2):
            note(told, llm.core.step())
        assert len(told["b"]) == 1
        llm.core.abort("a"), llm.core.abort("b")


def test_captured_steps_are_launched_ahead_too(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    """Replays write where the last one's numbers are still to be read, on their way to the host alone."""
    with simulated_gpu(monkeypatch):
        waiting = make_llm(device="cuda", async_scheduling=False, **SETTINGS)
        wanted = serve(waiting, coming([METHODS["recycled"]]))
        llm = make_llm(device="cuda", **SETTINGS)
        assert serve(llm, coming([METHODS["recycled"]])) == wanted
        assert llm.stats().ahead_steps >= 6 and llm.stats().graph_steps["full"] >= 6
        found, expected = llm.stats().selection["recycled"], waiting.stats().selection["recycled"]
        assert (found.decode_rows, found.selections, found.reused) == (
            expected.decode_rows, expected.selections, expected.reused,
        )  # fmt: skip
