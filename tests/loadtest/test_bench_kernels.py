"""`kvloom bench kernels`: bytes and FLOPs computed by hand, every call against the reference, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.kernels import Kernels, dense, load
from kvloom.loadtest.bench import kernel_calls, kernels, timing
from kvloom.loadtest.bench.kernel_cases import SPARSE, cases, check, error
from kvloom.loadtest.bench.roofline import GPUS, SHAPES, Cost, Machine
from kvloom.loadtest.study.flags import BenchError
from kvloom.server.cli import main
from tests.kernels.libraries import WORKSPACE, install

CPU, LLAMA = torch.device("cpu"), SHAPES["llama-3-8b"]
COSTS = {
    # 32 x 4,096 positions of 2 x 8 x 128 numbers of 2 bytes; q and out of 32 x 32 x 128
    "decode 32 x 4,096": Cost(131_072 * 4096 + 2 * 32 * 4096 * 2, 4 * 131_072 * 4096),
    "decode 1 x 16,384, 4 KV heads": Cost(16_384 * 2048 + 2 * 2048 * 2, 4 * 16_384 * 2048),
    "score 1 x 32,768": Cost(32_768 * 2048 + 8192 + 32 * 32_768 * 4, 2 * 32_768 * 4096),
    "pool 1 x 32,768": Cost(32_768 * 40 * 4),
    "select 4,096 of 32,768": Cost(8 * (32_768 + 4096) * 4),
    "list 4,096 of 32,768": Cost(4096 * 4096 + 16_384 + 8 * 4096 * 4, 4 * 4096 * 4096),
    "top-k 512 of 65,536, batch 4": Cost(4 * (65_536 + 512) * 4),
    # the first row of the chunk sees 8,193 positions, the last 10,240
    "chunk 2,048 over 8,192": Cost(10_240 * 4096 + 2 * 2048 * 4096 * 2, 4 * 4096 * (2048 * (8193 + 10_240) // 2)),
    "qkv x 32, 16 bit": Cost(4096 * 6144 * 2 + 32 * (4096 + 6144) * 2, 2 * 32 * 4096 * 6144),
    "gate_up x 32, 8 bit": Cost(4096 * 28_672 * 34 // 32 + 32 * (4096 + 28_672) * 2, 2 * 32 * 4096 * 28_672),
    "down x 32, 4 bit": Cost(14_336 * 4096 * 20 // 32 + 32 * (14_336 + 4096) * 2, 2 * 32 * 14_336 * 4096),
    "silu_mul 32": Cost(3 * 32 * 14_336 * 2),
}


def test_bytes_and_flops_are_those_computed_by_hand() -> None:
    found = {case.name: case.cost() for case in cases(LLAMA)}
    assert {name: found[name] for name in COSTS} == COSTS
    assert found["decode 1 x 16,384, 4 KV heads"].seconds(GPUS[2]) == pytest.approx(33_562_624 / 4.8e12)


def test_the_floor_is_the_slower_of_both() -> None:
    machine = Machine("", bandwidth=100.0, rate=1000.0)
    assert Cost(50, 100).seconds(machine) == 0.5 and Cost(50, 700).seconds(machine) == 0.7
    assert Cost(1, 2).plus(Cost(3, 4)) == Cost(4, 6)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_call_is_what_the_reference_computes(backend: str, dtype: torch.dtype) -> None:
    try:
        kernels: Kernels = load(backend, threads=2)
    except Exception:
        pytest.skip(f"no {backend} kernels here")
    missing = []
    for case in cases(SHAPES["qwen2.5-7b"]):
        found = check(case, kernels, CPU, dtype)
        assert found is None or found[1], f"{case.name}: {found}"
        missing += [case.name] if found is None else []
    assert all(name.endswith((" 8 bit", " 4 bit")) for name in missing) and bool(missing) == (backend == "torch")


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_kernels: Any = load("torch")
    norm, select = torch_kernels.add_rms_norm, torch_kernels.select
    named = {case.name: case for case in cases(SHAPES["smollm2-135m"])}

    def shifted(*args: Any, **kwargs: Any) -> Any:
        columns, counts = select(*args, **kwargs)
        columns[..., 0] += 1
        return columns, counts

    monkeypatch.setattr(torch_kernels, "add_rms_norm", lambda *args: norm(*args).mul_(1.02))
    monkeypatch.setattr(torch_kernels, "select", shifted)
    for name in ("add_rms_norm 32", "top-k 512 of 65,536, batch 4"):
        found = check(named[name], torch_kernels, CPU, torch.bfloat16)
        assert found is not None and not found[1] and found[0] > 0
    assert error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


def test_the_roofline_is_a_table_without_any_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda *_: pytest.fail("no kernel is needed"))
    file = tmp_path / "roofline.json"
    assert main(["bench", "kernels", "--roofline", "--json", str(file), "--markdown", str(tmp_path / "r.md")]) == 0
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    assert rows["decode 32 x 4,096"]["H200"] == pytest.approx(537_395_200 / 4.8e12)
    summed = next(row for name, row in rows.items() if name.startswith("a layer that chooses"))
    assert summed["bytes"] == sum(rows[name]["bytes"] for name in SPARSE)
    assert "3.35 TB/s and 989 TFLOP/s" in (tmp_path / "r.md").read_text()


def test_the_command_checks_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a clock that goes on by a millisecond with each look."""
    monkeypatch.setattr(timing, "measure", lambda device: Machine("CPU", 1e9, 1e12))
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) / 1000)
    file = tmp_path / "kernels.json"
    flags = ["--shape", "smollm2-135m", "--backend", "torch", "--device", "cpu", "--only", "silu,store 2", "--json", str(file)]
    assert main(["bench", "kernels", *flags]) == 0
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"silu_mul 32", "store 2,048", "rotate_store 32"} - {"rotate_store 32"}
    row = rows["silu_mul 32"]
    assert (row["right"], row["backend"], row["device"]) == ("yes", "torch", "CPU") and row["error"] < 1e-2
    assert row["bytes"] == 3 * 32 * 1536 * 2 and row["seconds"] == pytest.approx(1e-3)
    assert row["bandwidth"] == pytest.approx(row["bytes"] * 1e3) and row["over_floor"] == pytest.approx(1e6 / row["bytes"])


def test_a_wrong_kernel_ends_the_command_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: Any = load("torch")
    monkeypatch.setattr(broken, "silu_mul", lambda gate_up, out: out.fill_(3))
    monkeypatch.setattr(kernels, "load", lambda *_: broken)
    assert main(["bench", "kernels", "--check", "--only", "silu", "--device", "cpu"]) == 1
    assert "not what the reference computes: silu_mul 32" in capsys.readouterr().err
    assert issubclass(BenchError, Exception)


@pytest.mark.parametrize(
    ("flag", "value"), [("--shape", "gpt-2"), ("--dtype", "int8"), ("--only", "nothing"), ("--backend", "x")]
)
def test_what_is_not_known_is_one_line(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu", flag, value]) == 2
    error = capsys.readouterr().err
    assert flag in error and error.count("\n") == 1


def test_a_call_is_timed_by_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def run() -> None:
        calls.append(len(calls))
        clock[0] += 5.0 if len(calls) == 2 else 0.25

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.timed(run, CPU, 1.0) == (0.25, False) and len(calls) == 1 + 3


def test_the_machine_is_measured_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIB", 1024)
    monkeypatch.setattr(timing, "timed", lambda run, device, seconds: (run(), timing.Timed(0.5, False))[1])
    found = timing.measure(CPU)
    assert found == ("CPU", 4 * 512 * 1024, 4 * 1024 * 1024 * 4096)
    assert timing.data_sheet("NVIDIA H100 80GB HBM3") == GPUS[1] and timing.data_sheet("CPU") is None


@pytest.mark.parametrize("module", ["flashinfer", "flash_attn", "flash_attn_interface"])
def test_libraries_are_given_the_same(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    install(monkeypatch, module)
    name = "flashinfer" if module == "flashinfer" else "flash_attn"
    found: Any = dense.beside(load("torch"), name, torch.device("meta"), torch.bfloat16)
    monkeypatch.setattr(found, "_device", CPU)
    monkeypatch.setattr(found, "_totals", torch.zeros(5, dtype=torch.int64))
    monkeypatch.setattr(found._library, "_device", CPU)
    monkeypatch.setattr(found._library, "_workspace", torch.zeros(WORKSPACE, dtype=torch.uint8), raising=False)
    for case in cases(SHAPES["smollm2-135m"]):
        if case.make in (*kernels.BESIDE, kernel_calls.listed):
            before = int(found._totals[1])
            right = check(case, found, CPU, torch.bfloat16, 256)
            assert right is not None and right[1], case.name
            assert (int(found._totals[1]) > before) == (case.make in kernels.BESIDE), "the library was asked"


def test_a_library_that_is_not_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "kernels", "--check", "--backend", "torch", "--device", "cpu"]
    for more, said in (
        (["--attention-backend", "flashinfer"], "is flashinfer, which cannot be had here: flashinfer computes on a GPU"),
        (["--block-size", "0"], "--block-size is 0; allowed: 1 to 256"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
