"""Compile ahead of the first request, by doing every operation once on a handful of elements.

Kernels are specialised on element types only, so the smallest shapes compile what the largest need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from kvloom.kernels.interface import Kernels, PagedKV, Rows

Progress = Callable[[str, float], None]
"""Called with what was made ready and the seconds it took."""


def _operations(kernels: Kernels, dtype: torch.dtype, stream: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    kv = PagedKV(*(torch.zeros(2, 1, 16, 16, dtype=dtype) for _ in "kv"))
    q, k, qkv = (torch.zeros(4, heads, 16, dtype=dtype) for heads in (2, 1, 4))
    longs, ints = torch.arange(4), torch.arange(4, dtype=torch.int32)
    rows = Rows(
        torch.zeros(1, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), ints + 1
    )
    plan = kernels.plan(rows, 2, 1, 16)
    lse, scores, table, weight = torch.zeros(4, 2), torch.zeros(4, 2, 16), torch.zeros(8, 8), torch.ones(16, dtype=stream)
    wide = torch.zeros(4, 16, dtype=stream)
    yield "attend", lambda: kernels.attend(q, kv, plan, scale=1.0, out=torch.empty_like(q), lse=lse)
    yield "score", lambda: kernels.score(q, kv, plan, scale=1.0, out=scores)
    yield "store", lambda: kernels.store(k, k, kv, longs)
    yield "pool", lambda: kernels.pool(scores, ints, ints + 1, 1, how="sum", window=1, out=torch.empty(4, 1, 16))
    yield "select", lambda: kernels.select(scores[:, 0], ints, 2)
    yield "merge", lambda: kernels.merge(q.clone(), lse.clone(), q, lse)
    yield "rotate", lambda: kernels.rotate(k, ints, torch.ones(8), torch.empty_like(k))
    yield (
        "rotate_store",
        lambda: kernels.rotate_store(qkv.view(4, -1), table, table, longs, kv, longs, q.clone(), k[0, 0], k[0, 0]),
    )
    yield "silu_mul", lambda: kernels.silu_mul(qkv.view(4, -1)[:, :32].contiguous(), torch.empty(4, 16, dtype=dtype))
    for name, delta in (("add_rms_norm", k[:, 0]), ("rms_norm", None)):
        yield name, lambda delta=delta: kernels.add_rms_norm(wide, delta, weight, 1e-5, torch.empty(4, 16, dtype=dtype))  # type: ignore[misc]


def warm(kernels: Kernels, dtypes: Sequence[torch.dtype] = (torch.bfloat16,), progress: Progress | None = None) -> None:
    """Make every operation ready for q, K and V in `dtypes`, with a residual stream in the same dtype or in fp32."""
    for dtype in dtypes:
        for stream in dict.fromkeys((dtype, torch.float32)):
            for name, operation in _operations(kernels, dtype, stream):
                if stream != dtype and name != "add_rms_norm":
                    continue
                start = time.perf_counter()
                operation()
                if progress is not None:
                    progress(f"{name} {str(dtype).removeprefix('torch.')}", time.perf_counter() - start)
