"""Whole steps on the device: replays against single calls, and tokens per second of every method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from kvloom.engine.core import EngineCore
from kvloom.engine.errors import KVLoomError
from kvloom.engine.model.decoder import GraphMode
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.kernels import Kernels
from kvloom.loadtest.bench.contexts import random_tokens, remember
from kvloom.loadtest.bench.roofline import Shape
from kvloom.loadtest.gpu_check import random_model
from kvloom.loadtest.gpu_check.stages import Deadline, Finding, Verdict

RAZOR = "kvloom.engine.retention.window.find_razor"
WARM_UP = 4
"""Steps that are not counted: kernels are compiled and graphs captured in them."""


class Load(NamedTuple):
    """Requests that decode together."""

    batch: int
    context: int
    budget: int


class Sizes(NamedTuple):
    """Of a run: the model whose steps are timed, its loads, and the model whose replays are compared."""

    shape: Shape
    loads: tuple[Load, ...]
    steps: int
    small: Shape
    compared: Load


def methods(budget: int) -> dict[str, KVOptions]:
    """Every selection method, with selection layers of its own where those come from a calibration."""
    names = ("sink_window", "token_select", "recycled")
    return {
        "dense": KVOptions(selection="dense"),
        **{name: KVOptions(selection=name, budget=budget) for name in names},
        "tidal_decode": KVOptions(selection="tidal_decode", budget=budget, options={"layers": (1,)}),
        "razor_view": KVOptions(selection="razor_view", options={"min_window": budget, "sinks": 4}),
    }


class Failed(KVLoomError):
    """A request ended with an error; the engine's log says why."""


@contextmanager
def decoding(core: EngineCore, kv: KVOptions, load: Load, vocab: int, tokens: int) -> Iterator[dict[str, list[int]]]:
    """Requests whose contexts are found in the prefix cache, and their tokens so far. They are gone afterwards."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [random_tokens(load.context, vocab, 100 + i) for i in range(load.batch)]
    found: dict[str, list[int]] = {f"{kv.selection} {i}": [] for i in range(load.batch)}
    try:
        for name, prompt in zip(found, prompts):
            remember(core, prompt)
            core.add(Request(id=name, prompt=prompt, sampling=sampling, kv=kv))
        yield found
    finally:
        for name in found:
            core.abort(name)
        core.check()
        core.cache.evict()


def step(core: EngineCore, found: dict[str, list[int]]) -> None:
    """One step; its tokens are added. Raises Failed."""
    for output in core.step():
        if output.finish_reason == "error":
            raise Failed(f"request {output.id} has failed: {output.error}")
        found[output.id].extend(output.tokens)


def unread(core: EngineCore, kv: KVOptions) -> float:
    """Positions that a method's decode rows had before them and did not read, so far."""
    if kv.selection in (None, "dense"):
        return 0.0
    stats = core.stats().selection[kv.selection]
    return stats.held - stats.attended


def _engine(
    shape: Shape, loads: tuple[Load, ...], steps: int, kernels: Kernels, device: torch.device, bits: int = 16
) -> EngineCore:
    length = max(load.context for load in loads) + steps + 2 * random_model.BLOCK
    tokens = max(load.batch * (load.context + steps + 2 * random_model.BLOCK) for load in loads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = random_model.decoder(shape, length, kernels, device, dtype, bits)
    return random_model.engine(made, shape, length, tokens, max(load.batch for load in loads))


def replays(sizes: Sizes, kernels: Kernels, device: torch.device, end: Deadline) -> Iterator[Finding]:
    """The same tokens with captured steps and without, for every method, with 8-bit weights where there are such."""
    if kernels.graph() is None:
        yield Finding("replay", "all methods", "left out", f"{kernels.name} kernels capture no steps in this build")
        return
    bits = 16 if kernels.quantized is None else 8
    core = _engine(sizes.small, (sizes.compared,), sizes.steps, kernels, device, bits)
    for name, kv in methods(sizes.compared.budget).items():
        if not end.left:
            yield Finding("replay", name, "left out", "no time was left")
            continue
        before = unread(core, kv)
        try:
            replayed, graphs = _tokens(core, kv, sizes, "full")
            single, _ = _tokens(core, kv, sizes, "none")
        except KVLoomError as failure:
            yield Finding("replay", name, "WRONG", str(failure))
            continue
        tokens = sum(map(len, replayed.values()))
        same = replayed == single and tokens == sizes.compared.batch * sizes.steps
        same &= name == "dense" or unread(core, kv) > before
        verdict: Verdict = "WRONG" if not same else "right" if graphs else "left out"
        yield Finding("replay", name, verdict, f"{tokens} tokens with {graphs} captured steps and with none")


def _tokens(core: EngineCore, kv: KVOptions, sizes: Sizes, mode: GraphMode) -> tuple[dict[str, list[int]], int]:
    """What requests generate, and how many steps were captured on the way."""
    decoder: Any = core.runner.decoder
    torch.manual_seed(0)  # of the made-up KV
    with (
        mock.patch(RAZOR, lambda key: random_model.calibration(sizes.small)),
        decoder.capturing(mode),
        decoding(core, kv, sizes.compared, sizes.small.vocab, sizes.steps) as found,
    ):
        while core.busy:
            step(core, found)
        return found, len(decoder._graphs)


def speeds(sizes: Sizes, kernels: Kernels, device: torch.device, end: Deadline) -> Iterator[Finding]:
    """Tokens per second of decode steps, by load and method."""
    core = _engine(sizes.shape, sizes.loads, sizes.steps + WARM_UP, kernels, device)
    for load in sizes.loads:
        dense: float | None = None
        for name, kv in methods(load.budget).items():
            what = f"{load.batch} x {load.context:,}: {name}"
            if not end.left:
                yield Finding("engine", what, "left out", "no time was left")
                continue
            before = unread(core, kv)
            try:
                rate = _rate(core, kv, load, sizes, device)
            except KVLoomError as failure:
                yield Finding("engine", what, "WRONG", str(failure))
                continue
            dense = rate if name == "dense" else dense
            beside = "" if name == "dense" or not dense else f", {rate / dense:.2f} x dense"
            if name == "dense" or unread(core, kv) > before:
                yield Finding("engine", what, "measured", f"{rate:,.0f} tokens/s{beside}")
            else:
                yield Finding("engine", what, "WRONG", "it left nothing unread")


def _rate(core: EngineCore, kv: KVOptions, load: Load, sizes: Sizes, device: torch.device) -> float:
    """Of steps after some that do not count."""
    with (
        mock.patch(RAZOR, lambda key: random_model.calibration(sizes.shape)),
        decoding(core, kv, load, sizes.shape.vocab, sizes.steps + WARM_UP) as found,
    ):
        while min(map(len, found.values())) < WARM_UP:
            step(core, found)
        before = sum(map(len, found.values()))
        _wait(device)
        began = time.perf_counter()
        while core.busy:
            step(core, found)
        _wait(device)
        return (sum(map(len, found.values())) - before) / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
