"""The whole engine on the Triton back end, in its interpreter: a batch of every selection method and of dense requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Request
from tests.conftest import native_kernels

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
