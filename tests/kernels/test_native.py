"""What only the native back end promises: how it is built, and that a row's bits do not depend on its batch.

The contract itself is tested by the other modules of this folder, which run on every back end.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom.kernels import Allowed, Lists, PagedKV, PoolHow, Rows
from kvloom.kernels.cpu.native import NativeKernels, NativeUnavailable, build
from kvloom.kernels.cpu.native.compiler import SOURCES, find_compiler
from kvloom.kernels.reference import ReferenceKernels
from tests.conftest import native_kernels


@pytest.fixture(scope="module", params=["machine", "x86-64-v4-vnni", "generic", "x86-64-v3"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLOOM_NATIVE", request.param if request.param.startswith("x86") else "native")
        return native_kernels(generic=request.param == "generic")


def ints(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).contiguous()


def attend(kernels: NativeKernels, q: Tensor, kv: PagedKV, rows: Rows) -> tuple[Tensor, Tensor]:
    plan = kernels.plan(rows, q.shape[1], kv.k.shape[1], q.shape[2])
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    kernels.attend(q, kv, plan, scale=q.shape[2] ** -0.5, out=out, lse=lse)
    return out, lse


def storage(dtype: torch.dtype, dim: int, tokens: int = 640) -> tuple[PagedKV, Tensor]:
    make = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(2 * tokens // 16, 3, 16, dim, generator=make).to(dtype) for _ in "kv")
    return PagedKV(k, v), ints(torch.randperm(2 * tokens // 16, generator=make).view(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 40])
def test_a_row_has_the_same_bits_alone_decoded_prefilled_and_listed(
    kernels: NativeKernels, dtype: torch.dtype, dim: int
) -> None:
    kv, tables = storage(dtype, dim)
    q = torch.randn(40, 9, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    stops = list(range(560, 600))
    chunk = Rows(tables, ints([1] * 40), ints([0] * 40), ints(stops))
    out, lse = attend(kernels, q, kv, chunk)
    for row in (0, 1, 17, 39):
        alone = Rows(tables, ints([1]), ints([0]), ints(stops[row : row + 1]))
        positions = Lists(ints(range(500)), ints([[0]]), ints([[500]]))
        listed = Rows(tables, ints([1]), ints([500]), ints(stops[row : row + 1]), positions)
        for rows in (alone, listed):
            again, again_lse = attend(kernels, q[row : row + 1], kv, rows)
            assert torch.equal(again[0], out[row])
            assert torch.equal(again_lse[0], lse[row])


def test_a_row_over_a_list_has_the_same_bits_alone_and_in_a_chunk(kernels: NativeKernels) -> None:
    """A prefill tile that shares its list, heads that start at different positions, logits or not: a row is a row."""
    kv, tables = storage(torch.bfloat16, 64)
    q = torch.randn(40, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    listed, starts, stops = ints(range(0, 500, 2)), [[500, 520, 590]] * 40, list(range(591, 631))
    chunk = Rows(tables, ints([1] * 40), ints(starts), ints(stops), Lists(listed, ints([[0]] * 40), ints([[250]] * 40)))
    out, lse = attend(kernels, q, kv, chunk)
    for row in (0, 11, 39):
        part = slice(row, row + 1)
        alone = Rows(tables, ints([1]), ints(starts[part]), ints(stops[part]), Lists(listed, ints([[0]]), ints([[250]])))
        again, again_lse = attend(kernels, q[part], kv, alone)
        assert torch.equal(again[0], out[row]) and torch.equal(again_lse[0], lse[row])
    emitted, logits = torch.empty_like(q), torch.empty(7, 9, 400)
    kernels.attend(q, kv, kernels.plan(chunk, 9, 3, 64), scale=64**-0.5, out=emitted, logits=logits)
    assert torch.equal(emitted, out)


@pytest.mark.parametrize(("how", "window"), [("sum", 1), ("max", 7), ("sum", 33)])
def test_pool_and_select_equal_the_reference(kernels: NativeKernels, how: PoolHow, window: int) -> None:
    """Here because the build without processor-specific code has loops of its own."""
    logits = torch.randn(3, 6, 700, generator=torch.Generator().manual_seed(window)) * 3
    first, last = ints([0, 3, 690]), ints([700, 660, 699])
    outs = [
        some.pool(logits, first, last, 2, how=how, window=window, out=torch.zeros(3, 2, 700))
        for some in (kernels, ReferenceKernels())
    ]
    torch.testing.assert_close(*outs, rtol=2e-5, atol=1e-7)
    lengths = ints([700, 700, 657, 657, 9, 9])
    chosen = [some.select(outs[0].view(6, 700), lengths, 100, offset=lengths) for some in (kernels, ReferenceKernels())]
    assert torch.equal(chosen[0][0], chosen[1][0]) and torch.equal(chosen[0][1], chosen[1][1])


def test_thread_count_does_not_change_bits(kernels: NativeKernels) -> None:
    kv, tables = storage(torch.bfloat16, 64)
    q = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    rows = Rows(tables, ints([0, 1]), ints([0, 3]), ints([640, 77]))
    one = NativeKernels(kernels.library, threads=1)
    assert torch.equal(attend(one, q, kv, rows)[0], attend(kernels, q, kv, rows)[0])


def test_plan_of_another_back_end_is_refused(kernels: NativeKernels) -> None:
    kv, _ = storage(torch.float32, 8)
    q = torch.zeros(1, 3, 8)
    with pytest.raises(TypeError, match="another back end"):
        kernels.attend(q, kv, object(), scale=1.0, out=q.clone())  # type: ignore[arg-type]


def test_mixed_dtypes_are_refused(kernels: NativeKernels) -> None:
    kv, tables = storage(torch.float32, 8)
    plan = kernels.plan(Rows(tables, ints([0]), ints([0]), ints([1])), 3, 3, 8)
    q = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="one dtype"):
        kernels.attend(q, kv, plan, scale=1.0, out=q.clone())


def test_the_library_brings_no_second_openmp_runtime() -> None:
    """Beside torch's, it would keep a pool of spinning threads of its own on the same cores."""
    program = """
from pathlib import Path
import torch
from kvloom.kernels.cpu.native import load
def runtimes():
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.rpartition("/")[2]}
before = runtimes()
load().silu_mul(torch.ones(600, 600), torch.empty(600, 300))
print(before == runtimes())
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert shown == ["True"]


def _compiler(folder: Path, body: str) -> str:
    """A stand-in for a compiler, so that tests of the build take no minutes: answers --version, else runs `body`."""
    script = folder / "stand-in-cxx"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo stand-in 1.0 && exit 0\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    log = tmp_path / "runs"
    body = f'echo run >> "{log}"; sleep 0.2; while [ "$1" != -o ]; do shift; done; echo made > "$2"'
    environment = {**os.environ, "KVLOOM_CACHE": str(tmp_path), "CXX": _compiler(tmp_path, body)}
    command = [sys.executable, "-c", "from kvloom.kernels.cpu.native import build; print(build().path)"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0].strip() for process in both)
    assert first == second
    assert Path(first).read_text() == "made\n"
    assert len(list((tmp_path / "native").iterdir())) == 2, "the library and the lock, and nothing left over"
    assert len(log.read_text().split()) == len(list(SOURCES.glob("*.cpp"))) + 1, "one of them built, the other waited"


def test_a_compiler_at_work_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", _compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'))
    told: list[tuple[int, int]] = []
    build(progress=lambda stage, done, total: told.append((done, total)))
    files = len(list(SOURCES.glob("*.cpp")))
    assert told == [(done, files) for done in range(files + 1)]
    build(progress=lambda stage, done, total: told.append((done, total)))
    assert len(told) == files + 1, "what is in the cache takes no time, and no line"


def test_no_compiler_and_nothing_built_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        build()


@pytest.mark.parametrize("installed", [True, False])
def test_the_package_ziglang_is_a_compiler_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    if found := shutil.which("g++"):
        assert find_compiler() == [found]
    monkeypatch.setenv("PATH", str(tmp_path))
    if installed:
        assert find_compiler() == [sys.executable, "-m", "ziglang", "c++"]
    else:
        with pytest.raises(NativeUnavailable, match="pip install ziglang"):
            build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_compiler() is None, "who names a compiler gets that one or none"


def test_without_a_compiler_a_library_built_earlier_serves(
    monkeypatch: pytest.MonkeyPatch, kernels: NativeKernels, tmp_path: Path
) -> None:
    built = build()
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert build().path.name[:23] == built.path.name[:23]


def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", _compiler(tmp_path, "echo no room left >&2; exit 1"))
    with pytest.raises(NativeUnavailable, match="no room left"):
        build()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98, 1.0])
def test_a_draw_under_a_mask_is_one_from_what_is_left(kernels: NativeKernels, share: float) -> None:
    """In every build: words of masks that are whole, empty and in between, and the last, which ends within a word."""
    make, vocab = torch.Generator().manual_seed(1), 5003
    logits, allowed = torch.randn(24, vocab, generator=make) * 3, torch.rand(24, vocab, generator=make) < share
    allowed[:, 640:1280], allowed[:, 2560:3200] = True, False
    bits = torch.nn.functional.pad(allowed, (0, -vocab % 32)).view(24, -1, 32).long() << torch.arange(32)
    masks = Allowed(bits.sum(-1).to(torch.int32), torch.arange(24, dtype=torch.int32))
    how = torch.rand(24, 5, generator=make, dtype=torch.float64) * torch.tensor([2.0, 0, 1, 0.1, 1])
    how[:6, 0], how[6:12, 1] = 0.0, 40.0
    found, wanted = torch.empty(2, 24, dtype=torch.int64)
    kernels.sample(logits, how, found, masks)
    kernels.sample(logits.masked_fill(~allowed, -torch.inf), how, wanted)
    assert found.tolist() == wanted.tolist() and allowed.gather(1, found[:, None]).all()
