"""Attention by a library in an engine on a simulated GPU, steps captured and not, gives what a CPU gives.

Stand-ins take the libraries' place (`tests.kernels.libraries`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM, KVOptions
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError
from tests.engine.test_graphs import CASES, SETTINGS, SIZES, memory, same, same_memory, serve
from tests.kernels.libraries import install
from tests.recorded import Recording, recordings
from tests.selection import test_guard
from tests.selection.conftest import retrieval_heads
from tests.selection.test_guard import RETENTION, config
from tests.simulated import simulated_gpu

__all__ = ["recordings", "retrieval_heads"]
calibrated = test_guard.calibrated
Make = Callable[..., LLM]
SHARED: dict[str, Any] = {**SETTINGS, "kv_memory": "4MiB"}
MIXED = ("dense", "recycled", "sink_window", "drafts")


def modules(module: str) -> dict[str, Any]:
    """Settings with which that module attends."""
    name = "flash_attn" if "flash_attn" in module else module
    return {"attention_backend": name, "block_size": 256 if module == "flash_attn" else 16}


@pytest.mark.parametrize("module", ["flashinfer", "flash_attn", "flash_attn_interface"])
def test_dense_steps_give_what_a_cpu_gives(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], module: str
) -> None:
    """Requests come and go; most steps that decode replay a graph, whose plans are made outside it."""
    wrappers, settings = install(monkeypatch, module), modules(module)
    cpu = make_llm(**{**SHARED, "block_size": settings["block_size"]})
    wanted = serve(cpu, [KVOptions()])
    with simulated_gpu(monkeypatch):
        gpu = make_llm(device="cuda", **SHARED, **settings)
        assert gpu.model.attention.startswith(settings["attention_backend"])
        same(serve(gpu, [KVOptions()]), wanted)
        same_memory(memory(gpu), memory(cpu))
        found, expected = (llm.core.runner._kernels.counters for llm in (gpu, cpu))
    assert (found.rows, found.positions) == (expected.rows, expected.positions)
    assert gpu.stats().graph_steps["full"] >= 4
    if module == "flashinfer":
        fixed = [wrapper for wrapper in wrappers if wrapper.fixed]
        assert [len(wrapper.last) for wrapper in fixed] == SIZES[::-1] and all(wrapper.captures for wrapper in fixed)
        assert sum(wrapper.plans for wrapper in fixed) == len(SIZES) + gpu.stats().graph_steps["full"]
        assert not any(wrapper.captures for wrapper in wrappers if not wrapper.fixed)


def test_methods_keep_their_own_kernels(make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Dense requests beside those of methods and drafts, in steps that are replayed but for attention."""
    install(monkeypatch, "flashinfer")
    kvs = [CASES[name] for name in MIXED]
    wanted = serve(make_llm(**SHARED), kvs)
    with simulated_gpu(monkeypatch):
        gpu = make_llm(device="cuda", **SHARED, **modules("flashinfer"))
        same(serve(gpu, kvs), wanted)
        assert gpu.stats().graph_steps["piecewise"] >= 3


def test_retention_beside_a_library(make_llm: Make, monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]) -> None:
    """Heads that keep everything, of which layers have different numbers, are the library's business, others are not."""
    wrappers, kvs = install(monkeypatch, "flashinfer"), [CASES[RETENTION]]
    wanted = serve(make_llm(**SHARED, **config(RETENTION)), kvs)
    with simulated_gpu(monkeypatch):
        gpu = make_llm(device="cuda", **SHARED, **modules("flashinfer"), **config(RETENTION))
        same(serve(gpu, kvs), wanted)
        assert gpu.stats().graph_steps["full"] >= 4
    assert wrappers and all(wrapper.plans for wrapper in wrappers)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_backend": "flashinfer", "device": "cpu"}, "flashinfer computes on a GPU, and the device is cpu"),
        ({"attention_backend": "flashinfer"}, "none of flashinfer is installed"),
        ({"attention_backend": "flash_attn"}, "none of flash_attn_interface, flash_attn is installed"),
        ({"attention_backend": "triton"}, "the backend here is torch"),
    ],
)
def test_a_library_that_cannot_be_had_ends_the_start(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    for module in ("flashinfer", "flash_attn", "flash_attn_interface"):
        assert module not in sys.modules
    with simulated_gpu(monkeypatch), pytest.raises(ConfigError, match=f"{said}; use --attention-backend auto"):
        make_llm(**{"device": "cuda", **SHARED, **settings})


def test_blocks_that_a_library_does_not_take_end_the_start(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn")
    said = "flash_attn 2 takes multiples of 256: use --block-size 256; choose another --backend, --attention-backend or"
    with simulated_gpu(monkeypatch), pytest.raises(ConfigError, match=said):
        make_llm(device="cuda", **SHARED, attention_backend="flash_attn")


def test_names_are_also_those_of_vllm() -> None:
    for there, name in (("FLASHINFER", "flashinfer"), ("FLASH_ATTN", "flash_attn"), ("TRITON_ATTN", "triton")):
        assert EngineConfig.from_flat({"attention_backend": there}).model.attention_backend == name
    with pytest.raises(ConfigError, match="attention_backend is 'xformers'; allowed: auto, triton, flashinfer, flash_attn"):
        EngineConfig.from_flat({"attention_backend": "xformers"})
