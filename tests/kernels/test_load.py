"""Choosing a back end, its errors, and its counters."""

import subprocess
import sys

import pytest
import torch

from kvloom import kernels as package
from kvloom.kernels import Kernels, Lists, load
from kvloom.kernels.counters import Counters
from kvloom.kernels.reference import ReferenceKernels
from tests.kernels.conftest import ints, make_lists, make_rows, paged


def test_unknown_back_end() -> None:
    with pytest.raises(ValueError, match="'cuda'; allowed: auto, native, triton, torch, reference"):
        load("cuda")


def test_named_back_ends_carry_their_names(kernels: Kernels) -> None:
    assert kernels.name in package.BACKENDS
    assert load(kernels.name).name == kernels.name


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def make(name: str, *_: object) -> Kernels:
        tried.append(name)
        if name != "reference":
            raise ImportError("not here")
        return ReferenceKernels()

    monkeypatch.setattr(package, "_make", make)
    assert load().name == "reference"
    assert tried == ["native", "torch", "reference"]


def test_other_devices_get_torch() -> None:
    assert load(device="cuda").name == load("torch", device="cuda").name == "torch"
    with pytest.raises(ValueError, match="native back end runs on cpu"):
        load("native", device="cuda")


def test_kernels_import_nothing_of_the_engine() -> None:
    code = "import sys, kvloom.kernels as k; k.load(); print([m for m in sys.modules if 'kvloom.engine' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_dtype_is_refused(kernels: Kernels) -> None:
    if kernels.name == "reference":
        pytest.skip("the reference takes any dtype")
    store = paged(1, 16, 1, 16, dtype=torch.bfloat16)
    plan = kernels.plan(make_rows(store, [0], [0], [16]), 2, 1, 16)
    q = torch.zeros(1, 2, 16)
    with pytest.raises((TypeError, ValueError)):
        kernels.attend(q, store.kv, plan, scale=1.0, out=torch.empty_like(q))


def since(kernels: Kernels, before: Counters) -> Counters:
    now = kernels.counters
    return Counters(now.rows - before.rows, now.positions - before.positions, now.kv_bytes - before.kv_bytes,
                    now.score_bytes - before.score_bytes, now.list_kv_bytes - before.list_kv_bytes)  # fmt: skip


def snapshot(kernels: Kernels) -> Counters:
    return since(kernels, Counters())


def test_counters_of_decode_rows(kernels: Kernels) -> None:
    """Two dense rows, one with lists per head: positions are summed over KV heads, bytes are theirs, K and V."""
    store = paged(3, 100, 2, 64, dtype=torch.bfloat16)
    lists = make_lists([[[], []], [[], []], [[1, 2, 3], [7]]])
    plan = kernels.plan(make_rows(store, [0, 1, 2], [0, 0, 90], [100, 50, 100], lists), 6, 2, 64)
    q = torch.zeros(3, 6, 64, dtype=torch.bfloat16)
    before = snapshot(kernels)
    kernels.attend(q, store.kv, plan, scale=1.0, out=torch.empty_like(q))
    positions = 2 * 100 + 2 * 50 + (3 + 10) + (1 + 10)
    assert since(kernels, before) == Counters(3, positions, positions * 2 * 64 * 2, 0, (3 + 1) * 2 * 64 * 2)
    before = snapshot(kernels)
    kernels.score(q, store.kv, plan, scale=1.0, out=torch.empty(3, 6, 100))
    assert since(kernels, before) == Counters(0, 0, 0, positions * 64 * 2, 0)


def test_counters_of_starts_per_head_and_of_a_shared_list(kernels: Kernels) -> None:
    store = paged(1, 100, 2, 64, dtype=torch.bfloat16)
    plan = kernels.plan(make_rows(store, [0, 0], [[0, 90], [50, 60]], [100, 70], make_lists([[[1, 2]], [[]]])), 6, 2, 64)
    q = torch.zeros(2, 6, 64, dtype=torch.bfloat16)
    before = snapshot(kernels)
    kernels.attend(q, store.kv, plan, scale=1.0, out=torch.empty_like(q))
    positions = 2 * 2 + (100 + 10) + (20 + 10)
    assert since(kernels, before) == Counters(2, positions, positions * 2 * 64 * 2, 0, 2 * 2 * 2 * 64 * 2)


def test_counters_of_a_chunk(kernels: Kernels) -> None:
    """Rows of a tile share a read: at least one pass over the longest row, at most one per row."""
    store = paged(1, 100, 2, 16)
    plan = kernels.plan(make_rows(store, [0] * 8, [0] * 8, range(93, 101)), 2, 2, 16)
    q = torch.zeros(8, 2, 16)
    before = snapshot(kernels)
    kernels.attend(q, store.kv, plan, scale=1.0, out=torch.empty_like(q))
    done, seen = since(kernels, before), 2 * sum(range(93, 101))
    assert (done.rows, done.positions) == (8, seen)
    assert 2 * 100 * 2 * 16 * 4 <= done.kv_bytes <= seen * 2 * 16 * 4
    assert done.list_kv_bytes == 0


def test_counters_of_a_chunk_over_a_list(kernels: Kernels) -> None:
    store = paged(1, 100, 2, 16)
    lists = Lists(ints(range(0, 60, 3)), ints([[0]] * 8), ints([[20]] * 8))
    plan = kernels.plan(make_rows(store, [0] * 8, [90] * 8, range(93, 101), lists), 2, 2, 16)
    q = torch.zeros(8, 2, 16)
    before = snapshot(kernels)
    kernels.attend(q, store.kv, plan, scale=1.0, out=torch.empty_like(q))
    done, row = since(kernels, before), 2 * 16 * 4 * 2
    assert done.positions == 2 * sum(range(23, 31))
    assert 30 * row <= done.kv_bytes <= sum(range(23, 31)) * row
    assert 20 * row <= done.list_kv_bytes <= 8 * 20 * row
