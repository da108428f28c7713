"""Calls of every operation as a model would make them, for `compiled`: nothing is computed, launches are recorded.

Rows of a model with 32 query heads and 8 KV heads of 128, in bf16, 32,768 tokens to a request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvloom.kernels import quantized
from kvloom.kernels.interface import COMPARES, Compare, Folded, Lists, PagedKV, Renewal, Rows
from kvloom.kernels.triton import TritonKernels, choose, rows
from kvloom.kernels.triton.linear import TritonQuantized

Kind = Literal["decode", "lists", "chunk", "list chunk", "score"]
"""Kinds of attention."""
KINDS: tuple[Kind, ...] = get_args(Kind)

Q_HEADS, KV_HEADS, DIM, WIDTH = 32, 8, 128, 32_768


def _of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


_fp32 = functools.partial(_of, dtype=torch.float32)
_int32 = functools.partial(_of, dtype=torch.int32)
_int64 = functools.partial(_of, dtype=torch.int64)


def _cache() -> PagedKV:
    return PagedKV(*(_of(64, KV_HEADS, 16, DIM) for _ in "kv"))


def _rotate_store(n: int, q_norm: Tensor | None) -> None:
    rows.rotate_store(_of(n, (Q_HEADS + 2 * KV_HEADS) * DIM), _fp32(4096, DIM // 2), _fp32(4096, DIM // 2), _int64(n),
                      _cache(), _int64(n), _of(n, Q_HEADS, DIM), q_norm, q_norm, 1e-6)  # fmt: skip


def _pool(n: int) -> None:
    TritonKernels("cpu").pool(_fp32(n, Q_HEADS, WIDTH), _int32(n), _int32(n), KV_HEADS, how="sum", window=7,
                out=_fp32(n, KV_HEADS, WIDTH), active=_int32(n))  # fmt: skip


def _select(n: int) -> None:
    TritonKernels("cpu").select(_fp32(n, KV_HEADS, WIDTH), _int32(n), 2048, offset=_int32(n), at=_int32(n),
                  out=(_int32(KV_HEADS, 2048), None))  # fmt: skip


def _renew(n: int, compare: Compare) -> None:
    how = Renewal(tail=0, query=8, width=2048, recent=64, most=256, compare=compare, threshold=0.9, dense=False)
    choose.renew(_of(n, Q_HEADS, DIM), _int32(1 << 20), _int32(n), _int32(n), _int32(n), how,
                 (_fp32(n, DIM // 2), _fp32(n, DIM // 2)), _int32(n), _int32(n), _int32(n, KV_HEADS), _int64(3))  # fmt: skip


def attend(n: int, what: Kind, dtype: torch.dtype = torch.bfloat16, dim: int = DIM,
           group: int = Q_HEADS // KV_HEADS) -> None:  # fmt: skip
    """Of rows with lists, all that can be asked for; of a chunk, those of its tiles that share reads, if there are any."""
    kernels, zeros, q_heads = TritonKernels("cpu"), torch.zeros(n, dtype=torch.int32), group * KV_HEADS
    seen = Rows(_int32(1 if "chunk" in what else n, WIDTH // 16), zeros, zeros, zeros, None, None if "chunk" in what else zeros)
    if "list" in what:
        seen = seen._replace(lists=Lists(zeros, *(torch.zeros(n, KV_HEADS, dtype=torch.int32) for _ in "ol")))
    kv = PagedKV(*(_of(64, KV_HEADS, 16, dim, dtype=dtype) for _ in "kv"))
    q, plan, logits = _of(n, q_heads, dim, dtype=dtype), kernels.plan(seen, q_heads, KV_HEADS, dim), _fp32(n, q_heads, WIDTH)
    plan.tiles = plan.tiles[-1:]
    more: dict[str, Any] = {"lse": _fp32(n, q_heads), "logits": logits, "heads": _int32(KV_HEADS), "read": _int64(n),
                            "folded": Folded(zeros, zeros, zeros)}  # fmt: skip
    if what == "score":
        kernels.score(q, kv, plan, scale=0.1, out=logits, active=zeros)
    else:
        kernels.attend(q, kv, plan, scale=0.1, out=q, **more if "list" in what else {})


def _linear(n: int, bits: int) -> None:
    kind = "Q4_1" if bits == 4 else "Q8_0"
    packed = quantized.PackedWeight(
        torch.empty(4096 * quantized.KINDS[kind].row_bytes(4096), dtype=torch.uint8), 4096, 4096, kind
    )
    TritonQuantized("cpu").linear(packed, None)(_of(n, 4096), _of(n, 4096))


def _fold(n: int, most: int) -> None:
    request, first, last, at = (_int32(n) for _ in range(4))
    TritonKernels("cpu").fold(_cache(), _int32(n, WIDTH // 16), request, first, last, _int32(1 << 20), at, origin=4, most=most)


CALLS: dict[str, Callable[[int], object]] = {
    **{what: functools.partial(attend, what=what) for what in KINDS},
    "lists of 64, fp16": lambda n: attend(n, "lists", torch.float16, 64),
    "chunk of 256": lambda n: attend(n, "chunk", dim=256),
    "decode, fp32": lambda n: attend(n, "decode", torch.float32),
    "chunk, fp32": lambda n: attend(n, "chunk", torch.float32),
    "fold": functools.partial(_fold, most=16),
    "fold of a prompt": lambda n: _fold(-(-n // 16), most=8192),
    "store": lambda n: rows.store(_of(n, KV_HEADS, DIM), _of(n, KV_HEADS, DIM), _cache(), _int64(n)),
    "rotate": lambda n: rows.rotate(_of(n, KV_HEADS, DIM), _int32(n), _fp32(DIM // 2), _of(n, KV_HEADS, DIM)),
    "rotate_store": lambda n: _rotate_store(n, None),
    "rotate_store with QK norm": lambda n: _rotate_store(n, _of(DIM)),
    "add_rms_norm": lambda n: rows.add_rms_norm(_of(n, 4096), _of(n, 4096), _of(4096), 1e-6, _of(n, 4096)),
    "silu_mul": lambda n: rows.silu_mul(_of(n, 2 * 14_336), _of(n, 14_336)),
    "linear of 4 bits": lambda n: _linear(n, 4),
    "linear of 4 bits, a chunk": lambda n: _linear(8 * n, 4),
    "linear of 8 bits": lambda n: _linear(n, 8),
    "linear of 8 bits, a chunk": lambda n: _linear(8 * n, 8),
    "pool": _pool,
    "select": _select,
    **{f"renew ({compare})": functools.partial(_renew, compare=compare) for compare in COMPARES},
    "sample": lambda n: TritonKernels("cpu").sample(_fp32(n, 151_936), _of(n, 5, dtype=torch.float64), _int64(n)),
}
"""Calls of n rows, one per operation and kind of launch, by the name under which it appears."""
