"""The native library's own threads (csrc/parallel.h): every item once, from several callers, after a fork."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from kvloom.kernels.cpu.native import NativeKernels
from kvloom.kernels.cpu.native.linear import QuantLinear, pack
from tests.conftest import native_kernels
from tests.kernels.stored import random_stored


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


def _layer(kernels: NativeKernels, outputs: int = 1536, inputs: int = 512) -> QuantLinear:
    return QuantLinear(kernels, pack(kernels, random_stored("Q4_1", outputs, inputs)))


def _rows(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 300])
def test_any_number_of_threads_gives_the_same_bits(kernels: NativeKernels, threads: int, rows: int) -> None:
    x = _rows(rows)
    one = _layer(NativeKernels(kernels.library, threads=1))(x, torch.empty(rows, 1536))
    several = _layer(NativeKernels(kernels.library, threads=threads))
    for _ in range(20):
        assert torch.equal(several(x, torch.full((rows, 1536), torch.nan)), one)


def test_no_rows_are_no_work(kernels: NativeKernels) -> None:
    assert _layer(kernels)(_rows(0), torch.empty(0, 1536)).shape == (0, 1536)


def test_where_no_thread_can_be_had_the_caller_computes_alone() -> None:
    program = """
import os, resource, torch
from kvloom.kernels.cpu.native import load
kernels, x, out = load(3), torch.randn(600, 600), torch.empty(600, 300)
before, (_, most) = len(os.listdir("/proc/self/task")), resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, most))  # no room for a thread's stack
kernels.silu_mul(x, out)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
more = len(os.listdir("/proc/self/task")) - before
expected = torch.nn.functional.silu(x[:, :300]) * x[:, 300:]
print(more, torch.allclose(out, expected, atol=1e-5))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert shown.stdout.split() == ["0", "True"], shown.stderr


def test_callers_on_several_threads_get_their_own_results(kernels: NativeKernels) -> None:
    layer = _layer(NativeKernels(kernels.library, threads=3))
    inputs = [_rows(1 + i, seed=i) for i in range(4)]
    wanted = [layer(x, torch.empty(len(x), 1536)) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(200):
            if not torch.equal(layer(inputs[i], torch.full_like(wanted[i], torch.nan)), wanted[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_child_of_fork_computes_with_threads_of_its_own(kernels: NativeKernels) -> None:
    program = """
import os, sys
import torch
from kvloom.kernels.cpu.native import load
kernels = load(3)
x, out = torch.randn(600, 600), torch.empty(600, 300)
kernels.silu_mul(x, out)
child = os.fork()
if child == 0:
    again = torch.empty(600, 300)
    kernels.silu_mul(x, again)
    started = len(os.listdir("/proc/self/task")) - 1
    os._exit(0 if torch.equal(out, again) and started == 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "0", shown.stderr
