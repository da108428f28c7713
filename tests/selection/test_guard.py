"""A decode step asks no tensor for its value before its logits are there, and makes its kernel calls at the same addresses as
the step before: so it can be replayed, on any device."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.requests.request import KVOptions, Request
from tests.selection.conftest import greedy

Make = Callable[..., LLM]
RAZOR = {"sinks": 3, "min_window": 20, "window_divisor": 4}
METHODS: dict[str, KVOptions] = {
    "dense": KVOptions(),
    "sink_window": KVOptions(selection="sink_window", budget=32),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,)}),
    "tidal_decode, dense output": KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,), "output": "dense"}),
    "recycled": KVOptions(selection="recycled", budget=32, options={"stride": 3}),
    "recycled, dense refresh": KVOptions(selection="recycled", budget=32, options={"refresh": "dense", "check_every": 1}),
    "token_select": KVOptions(selection="token_select", budget=32, options={"theta": 0.3, "max_gap": 5}),
    "razor_view": KVOptions(selection="razor_view", options=RAZOR),
    "razor_view, nothing for what is dropped": KVOptions(selection="razor_view", options={**RAZOR, "compensation": False}),
    "razor_view, with another method": KVOptions(selection="razor_view", budget=40, options={**RAZOR, "retrieval": "recycled"}),
}
RETENTION = "retention razor"
"""What an engine keeps: local heads give blocks back, while methods choose among retrieval heads."""
EVERY: dict[str, KVOptions] = {
    **METHODS,
    RETENTION: KVOptions(),
    **{f"{RETENTION}, {name}": kv for name, kv in METHODS.items() if name.startswith(("sink", "tidal", "recycled", "token"))},
}


def config(name: str) -> dict[str, Any]:
    """Of the engine."""
    options = json.dumps({"induction_share": 0.33, **RAZOR})
    return {"retention": "razor", "retention_options": options} if name.startswith(RETENTION) else {}


ASKS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "any", "all", "unique", "cpu"}
"""Of tensors: what a host has to wait for, or what only leads to that."""


class NoQuestions(TorchFunctionMode):
    """Fails where a tensor's value is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ASKS, f"a step asks for a tensor's {name}"
        return func(*args, **(kwargs or {}))


class NothingMade(TorchDispatchMode):
    """Fails where a tensor with memory of its own is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        assert not isinstance(made, Tensor) or made.untyped_storage().data_ptr() in known, f"{func} makes a tensor"
        return made


class Addresses:
    """Kernels that note where the tensors of every call lie."""

    CALLS = ("attend", "score", "pool", "select", "renew", "rotate_store", "fold")

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        if name not in self.CALLS:
            return function

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, tuple(found for value in (*args, *kwargs.values()) for found in where(value))))
            return function(*args, **kwargs)

        return noted


def where(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        yield value.data_ptr()
    elif isinstance(value, tuple):
        for part in value:
            yield from where(part)
    elif hasattr(value, "handle"):
        yield value.handle  # a plan


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the retention: one head of each layer keeps everything."""
    scores = RazorCalibration(model_key="", model="", induction=((0.1, 0.9), (0.8, 0.2), (0.3, 0.7)), echo=((0.0, 0.0),) * 3)
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda key: scores)


def started(llm: LLM, kvs: list[KVOptions], tokens: int) -> None:
    """Requests of 60 tokens and more, all of which decode from the next step on."""
    rng = random.Random(0)
    for i, kv in enumerate(kvs):
        prompt = [rng.randrange(300) for _ in range(60 + i)]
        llm.core.add(Request(id=f"job {i}", prompt=prompt, sampling=greedy(tokens), kv=kv))
    for _ in range(4):
        llm.core.step()


@pytest.mark.parametrize("name", [*EVERY, "mixed"])
def test_nobody_asks_for_values_before_there_are_logits(make_llm: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    llm = make_llm(backend="native", **config(name))
    runner: Any = llm.core.runner
    runner.decoder._most = "none"
    started(llm, list(METHODS.values()) if name == "mixed" else [EVERY[name]] * 3, 30)
    guarded = 0

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            nonlocal guarded
            guarded += 1
            with NoQuestions():
                return function(*args, **kwargs)

        return within

    monkeypatch.setattr(runner, "run", guard(runner.run))
    monkeypatch.setattr(runner, "logits", guard(runner.logits))
    for _ in range(12):
        llm.core.step()
    assert guarded == 24
    while llm.core.busy:
        llm.core.step()
    stats = llm.stats().selection
    if name not in ("dense", RETENTION):
        assert sum(method.decode_rows for method in stats.values()) > 12


def test_the_guard_sees_questions() -> None:
    for ask in (lambda t: t.item(), lambda t: bool(t > 0), lambda t: t[None].tolist(), lambda t: t.numpy(), lambda t: int(t)):
        with NoQuestions(), pytest.raises(AssertionError, match="asks for a tensor's"):
            ask(torch.tensor(1.0))


@pytest.mark.parametrize("name", EVERY)
def test_steps_make_their_calls_at_the_same_addresses(make_llm: Make, name: str) -> None:
    """And make no tensor on the way: nothing that a captured call is given goes with the step."""
    llm = make_llm(backend="native", **config(name))
    runner: Any = llm.core.runner
    runner.decoder._most = "none"
    kernels, decoder = runner._kernels, runner.decoder
    state = llm.core.states.words.data_ptr()
    started(llm, [EVERY[name]] * 3, 40)
    users, forward = (runner, runner._attention), decoder.forward

    def guarded(tokens: Tensor, attention: Any, *how: Any) -> Tensor:
        def attend(*args: Any) -> Tensor:
            with NothingMade():
                return attention(*args)

        return forward(tokens, attend, *how)

    with contextlib.ExitStack() as undo:
        undo.callback(lambda: [setattr(of, "_kernels", kernels) for of in users])
        undo.callback(setattr, decoder, "forward", forward)
        decoder.forward = guarded
        steps = []
        for _ in range(20):
            noted = Addresses(kernels)
            for user in users:
                user._kernels = noted
            llm.core.step()
            steps.append(noted.seen)
    assert len(steps[0]) >= 2 * 3 and all(step == steps[0] for step in steps[1:])
    assert llm.core.states.words.data_ptr() == state
    assert ("fold" in {call for call, _ in steps[0]}) == (name.startswith("razor_view") and "nothing" not in name)
    while llm.core.busy:
        llm.core.step()


@pytest.mark.parametrize("name", EVERY)
def test_steps_of_one_kind_are_captured_whole(make_llm: Make, name: str) -> None:
    llm = make_llm(backend="native", weights="int8", dtype="bf16", **config(name))
    decoder: Any = llm.core.runner.decoder
    started(llm, [EVERY[name]] * 3, 40)
    known = dict(decoder._graphs)
    assert {key.mode for key in known} == {"full"}
    for _ in range(20):
        llm.core.step()
    assert {key: id(graph) for key, graph in decoder._graphs.items()} == {key: id(graph) for key, graph in known.items()}
    while llm.core.busy:
        llm.core.step()
