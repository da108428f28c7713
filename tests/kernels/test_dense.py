"""Attention by libraries, whose place stand-ins take (`libraries`): arguments say what rows see, and everything else is the
back end's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kernels import Kernels, dense, load
from kvloom.kernels.interface import Rows, Spans
from tests.kernels.conftest import TOLERANCE, Paged, ints, make_rows, masked_attention, paged
from tests.kernels.libraries import install
from tests.kernels.spanned import Spanned

LIBRARIES = {"flashinfer": "flashinfer", "flash_attn": "flash_attn", "flash_attn_interface": "flash_attn"}
"""Modules, and the names by which they are asked for."""
HEADS = (4, 2, 16)


def made(monkeypatch: pytest.MonkeyPatch, module: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Any]]:
    """The torch back end beside a library, whose device is said to be no CPU; and FlashInfer's wrappers."""
    wrappers = install(monkeypatch, module)
    library: Any = {
        "flashinfer": lambda: _of("flashinfer").FlashInfer,
        "flash_attn": lambda: _of("flash_attn").FlashAttention2,
        "flash_attn_interface": lambda: _of("flash_attn").FlashAttention3,
    }[module]()(torch.device("cpu"))
    return dense.Beside(load("torch"), library, torch.device("cpu"), dtype), wrappers


def _of(name: str) -> Any:
    import importlib

    return importlib.import_module(f"kvloom.kernels.dense.{name}")


def with_spans(store: Paged, chunks: Sequence[tuple[int, int]], first: int = 0, *, captured: bool = False) -> Rows:
    """Rows of requests from `first` on: (rows, tokens that the last sees) of each."""
    size = store.kv.k.shape[2]
    request = [first + i for i, (count, _) in enumerate(chunks) for _ in range(count)]
    stop = [end - later for count, end in chunks for later in reversed(range(count))]
    blocks = [store.tables[first + i, : -(-end // size)].numpy().astype(np.int32) for i, (_, end) in enumerate(chunks)]
    known = Spans(first, [count for count, _ in chunks], [end for _, end in chunks], blocks, size, captured)
    return make_rows(store, request, [0] * len(stop), stop)._replace(spans=known)


def attended(kernels: Kernels, store: Paged, rows: Rows, q: Tensor, **more: Any) -> Tensor:
    q_heads, kv_heads, dim = q.shape[1], *store.kv.k.shape[1::2]
    plan = kernels.plan(rows, q_heads, kv_heads, dim)
    return kernels.attend(q, store.kv, plan, scale=dim**-0.5, out=torch.full_like(q, torch.nan), **more)


def close(out: Tensor, q: Tensor, store: Paged, rows: Rows) -> None:
    wanted, _ = masked_attention(q, store, rows, q.shape[2] ** -0.5)
    torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("module", LIBRARIES)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=5),
    first=st.integers(0, 2),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    block=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["HND", "NHD"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_see_what_they_should(
    monkeypatch: pytest.MonkeyPatch, module: str, chunks: list[tuple[int, int]], first: int, group: int, block: int,
    dtype: torch.dtype, layout: str,
) -> None:  # fmt: skip
    """Decode rows, padding among them, and chunks over a prefix, in one call; positions are counted."""
    kernels, _ = made(monkeypatch, module, dtype)
    chunks = [(count, max(count, end)) if count > 1 else (1, end) for count, end in chunks]
    size = 256 if module == "flash_attn" else block
    store = paged(first + len(chunks), 32, 2, 16, dtype=dtype, block_size=size, layout=layout)
    rows = with_spans(store, chunks, first)
    q = torch.randn(rows.size, 2 * group, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    close(attended(kernels, store, rows, q), q, store, rows)
    assert (kernels.counters.rows, kernels.counters.positions) == (int((rows.stop > 0).sum()), 2 * int(rows.stop.sum()))
    ends = sum(end for _, end in chunks)
    assert kernels.counters.kv_bytes == 2 * 2 * 16 * dtype.itemsize * ends


@pytest.mark.parametrize("module", LIBRARIES)
def test_what_a_library_does_not_hand_out_is_the_back_ends_own(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    kernels, _ = made(monkeypatch, module)
    store = paged(2, 40, 2, 16, block_size=256)
    rows, q, lse = with_spans(store, [(1, 33), (3, 9)]), torch.randn(4, 4, 16), torch.zeros(4, 4)
    close(attended(kernels, store, rows, q, lse=lse), q, store, rows)
    assert (lse - masked_attention(q, store, rows, 0.25)[1]).abs().max() < 1e-5
    plan, out = kernels.plan(rows, *HEADS), torch.empty_like(q)
    kernels.attend(q, store.kv, plan, scale=0.5, out=out)
    torch.testing.assert_close(out.double(), masked_attention(q, store, rows, 0.5)[0], atol=1e-5, rtol=1e-5)
    kernels.score(q, store.kv, plan, scale=0.25, out=torch.empty(4, 4, 33))
    other = make_rows(store, [0, 1], [3, 0], [9, 4])
    assert not isinstance(kernels.plan(other, *HEADS), dense.DensePlan)


@pytest.mark.parametrize("module", LIBRARIES)
def test_plans_of_captured_steps_lie_where_they_lay(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A call of the first plan gives what the last plan says, as a replay does."""
    kernels, wrappers = made(monkeypatch, module)
    store, q, out = paged(3, 40, 2, 16, block_size=256), torch.randn(3, 4, 16), torch.empty(3, 4, 16)
    rows = with_spans(store, [(1, 33), (1, 9), (1, 0)], captured=True)
    plan = kernels.plan(rows, *HEADS)
    for ends in ((5, 40, 17), (38, 0, 0)):
        later = with_spans(store, [(1, end) for end in ends], captured=True)
        rows.stop.copy_(later.stop)
        kernels.plan(later._replace(stop=rows.stop), *HEADS, plan)
        kernels.attend(q, store.kv, plan, scale=0.25, out=out)
        close(out, q, store, later)
    assert kernels.counters.positions == 2 * (5 + 40 + 17 + 38) and kernels.counters.rows == 4
    assert [wrapper.plans for wrapper in wrappers] == ([3] if module == "flashinfer" else [])
    kernels.plan(with_spans(store, [(1, 3), (1, 3)]), *HEADS)
    assert [wrapper.fixed for wrapper in wrappers] == ([True, False] if module == "flashinfer" else [])


@pytest.mark.parametrize("module", LIBRARIES)
def test_no_rows(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    kernels, _ = made(monkeypatch, module)
    store = paged(1, 4, 2, 16, block_size=256)
    assert attended(kernels, store, with_spans(store, []), torch.empty(0, 4, 16)).shape == (0, 4, 16)


def test_what_libraries_do_not_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    own, gpu = load("torch"), torch.device("cuda")
    for name, device, dtype, said in (
        ("xformers", gpu, torch.bfloat16, "unknown attention library 'xformers'; allowed: flashinfer, flash_attn"),
        ("flashinfer", torch.device("cpu"), torch.bfloat16, "flashinfer computes on a GPU, and the device is cpu"),
        ("flashinfer", gpu, torch.bfloat16, "none of flashinfer is installed"),
        ("flash_attn", gpu, torch.bfloat16, "none of flash_attn_interface, flash_attn is installed"),
    ):
        with pytest.raises(ValueError, match=said):
            dense.beside(own, name, device, dtype)
    monkeypatch.setattr(dense, "installed", lambda name: name)
    with pytest.raises(ValueError, match="flash_attn takes bf16 and fp16, and dtype is float32"):
        dense.beside(own, "flash_attn", gpu, torch.float32)


@pytest.mark.parametrize(
    ("module", "heads", "block", "said"),
    [
        ("flashinfer", 80, 16, "head_dim is 80; flashinfer takes 64, 128, 256"),
        ("flash_attn", 64, 16, "block size is 16; flash_attn 2 takes multiples of 256: use --block-size 256"),
        ("flash_attn", 320, 256, "head_dim is 320; flash_attn takes multiples of 8 up to 256"),
        ("flash_attn_interface", 20, 16, "head_dim is 20; flash_attn takes multiples of 8 up to 256"),
    ],
)
def test_shapes_that_libraries_do_not_serve_are_refused(
    monkeypatch: pytest.MonkeyPatch, module: str, heads: int, block: int, said: str
) -> None:
    sizes = _of("flashinfer").HEAD_DIMS
    kernels, _ = made(monkeypatch, module)
    monkeypatch.setattr(_of("flashinfer"), "HEAD_DIMS", sizes)
    with pytest.raises(ValueError, match=said):
        kernels.plan(
            Rows(*(ints([[0]] if i == 0 else [0]) for i in range(4)), spans=Spans(0, [1], [0], [], block)), 4, 2, heads
        )


def test_tensors_of_other_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, _ = made(monkeypatch, "flashinfer")
    store = paged(1, 32, 2, 16, block_size=16)
    plan = kernels.plan(with_spans(store, [(1, 20)]), *HEADS)
    for q, kv in ((torch.zeros(2, 4, 16), store.kv), (torch.zeros(1, 4, 16), paged(1, 32, 2, 16, block_size=8).kv)):
        with pytest.raises(ValueError, match="plan is for q, a block of K and a dtype"):
            kernels.attend(q, kv, plan, scale=0.25, out=torch.empty_like(q))


@pytest.mark.parametrize("module", LIBRARIES)
def test_rows_that_nobody_has_described(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As the kernel tests ask a library on a GPU: chunks and single rows, requests in any order and more than once."""
    install(monkeypatch, module)
    monkeypatch.setattr(dense, "beside", lambda own, name, device, dtype: made(monkeypatch, module, dtype)[0])
    monkeypatch.setattr("tests.kernels.spanned.beside", dense.beside)
    kernels: Any = Spanned(load("torch"), LIBRARIES[module], torch.device("cpu"))
    store = paged(3, 40, 2, 16, dtype=torch.bfloat16, block_size=256)
    rows = make_rows(store, [2, 2, 2, 0, 1, 1, 2, 0], [0] * 8, [3, 4, 5, 33, 1, 2, 6, 0])
    q, lse = torch.randn(8, 4, 16).bfloat16(), torch.zeros(8, 4)
    close(attended(kernels, store, rows, q, lse=lse), q, store, rows)
    assert kernels.asked == 1 and not lse.isnan().any()
    rows = make_rows(store, [2, 1], [1, 0], [3, 4])
    close(attended(kernels, store, rows, q[:2]), q[:2], store, rows)
    assert kernels.asked == 1
