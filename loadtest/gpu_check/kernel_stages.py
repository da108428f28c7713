"""The kernels on the device: the tests of `tests/kernels`, results of every call against the reference, and times."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kvloom.kernels import Kernels
from kvloom.kernels.dense import installed
from kvloom.loadtest.bench import kernel_calls, timing
from kvloom.loadtest.bench.kernel_cases import DENSE, SPARSE, SPARSE_BAR, KernelCase, check
from kvloom.loadtest.gpu_check.stages import Deadline, Finding, Verdict

ROOT = Path(__file__).resolve().parents[2]
FILES = ("attend", "contents", "fold", "layer", "pool", "sample", "score", "select")
"""Of tests/kernels: those that ask the same of every back end."""
NEEDED = ("pytest", "hypothesis")
_BENCH = "import sys; from kvloom.loadtest.bench.kernels import main; sys.exit(main(sys.argv[1:]))"
NONE_COLLECTED = 5
"""Pytest's exit code."""


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


def contract(files: Sequence[str], backend: str, device: str, end: Deadline) -> Iterator[Finding]:
    """The tests of these files, a process to each: most of their time is a compiler's."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking or not (ROOT / "tests" / "kernels").is_dir():
        why = f"{' and '.join(lacking)} not installed" if lacking else "no tests beside this package"
        yield Finding("tests", "tests/kernels", "left out", f"{why}: calls are compared with the reference below")
        return
    with tempfile.TemporaryDirectory() as folder:
        running = {name: _begun(name, backend, device, Path(folder) / name) for name in files}
        for name, (process, log) in running.items():
            late = False
            try:
                process.wait(end.left or 0.01)
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
                process.wait()
            yield _read(name, log.read_text(errors="replace"), process.returncode, late)


def _begun(name: str, backend: str, device: str, log: Path) -> _Running:
    words = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "--noconftest", "-p",
             "tests.kernels.conftest", "-p", "no:cacheprovider", "-v", "--tb=short", "-k", backend,
             f"tests/kernels/test_{name}.py"]  # fmt: skip
    environment = {**os.environ, "KVLOOM_TEST_DEVICE": device, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return _Running(process, log)


def _read(name: str, log: str, code: int, late: bool) -> Finding:
    """What pytest has told. A run that was ended is right as far as it went."""
    counts = {word: len(re.findall(rf"::\S+.* {word}\b", log)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    told = ", ".join(f"{number} {word.lower()}" for word, number in counts.items() if number)
    failed = re.findall(r"::(\S+).* (?:FAILED|ERROR)\b", log)
    what = f"test_{name}.py"
    if failed:
        return Finding("tests", what, "WRONG", f"{told}: {', '.join(dict.fromkeys(failed))[:300]}")
    if late:
        return Finding(
            "tests", what, "right" if counts["PASSED"] else "left out", f"{told or 'none'}; the rest ran out of time"
        )
    if code == NONE_COLLECTED:
        return Finding("tests", what, "left out", "no test is for these kernels on this device")
    if code or not counts["PASSED"]:
        last = " ".join(log.strip().splitlines()[-3:])[-300:]
        return Finding("tests", what, "WRONG", f"pytest ended with {code}: {last}")
    return Finding("tests", what, "right", told)


@torch.inference_mode()
def correctness(
    cases: Sequence[KernelCase], kernels: Kernels, device: torch.device, dtypes: Sequence[torch.dtype], end: Deadline
) -> Iterator[Finding]:
    """Every call, small, against the reference on the CPU; one line for all that are right."""
    right, worst, left = 0, 0.0, list[str]()
    for dtype in dtypes:
        for case in cases:
            named = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            if not end.left:
                left.append(named)
                continue
            found = check(case, kernels, device, dtype)
            if found is None:
                continue
            if not found[1]:
                yield Finding("results", named, "WRONG", f"off by {found[0]:.1e} of the largest")
            right, worst = right + found[1], max(worst, found[0])
    yield Finding("results", "calls against the reference", "right", f"{right}, off by {worst:.1e} of the largest at most")
    if left:
        yield Finding("results", f"{len(left)} calls", "left out", f"no time was left: {', '.join(left[:3])}, ...")


def libraries(names: Sequence[str], flags: Sequence[str], end: Deadline) -> Iterator[Finding]:
    """Decode rows and a chunk by each library that is installed, against the reference, and their times. In processes of their
    own: a library's compiler may take longer than there is time. flags: of `kvloom bench kernels`."""
    for name in names:
        if (module := installed(name)) is None:
            yield Finding("libraries", name, "left out", "not installed")
            continue
        block = "256" if module == "flash_attn" else "16"
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-c", _BENCH, "--attention-backend", name, "--block-size", block, "--only", "decode,chunk",
                     "--json", str(Path(folder) / "rows.json"), *flags]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                       start_new_session=True)  # fmt: skip
            try:
                _, told = process.communicate(timeout=end.left or 0.01)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.communicate()
                yield Finding("libraries", name, "left out", "ran out of time")
                continue
            if process.returncode:
                yield Finding("libraries", name, "WRONG", " ".join(told.strip().splitlines()[-2:])[-300:])
                continue
            rows = json.loads((Path(folder) / "rows.json").read_text())
        for row in rows:
            yield Finding("libraries", f"{name}: {row['case']}", "right", f"{row['seconds'] * 1e6:,.1f} us")


@torch.inference_mode()
def times(cases: Sequence[KernelCase], kernels: Kernels, device: torch.device, end: Deadline) -> Iterator[Finding]:
    """Every call of full size: microseconds, and bytes per second beside the device's."""
    each = 0.2 if device.type == "cuda" else 0.01
    here = timing.measure(device, 2 * each)
    sheet = timing.data_sheet(here.name)
    known = here if sheet is None else sheet
    yield Finding(
        "times", here.name, "measured", f"copies {here.bandwidth / 1e9:,.0f} GB/s, products {here.rate / 1e12:,.2f} TFLOP/s"
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    took: dict[str, float] = {}
    for case in cases:
        if not end.left:
            yield Finding("times", case.name, "left out", "no time was left")
            continue
        run = case.make(kernel_calls.on_device(device, dtype), case.shape, case.size)(kernels)
        if run is None:
            yield Finding("times", case.name, "left out", f"{kernels.name} kernels have no such call")
            continue
        seconds, graph = timing.timed(run, device, each)
        took[case.name] = seconds
        share = case.cost(dtype).bytes / seconds / known.bandwidth
        alone = ", launched one by one" if device.type == "cuda" and not graph else ""
        figure = f"{seconds * 1e6:,.1f} us, {share:.0%} of {known.bandwidth / 1e12:.2f} TB/s{alone}"
        yield Finding("times", case.name, _verdict(case, seconds, share, device), figure, _bar(case))
    if took.keys() >= {DENSE, *SPARSE}:
        share = sum(took[name] for name in SPARSE) / took[DENSE]
        verdict: Verdict = "measured" if device.type != "cuda" else "bar met" if share < SPARSE_BAR else "bar missed"
        figure = f"{share:.2f} of dense, {took[SPARSE[-1]] / took[DENSE]:.2f} with the list of another layer"
        yield Finding("times", "a layer that chooses", verdict, figure, f"under {SPARSE_BAR}")


def _verdict(case: KernelCase, seconds: float, share: float, device: torch.device) -> Verdict:
    """Bars are a GPU's."""
    if device.type != "cuda" or not any(case.bar):
        return "measured"
    slow = bool(case.bar.us) and seconds * 1e6 > case.bar.us
    return "bar missed" if slow or share < case.bar.of_bandwidth else "bar met"


def _bar(case: KernelCase) -> str:
    parts = [f"{case.bar.us:g} us"] * bool(case.bar.us) + [f"{case.bar.of_bandwidth:.0%}"] * bool(case.bar.of_bandwidth)
    return ", ".join(parts)
