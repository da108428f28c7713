"""How long a call takes on a device, and what the device can do, measured in the same run.

On a GPU a call is captured in a CUDA graph where it can be, and a replay is timed between two events, the second-level cache
emptied before: launching from Python takes longer than many kernels run. On a CPU calls are timed one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from kvloom.kernels.cuda_graph import CudaGraph
from kvloom.loadtest.bench.roofline import GPUS, Machine

MIB = 1 << 20
FLUSH = 256 * MIB
"""Written before a timed call on a GPU: more than any second-level cache."""
LEAST, MOST = 3, 50
"""Calls that are timed, as many as fit into the seconds there are."""


class Timed(NamedTuple):
    """Of a call."""

    seconds: float
    """Median."""
    graph: bool
    """Whether replays of a CUDA graph were timed."""


def timed(run: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> Timed:
    """Time a call that may be made any number of times; it is made once before."""
    run()
    return _on_a_gpu(run, device, seconds) if device.type == "cuda" else Timed(_median(run, seconds), False)


def _median(run: Callable[[], Any], seconds: float) -> float:
    times: list[float] = []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < seconds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _on_a_gpu(run: Callable[[], Any], device: torch.device, seconds: float) -> Timed:
    replay = _captured(run, device)
    call = replay or run
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    once()
    began, times = time.perf_counter(), list[float]()
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - began < seconds):
        times.append(once())
    return Timed(statistics.median(times), replay is not None)


def _captured(run: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """Replays the call, captured as steps are; None where it cannot be, as of what asks the device something."""
    graph = CudaGraph(device)
    try:
        graph.piece(run)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return partial(graph.replay, 0, 0)


def measure(device: torch.device, seconds: float = 1.0) -> Machine:
    """Copying half a gigabyte (a GPU: two) counts both ways; a bf16 product of 1024 x 1024 x 4096 (a GPU: 8192 each)."""
    on_gpu = device.type == "cuda"
    bandwidth = _copied((2048 if on_gpu else 512) * MIB, device, seconds)
    rows, inner, columns = (8192, 8192, 8192) if on_gpu else (1024, 1024, 4096)
    a, b = (torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((rows, inner), (inner, columns)))
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    multiplied = timed(lambda: torch.mm(a, b, out=out), device, seconds).seconds
    return Machine(name_of(device), bandwidth, 2 * rows * inner * columns / multiplied)


def _copied(size: int, device: torch.device, seconds: float) -> float:
    """Bytes read and written per second."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(source)
    return 2 * size / timed(lambda: there.copy_(source), device, seconds).seconds


def name_of(device: torch.device) -> str:
    """A GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def data_sheet(name: str) -> Machine | None:
    """What is published of a device of that name, None where it is not listed."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)
