"""A GPU's memory, on a simulated one: which device is chosen, how its memory is divided, and what is said where it runs out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.config import SchedulerOptions
from kvloom.engine.device import out_of_memory, settle
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.load import open_checkpoint
from kvloom.engine.requests.request import Request
from kvloom.engine.startup import gpu_memory
from kvloom.engine.startup.available import MIB
from kvloom.engine.startup.gpu_memory import FIXED, largest, step_memory
from kvloom.loadtest.bench.roofline import SHAPES
from kvloom.loadtest.gpu_check import random_model
from kvloom.server.cli import main
from tests.simulated import GIB, simulated_gpu

MakeLLM = Callable[..., LLM]
ON_GPU = {"device": "cuda", "backend": "torch", "kv_memory": None}


def of_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool = True) -> None:
    """A machine with such a GPU, as torch tells."""
    told = {"is_available": True, "current_device": 1, "get_device_capability": capability, "get_device_name": "H200"}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    monkeypatch.setattr("kvloom.engine.device.importlib.util.find_spec", lambda name: object() if triton else None)


def test_auto_takes_a_gpu_that_is_recent_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    of_cuda(monkeypatch, (9, 0))
    assert settle("auto") == settle("cuda") == (torch.device("cuda", 1), "H200, compute capability 9.0")
    assert settle("auto", "native") == (torch.device("cpu"), "native kernels run there alone")
    of_cuda(monkeypatch, (8, 0), triton=False)
    assert settle("auto").device.type == "cuda" and "triton is not installed" in settle("auto").note
    assert "triton" not in settle("auto", "torch").note
    of_cuda(monkeypatch, (7, 5))
    device, note = settle("auto")
    assert device.type == "cpu" and "capability 7.5, is older than 8.0; --device cuda" in note
    assert settle("cuda").device == torch.device("cuda", 1)


def test_a_start_says_what_was_chosen(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kvloom.engine"):
        llm = make_llm(backend="torch")
    assert llm.model.device == "cpu" and f"torch {torch.__version__} " in llm.model.device_note
    assert f"device cpu: {llm.model.device_note}" in caplog.text
    with simulated_gpu(monkeypatch):
        llm = make_llm(backend="torch")
    assert (llm.model.device, llm.model.device_note, llm.model.settings.get("device")) == ("cuda", "chosen", None)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> int:
    """Bytes that steps of the tiny model take on a device of some megabytes."""
    monkeypatch.setattr(gpu_memory, "FIXED", MIB)
    return step_memory(open_checkpoint(tiny)[0], torch.float32, SchedulerOptions(), 512)


def test_the_cache_gets_what_utilization_leaves(make_llm: MakeLLM, small_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as memory:
        memory.total, memory.free = 100 * MIB, 90 * MIB
        for utilization, segments in ((0.8, None), (1.0, 8 * MIB)):
            llm = make_llm(**ON_GPU, gpu_memory_utilization=utilization, segment_memory=segments)
            left = int(100 * MIB * utilization) - 10 * MIB - small_steps - (segments or 0)
            cache = llm.core.cache
            assert 0 <= left * 8 / 9 - cache.bytes <= 2 * cache.storage.block_bytes
            assert llm.core.states.bound == max(MIB, cache.bytes // 8)


def test_segments_have_their_part_where_they_may_be_used(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, small_steps: int
) -> None:
    sizes = []
    with simulated_gpu(monkeypatch) as memory:
        memory.total = memory.free = 100 * MIB
        for verified in ("true", "false"):
            llm = make_llm(**ON_GPU, gpu_memory_utilization=1.0, kvshare_options=f'{{"verified": {verified}}}')
            sizes.append(llm.core.cache.bytes)
    left = 100 * MIB - small_steps
    assert sizes == [pytest.approx(left / 1.625, abs=MIB // 8), pytest.approx(left / 1.125, abs=MIB // 8)]


def test_a_size_that_is_given_wins(
    make_llm: MakeLLM, small_steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is told where steps may not find room beside it."""
    with simulated_gpu(monkeypatch) as memory:
        for free, told in ((small_steps + 4 * MIB, False), (small_steps + MIB, True)):
            memory.free, memory.total = free, 100 * MIB
            cache = make_llm(**{**ON_GPU, "kv_memory": 2 * MIB}, gpu_memory_utilization=0.01).core.cache
            assert 0 <= 2 * MIB - cache.bytes < cache.storage.block_bytes
            assert (" for steps make" in caplog.text) == told


def test_the_default_is_what_vllm_takes(make_llm: MakeLLM, small_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as memory:
        memory.total = memory.free = 20 * MIB + small_steps
        sizes = {make_llm(**ON_GPU, gpu_memory_utilization=part).core.cache.bytes for part in (None, 0.92)}
    assert len(sizes) == 1


def test_what_steps_take_is_stated() -> None:
    """Llama 3 8B in bf16, 1,024 rows and 64 requests of 8,192 tokens."""
    model = random_model.model(SHAPES["llama-3-8b"], 8192)
    activations = 1024 * ((3 * 14336 + 2 * 4096 + 2 * 4096 + 6144) * 2 + 4096 * 4)
    logits, scores = 3 * 64 * 128256 * 4, 64 * 40 * 8192 * 4 * 5 // 4
    assert step_memory(model, torch.bfloat16, SchedulerOptions(), 8192) == FIXED + activations + logits + scores


@pytest.mark.parametrize("beside", [lambda kv: 0, lambda kv: kv // 8 + kv // 2, lambda kv: 40, lambda kv: max(10, kv // 8)])
def test_the_largest_cache_fits_and_one_byte_more_does_not(beside: Callable[[int], int]) -> None:
    found = largest(1000, beside)
    assert found + beside(found) <= 1000 < found + 1 + beside(found + 1)
    assert largest(5, lambda kv: 10) < 0


def test_no_room_for_a_cache_is_told_with_what_would_do(
    make_llm: MakeLLM, small_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated_gpu(monkeypatch) as memory:
        memory.total, memory.free = 100 * MIB, 50 * MIB
        with pytest.raises(ConfigError, match=r"0.5 of 100 MiB are 50 MiB, of which 50 MiB are taken") as error:
            make_llm(**ON_GPU, gpu_memory_utilization=0.5)
        enough = float(str(error.value).split("--gpu-memory-utilization ")[1].split()[0])
        assert make_llm(**ON_GPU, gpu_memory_utilization=enough).core.cache.capacity_tokens >= 32
        memory.free = MIB
        with pytest.raises(ConfigError, match=r"99 MiB are taken .*; lower --max-model-len, --max-num-seqs or .*--weights"):
            make_llm(**ON_GPU)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan")])
def test_only_parts_of_a_memory_are_allowed(make_llm: MakeLLM, value: float) -> None:
    with pytest.raises(ConfigError, match="above 0, up to 1"):
        make_llm(gpu_memory_utilization=value)


def test_on_a_cpu_the_setting_is_refused_or_left_out(make_llm: MakeLLM, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization is 0.9, but device is cpu; .* use --kv-memory"):
        make_llm(device="cpu", gpu_memory_utilization=0.9)
    if not torch.cuda.is_available():
        make_llm(gpu_memory_utilization=0.9)
        assert "gpu_memory_utilization is left out: torch" in caplog.text


@pytest.mark.parametrize(
    ("most", "message"),
    [(70_000, r"the weights did not fit simulated:0: 0.00 GiB were asked for, .* all weights take about "),
     (400_000, r"what steps work in did not fit .* lower --gpu-memory-utilization .* --max-batched-tokens")],
)  # fmt: skip
def test_what_does_not_fit_at_start_is_said(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, most: int, message: str
) -> None:
    with simulated_gpu(monkeypatch) as memory:
        memory.largest = most
        with pytest.raises(ConfigError, match=message):
            make_llm(**{**ON_GPU, "kv_memory": 400_000}, selection_memory=MIB // 4, max_batched_tokens=8192)


def test_a_cache_that_cannot_be_had_is_told(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as memory:
        memory.largest = MIB
        with pytest.raises(ConfigError, match="cannot be allocated; lower kv_memory or gpu_memory_utilization"):
            make_llm(**{**ON_GPU, "kv_memory": 64 * MIB})


def test_a_step_without_memory_ends_its_requests_alone(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores of the sparse request do not fit in its step; the engine goes on."""
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    sparse = KVOptions(selection="token_select", budget=32)
    with simulated_gpu(monkeypatch) as memory:
        llm = make_llm(device="cuda", backend="torch", kv_memory="1MiB")
        wanted = llm.generate([list(range(3, 60))], greedy)[0].tokens
        llm.core.add(Request(id="late", prompt=list(range(3, 80)), sampling=greedy, kv=sparse))
        ended: list[str] = []
        llm.core.step()
        memory.largest = 4
        while llm.core.busy:
            ended += [output.finish_reason for output in llm.core.step() if output.finish_reason]
        assert ended == ["error"] and "lower --max-batched-tokens" in caplog.text and "asked for)" in caplog.text
        memory.largest = GIB
        assert llm.generate([list(range(3, 60))], greedy)[0].tokens == wanted
        llm.core.check()


def test_out_of_memory_is_told_from_other_failures() -> None:
    assert out_of_memory(ValueError("Tried to allocate 2.00 GiB")) == out_of_memory(None) == ""
    error = RuntimeError("a step")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert out_of_memory(error) == "2.00 GiB" and out_of_memory(torch.OutOfMemoryError()) == "memory"


def test_a_plan_divides_a_gpu_as_a_start_does(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 GiB, whether or not a GPU is here: less 0.08, weights and steps, of the rest 8 in 9 are the cache's."""
    assert main(["plan", str(tiny), "--memory", "4GiB", "--device", "cuda", "--dtype", "fp32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    model = open_checkpoint(tiny)[0]
    left = 4 * GIB * gpu_memory.UTILIZATION - 0.5 * MIB - step_memory(model, torch.float32, SchedulerOptions(), 512)
    assert f"0.92 of 4GiB on cuda = 1 MiB weights + {left * 8 / 9 / MIB:,.0f} MiB KV cache +" in out
    assert main(["plan", str(tiny), "--device", "cpu"]) == 0
    assert "MiB that are free = 0 MiB weights + " in capsys.readouterr().out


def test_what_weights_would_take_is_told(tiny: Path) -> None:
    told = gpu_memory.fewer_bits(tiny, torch.float32, codes=True)
    assert re.search(
        r"about ([\d,]+) bytes in float32, with --weights int8 about ([\d,]+) bytes, with --weights int4 about", told
    )
    whole, int8 = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", told)[:2])
    assert int8 == int(whole * 8.5 / 32)
    assert "--weights" not in gpu_memory.fewer_bits(tiny, torch.float32, codes=False)
