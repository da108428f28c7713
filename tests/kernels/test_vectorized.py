"""What only the torch back end promises: no operation waits for a result, and working memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvloom.kernels import Kernels, tiles
from kvloom.kernels.interface import Folded
from kvloom.kernels.vectorized import TorchKernels
from tests.kernels.conftest import ints, make_lists, make_rows, paged

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


class Recorder(TorchDispatchMode):
    """Names of the operations within, and the most numbers that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(made, torch.Tensor) and made.dtype is torch.float32 and not made._is_view():
            self.largest = max(self.largest, made.numel())
        return made


def calls(kernels: Kernels) -> list[Callable[[], object]]:
    """One of every operation: decode rows with a list and without, a chunk, a row that stores nothing."""
    store = paged(2, 300, 2, 64, dtype=torch.bfloat16)
    rows = make_rows(store, [1, 0, *[0] * 5], [100, 0, *[0] * 5], [280, 300, *range(90, 95)],
                     make_lists([[[1, 4, 40], [0, 2]], *[[[], []]] * 6]))  # fmt: skip
    q, plan = torch.randn(7, 6, 64).bfloat16(), kernels.plan(rows, 6, 2, 64)
    out, lse, logits = torch.empty_like(q), torch.empty(7, 6), torch.empty(2, 6, 310)
    scores = torch.empty(7, 6, 310)
    kernels.attend(q, store.kv, plan, scale=0.1, out=out, logits=logits)  # makes the plan for rows that hand out logits
    kernels.score(q, store.kv, plan, scale=0.1, out=scores)
    new, qkv, slots, table = q[:, :2], torch.randn(7, 640).bfloat16(), torch.arange(-1, 6), torch.randn(9, 32)
    words = torch.zeros(256, dtype=torch.int32)
    return [
        lambda: kernels.attend(q, store.kv, plan, scale=0.1, out=out, lse=lse, logits=logits),
        lambda: kernels.score(q, store.kv, plan, scale=0.1, out=scores),
        lambda: kernels.store(new, new, store.kv, slots),
        lambda: kernels.rotate_store(qkv, table, table, slots + 1, store.kv, slots, q, q[0, 0], q[0, 1]),
        lambda: kernels.pool(scores, ints([3] * 7), ints([80] * 7), 2, how="sum", window=3, out=torch.empty(7, 2, 80)),
        lambda: kernels.select(scores[:, 0], ints([80] * 7), 9, offset=ints([4] * 7)),
        lambda: kernels.attend(q, store.kv, plan, scale=0.1, out=out, folded=Folded(words, ints([0] * 7), ints([9] * 7))),
        lambda: kernels.fold(
            store.kv, store.tables, ints([0, 1]), ints([4, 4]), ints([90, 9]), words, ints([0, -1]), origin=4, most=86
        ),
        lambda: kernels.rotate(new, ints(range(7)), torch.ones(32), torch.empty_like(new)),
        lambda: kernels.add_rms_norm(qkv, qkv.clone(), qkv[0], 1e-5, torch.empty_like(qkv)),
        lambda: kernels.silu_mul(qkv, torch.empty(7, 320).bfloat16()),
    ]


@pytest.mark.parametrize("number", range(11))
def test_no_operation_waits_for_a_result(number: int) -> None:
    """On a device with a queue of its own, reading a result back would empty the queue once per layer."""
    call = calls(TorchKernels())[number]
    with Recorder() as recorder:
        call()
    assert recorder.names and not recorder.names & WAITS


def test_slots_of_nobody_change_nothing() -> None:
    kv = paged(1, 40, 2, 16).kv
    before = [cache.clone() for cache in kv]
    new = torch.ones(3, 2, 16)
    TorchKernels().store(new, new, kv, torch.tensor([-1, -1, -1]))
    TorchKernels().store(new[:0], new[:0], kv, torch.empty(0, dtype=torch.int64))
    for cache, old in zip(kv, before):
        torch.testing.assert_close(cache, old, atol=0, rtol=0, equal_nan=True)


def test_nothing_to_choose_from() -> None:
    columns, counts = TorchKernels().select(torch.empty(2, 0), ints([0, 0]), 3)
    assert columns.tolist() == [[-1] * 3] * 2 and counts.tolist() == [0, 0]


def test_working_memory_of_a_long_prompt() -> None:
    """No tensor on the way is larger than ROOM, or two tiles' scores."""
    store = paged(1, 3000, 2, 16, dtype=torch.bfloat16)
    kernels, q = TorchKernels(), torch.randn(1000, 6, 16).bfloat16()
    plan = kernels.plan(make_rows(store, [0] * 1000, [0] * 1000, range(2001, 3001)), 6, 2, 16)
    with Recorder() as recorder:
        kernels.attend(q, store.kv, plan, scale=0.25, out=torch.empty_like(q))
    assert recorder.largest <= max(tiles.ROOM, 2 * 3072 * (tiles.TILE * 3 + 2 * 16))
