"""`make gpu-check` on a CPU: the same code, and what it says of what is wrong, slow, late or not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.engine.requests.request import KVOptions
from kvloom.kernels import load
from kvloom.loadtest.bench import timing
from kvloom.loadtest.bench.kernel_cases import DENSE, SPARSE, Bar, cases
from kvloom.loadtest.bench.roofline import SHAPES, Machine
from kvloom.loadtest.gpu_check import __main__ as gpu_check
from kvloom.loadtest.gpu_check import engine_stages, kernel_stages
from kvloom.loadtest.gpu_check.stages import Deadline, Finding, Stage, Verdict, carried_out, table
from tests.native import native_kernels

CPU = torch.device("cpu")


METHODS = ("dense", "sink_window", "token_select", "recycled", "tidal_decode", "razor_view")


def test_the_tiny_check_goes_through_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert gpu_check.main(["--tiny", "--json", str(file)]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    stages: dict[str, list[dict[str, str]]] = {}
    for finding in found["findings"]:
        stages.setdefault(finding["stage"], []).append(finding)
    assert [(one["what"], one["verdict"]) for one in stages["tests"]] == [
        ("test_select.py", "right"),
        ("test_score.py", "right"),
    ]
    assert all("10 passed" in one["figure"] for one in stages["tests"])
    assert [one["verdict"] for one in stages["results"]] == ["right"]
    assert [one["what"] for one in stages["engine"]] == [
        f"{load}: {name}" for load in ("2 x 90", "2 x 150") for name in METHODS
    ]
    assert all("tokens/s" in one["figure"] for one in stages["engine"])
    assert [one["figure"] for one in stages["libraries"]] == ["not installed"] * 2
    assert len(stages["times"]) > 30 and found["torch"] == torch.__version__
    assert "torch kernels capture no steps" in stages["replay"][0]["figure"] and "0 WRONG" in out


def test_without_a_gpu_nothing_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "sees no GPU here; --tiny" in capsys.readouterr().err


def test_captured_steps_are_compared_with_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, sizes = native_kernels(), gpu_check.OF_A_CPU
    found = list(engine_stages.replays(sizes, kernels, CPU, Deadline(100)))
    assert [(one.what, one.verdict) for one in found] == [(name, "right") for name in METHODS]
    tokens, calls = engine_stages._tokens, []

    def other_tokens(*args: Any) -> Any:
        calls.append(args[-1])
        found, graphs = tokens(*args)
        return {name: [*ids[:-1], ids[-1] ^ (len(calls) == 2)] for name, ids in found.items()}, graphs

    monkeypatch.setattr(engine_stages, "_tokens", other_tokens)
    (first, *others) = engine_stages.replays(sizes, kernels, CPU, Deadline(100))
    assert first.verdict == "WRONG" and {one.verdict for one in others} == {"right"} and calls[:2] == ["full", "none"]


def test_a_method_that_chooses_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its budget is all that there is."""
    nothing = {"recycled": KVOptions(selection="recycled", budget=70)}
    monkeypatch.setattr(engine_stages, "methods", lambda budget: nothing)
    sizes = gpu_check.OF_A_CPU._replace(loads=(engine_stages.Load(1, 40, 32),))
    (found,) = engine_stages.speeds(sizes, load("torch"), CPU, Deadline(9))
    assert (found.verdict, found.figure) == ("WRONG", "it left nothing unread")


def test_a_request_that_fails_is_wrong_and_the_next_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = load("torch")
    monkeypatch.setattr(kernels, "renew", lambda *args: 1 / 0)
    sizes = gpu_check.OF_A_CPU._replace(loads=gpu_check.OF_A_CPU.loads[:1])
    found = {one.what.split(": ")[1]: one for one in engine_stages.speeds(sizes, kernels, CPU, Deadline(100))}
    assert found["recycled"].verdict == "WRONG" and "has failed: internal error" in found["recycled"].figure
    assert found["tidal_decode"].verdict == found["dense"].verdict == "measured"


def test_wrong_results_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = load("torch")
    monkeypatch.setattr(kernels, "silu_mul", lambda gate_up, out: out.zero_())
    some = [case for case in cases(SHAPES["smollm2-135m"]) if case.name in ("silu_mul 32", "rotate 2,048")]
    wrong, right = kernel_stages.correctness(some, kernels, CPU, [torch.bfloat16], Deadline(100))
    assert (wrong.what, wrong.verdict) == ("silu_mul 32, bfloat16", "WRONG") and right.figure.startswith("1, ")
    (none, left) = kernel_stages.correctness(some, kernels, CPU, [torch.bfloat16], Deadline(0))
    assert none.figure.startswith("0, ") and left.verdict == "left out" and left.what == "2 calls"


def test_libraries_run_in_time_or_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that ends with an error here, as this device is a CPU."""
    monkeypatch.setattr(kernel_stages, "installed", lambda name: name if name == "flashinfer" else None)
    flags = ("--backend", "torch", "--device", "cpu")
    found = list(kernel_stages.libraries(("flashinfer", "flash_attn"), flags, Deadline(60)))
    assert [one.verdict for one in found] == ["WRONG", "left out"] and "flashinfer computes on a GPU" in found[0].figure
    late = list(kernel_stages.libraries(("flashinfer",), flags, Deadline(0)))
    assert [(one.verdict, one.figure) for one in late] == [("left out", "ran out of time")]


def test_bars_are_met_or_missed_on_a_gpu() -> None:
    case = replace(cases(SHAPES["llama-3-8b"])[0], bar=Bar(us=20, of_bandwidth=0.8))
    gpu = torch.device("cuda")
    found = {(us, share): kernel_stages._verdict(case, us / 1e6, share, gpu) for us, share in ((19, 0.81), (21, 0.9), (9, 0.7))}
    assert list(found.values()) == ["bar met", "bar missed", "bar missed"]
    assert kernel_stages._verdict(case, 1.0, 0.0, CPU) == "measured" and kernel_stages._bar(case) == "20 us, 80%"


def test_times_are_told_beside_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda device, seconds: Machine("CPU", 1e9, 1e12))
    monkeypatch.setattr(timing, "timed", lambda run, device, seconds: (run(), timing.Timed(1e-3, False))[1])
    some = [case.small() for case in cases(SHAPES["smollm2-135m"]) if case.name in (DENSE, *SPARSE)]
    first, *each, last = kernel_stages.times(some, load("torch"), CPU, Deadline(100))
    assert first.figure == "copies 1 GB/s, products 1.00 TFLOP/s" and len(each) == 5
    assert last.figure == "4.00 of dense, 1.00 with the list of another layer" and last.bar == "under 0.5"
    assert each[0].figure.startswith("1,000.0 us, ") and "of 0.00 TB/s" in each[0].figure


@pytest.mark.parametrize(
    ("log", "code", "late", "verdict", "figure"),
    [("a::test_a[x] PASSED [1%]\na::test_b SKIPPED (no) [2%]\n", 0, False, "right", "1 passed, 1 skipped"),
     ("a::test_a[x] PASSED [1%]\na::test_b[y] FAILED [2%]\n", 1, False, "WRONG", "1 passed, 1 failed: test_b[y]"),
     ("a::test_a[x] FAILED [1%]\n", -9, True, "WRONG", "1 failed: test_a[x]"),
     ("a::test_a[x] PASSED [1%]\n", -9, True, "right", "1 passed; the rest ran out of time"),
     ("collecting\n", -9, True, "left out", "none; the rest ran out of time"),
     ("nothing", 5, False, "left out", "no test is for these kernels on this device"),
     ("ImportError: no\n", 2, False, "WRONG", "pytest ended with 2: ImportError: no")],
)  # fmt: skip
def test_what_pytest_told_is_read(log: str, code: int, late: bool, verdict: Verdict, figure: str) -> None:
    assert kernel_stages._read("a", log, code, late) == Finding("tests", "test_a.py", verdict, figure)


BARE = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from kvloom.loadtest.gpu_check import __main__ as check
check.stages = lambda device, backend: []
sys.exit(check.main(["--tiny", "--json", {file!r}]))
"""


def test_it_needs_no_package_but_torch_and_numpy(tmp_path: Path) -> None:
    """And what torch brings along, jinja2. Nor triton, where it runs on a CPU."""
    declared = tomllib.loads((kernel_stages.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    modules = {"pyyaml": "yaml", "fastapi-offline": "fastapi_offline", "uvloop": "uvloop"}
    names = [modules.get(name, name) for name in (re.split(r"[><=;]", one)[0] for one in declared)]
    lacking = [*(name for name in names if name not in ("torch", "numpy", "jinja2")), "triton", "pytest", "hypothesis"]
    program = BARE.format(names=lacking, file=str(tmp_path / "found.json"))
    environment = {name: value for name, value in os.environ.items() if name not in ("KVLOOM_CACHE", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(lacking) > 15, done.stderr[-2000:]


def test_packages_that_lack_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_stages.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else object())
    (found,) = kernel_stages.contract(["select"], "torch", "cpu:0", Deadline(9))
    assert found.verdict == "left out" and found.figure.startswith("hypothesis not installed")


def test_stages_end_in_time_and_what_raises_is_wrong() -> None:
    clock = iter(range(100))

    def run(end: Deadline) -> Iterator[Finding]:
        yield Finding("a", "x", "right")
        raise ZeroDivisionError("by\nzero")

    told: list[Finding] = []
    found = carried_out([Stage("a", 5, run), Stage("b", 5, run)], 100, told.append)
    assert [(one.stage, one.verdict) for one in found] == [("a", "right"), ("a", "WRONG"), ("a", "right"), ("b", "WRONG")]
    assert found[1].figure == "ZeroDivisionError: by zero" and told == found
    assert [one.verdict for one in carried_out([Stage("a", 5, run)], 0, told.append)] == ["left out"]

    def too_large(end: Deadline) -> Iterator[Finding]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        yield

    (found_none,) = carried_out([Stage("a", 5, too_large)], 100, told.append)
    assert (found_none.verdict, found_none.figure) == ("left out", "2.00 GiB did not fit into the GPU's memory")
    end = Deadline(3, lambda: next(clock))
    assert [end.left, end.left, end.left, end.left] == [2, 1, 0, 0]
    assert table(found[:1]).splitlines()[1] == "a      x     right"
