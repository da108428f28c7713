"""Kernel tests run once per back end that loads here, plus storage and row builders shared by all of them.

With KVLOOM_TEST_DEVICE=cuda they run on a GPU, and the tests' own tensors stay where they are (`moved`). That needs nothing of
the other tests, nor what those import: python -m pytest --noconftest -p tests.kernels.conftest tests/kernels/test_attend.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from kvloom.kernels import BACKENDS, Kernels, Lists, PagedKV, Rows, load
from kvloom.kernels.dense import LIBRARIES, installed
from tests.kernels.moved import Moved
from tests.kernels.spanned import Spanned

DEVICE = os.environ.get("KVLOOM_TEST_DEVICE", "cpu")
"""Where the fixture `kernels` computes."""
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the triton back end is loaded, whose kernels then run on the CPU


def _patch_once() -> None:
    """The interpreter replaces all of triton.language at each call of a function within a kernel: most of the time it takes.
    Once for each module is enough."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang

    def patch_unless_patched(function: Any) -> Any:
        if any(of is lang and tl.core.is_builtin(lang.load) for of in function.__globals__.values() for lang in (tl, tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_unless_patched


if DEVICE == "cpu":
    _patch_once()

SLOW = {
    "test_head_dims_that_fill_no_vector", "test_batch_composition_changes_nothing", "test_a_start_per_head", "test_fuzz",
    "test_equal_starts_per_head_are_one_start", "test_number_of_threads_changes_nothing", "test_chunk_lengths",
    "test_short_chunk_over_a_long_context", "test_tokens_are_those_of_the_definition",
    "test_sums_do_not_depend_on_how_they_are_cut_or_on_others", "test_a_token_does_not_depend_on_its_batch",
    "test_what_a_mask_does_not_allow_is_as_if_it_were_not_there",
}  # fmt: skip
"""Tests that take the interpreter minutes, or ask for what the triton back end refuses: test_triton_attention.py and
test_triton_rows.py hold it to the same in small."""


OF_A_CPU = {"test_number_of_threads_changes_nothing"}
"""Tests that ask for a CPU's kernels."""
OF_ALL_ROWS_ALIKE = {
    "test_a_list_of_everything_equals_dense_bitwise", "test_a_list_of_everything_equals_dense_bitwise_in_every_split",
    "test_batch_composition_changes_nothing", "test_chunks_with_different_lists_are_kept_apart",
}  # fmt: skip
"""Tests of bits that do not depend on who else is there, which no library promises."""
VARIANTS = 1
"""Of each other test, drawn the same each time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves those out for kernels that are interpreted, and of tests of many variants all but VARIANTS."""
    if DEVICE != "cpu":
        items[:] = [item for item in items if "kernels" in getattr(item, "fixturenames", ()) and _name(item) not in OF_A_CPU]
        items[:] = [item for item in items if "[triton, " not in item.name or _of_a_library(item)]
        return
    interpreted: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "[triton" in item.name:
            interpreted.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[int] = set()
    for variants in interpreted.values():
        kept = [] if _name(variants[0]) in SLOW else random.Random(0).sample(variants, min(VARIANTS, len(variants)))
        left_out |= {id(item) for item in variants} - {id(item) for item in kept}
    items[:] = [item for item in items if id(item) not in left_out]


def _of_a_library(item: pytest.Item) -> bool:
    """Whether it asks for what libraries compute."""
    return item.path.name in ("test_attend.py", "test_contents.py") and _name(item) not in OF_ALL_ROWS_ALIKE


def _name(item: pytest.Item) -> str:
    """Of the test, without its variant."""
    return item.name.partition("[")[0]


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _available() -> list[str]:
    """Back ends, and on a GPU those of triton beside each library of attention that is installed: "triton, flashinfer"."""
    names = []
    for name in BACKENDS:
        try:
            load(name, DEVICE)
        except Exception:
            continue
        names.append(name)
    libraries = [name for name in LIBRARIES if DEVICE != "cpu" and installed(name)]
    return names + [f"triton, {name}" for name in libraries if "triton" in names]


@pytest.fixture(scope="session", params=_available())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each back end that can be had on this machine and device."""
    name, _, library = request.param.partition(", ")
    made: Any = load(name, DEVICE, threads=2)
    if library:
        made = Spanned(made, library, torch.device(DEVICE))
    return made if DEVICE == "cpu" else cast(Kernels, Moved(made, torch.device(DEVICE)))


@pytest.fixture(autouse=True)
def forget_what_was_moved(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test ends, its memory on another device."""
    yield
    found = request.node.funcargs.get("kernels")
    if isinstance(found, Moved):
        found.forget()


class Paged(NamedTuple):
    """Storage with block tables, and the dense K and V it holds: dense_k, dense_v: [requests, kv_heads, tokens, head_dim]."""

    kv: PagedKV
    tables: Tensor
    dense_k: Tensor
    dense_v: Tensor

    @property
    def tokens(self) -> int:
        return self.dense_k.shape[2]


def ints(values: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    """A contiguous int32 tensor."""
    return torch.as_tensor(values, dtype=torch.int32).contiguous()


def paged(requests: int, tokens: int, heads: int, dim: int, *, dtype: torch.dtype = torch.float32, block_size: int = 16,
          seed: int = 0, layout: str = "HND") -> Paged:  # fmt: skip
    """Random K and V in permuted blocks. layout: of the memory; NHD is seen through a transposed view.

    Blocks that belong to nobody, and the unused ends of last blocks, hold NaN: reading them must not go unnoticed.
    """
    make = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size)
    total = requests * blocks + 3
    tables = ints(torch.randperm(total, generator=make)[: requests * blocks].view(requests, blocks))
    dense = [torch.randn(requests, heads, tokens, dim, generator=make).to(dtype) for _ in "kv"]
    caches = []
    for values in dense:
        shape = (total, heads, block_size, dim) if layout == "HND" else (total, block_size, heads, dim)
        cache = torch.full(shape, float("nan"), dtype=dtype)
        cache = cache if layout == "HND" else cache.transpose(1, 2)
        for request in range(requests):
            for position in range(tokens):
                block = int(tables[request, position // block_size])
                cache[block, :, position % block_size] = values[request, :, position]
        caches.append(cache)
    return Paged(PagedKV(*caches), tables, *dense)


def make_rows(
    store: Paged,
    request: Sequence[int],
    start: Sequence[int] | Sequence[Sequence[int]],
    stop: Sequence[int],
    lists: Lists | None = None,
) -> Rows:
    """Rows over the tables of `store`; start per row, or per row and KV head."""
    return Rows(store.tables, ints(request), ints(start), ints(stop), lists)


def make_lists(positions: Sequence[Sequence[Sequence[int]]]) -> Lists:
    """positions[row][head or 0]: ascending positions."""
    flat: list[int] = []
    offsets, lengths = [], []
    for row in positions:
        offsets.append([len(flat) + sum(len(p) for p in row[:i]) for i in range(len(row))])
        lengths.append([len(p) for p in row])
        flat.extend(p for head in row for p in head)
    return Lists(ints(flat or [0]), ints(offsets), ints(lengths))


def masked_attention(q: Tensor, store: Paged, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over dense K and V with a boolean mask, all in fp64: an oracle that shares nothing with the kernels.

    Returns out: [rows, q_heads, head_dim] and lse: [rows, q_heads], fp64; rows that see nothing give 0 and -inf.
    """
    count, q_heads, _ = q.shape
    kv_heads = store.dense_k.shape[1]
    mask = torch.zeros(count, kv_heads, store.tokens, dtype=torch.bool)
    for row in range(count):
        starts = rows.start[row].expand(kv_heads) if rows.start.ndim == 1 else rows.start[row]
        for head in range(kv_heads):
            mask[row, head, int(starts[head]) : int(rows.stop[row])] = True
        if rows.lists is not None:
            for head in range(kv_heads):
                column = min(head, rows.lists.offsets.shape[1] - 1)
                offset, length = int(rows.lists.offsets[row, column]), int(rows.lists.lengths[row, column])
                mask[row, head, rows.lists.positions[offset : offset + length].long()] = True
    spread = q_heads // kv_heads
    request = rows.request.long()
    keys = store.dense_k.double()[request].repeat_interleave(spread, 1)
    values = store.dense_v.double()[request].repeat_interleave(spread, 1)
    scores = torch.einsum("rhd,rhnd->rhn", q.double(), keys) * scale
    scores = scores.masked_fill(~mask.repeat_interleave(spread, 1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return torch.einsum("rhn,rhnd->rhd", weights, values), lse


OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-5}
"""Of products with quantised weights, relative to each output's size."""


def activations(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width], whose groups of 32 differ in size by a thousand, one of them zero."""
    make = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=make) * torch.logspace(-1.5, 1.5, width // 32).repeat_interleave(32)
    x[:, :32] = 0
    return x.to(dtype)


def close(out: Tensor, expected: Tensor) -> bool:
    """Whether products are as good as their dtype; expected: fp64."""
    size = expected.abs().amax(1, keepdim=True)
    return bool(((out.double() - expected).abs() <= OUTPUT_ERROR[out.dtype] * (expected.abs() + 0.1 * size + 1e-6)).all())
