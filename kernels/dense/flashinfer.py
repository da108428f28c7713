"""FlashInfer: wrappers that plan on the host, and read page tables of our own layout (HND) as they are.

Rows of one request each go to `BatchDecodeWithPagedKVCacheWrapper`, chunks to `BatchPrefillWithPagedKVCacheWrapper`. Captured
steps have a wrapper for each number of rows and KV heads, with page tables of fixed address: `plan` writes there what the next
replay reads. Written by the sources of flashinfer-python 0.7.4.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.kernels.dense import HALVES, Attend, ends, send
from kvloom.kernels.interface import PagedKV, Rows, Spans

WORKSPACE = 256 << 20
"""Bytes for partial results, which all wrappers share: one runs at a time."""
HEAD_DIMS = (64, 128, 256)
DTYPES = HALVES


class FlashInfer:
    """See `Library`."""

    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError if it is broken."""
        self._module: Any = importlib.import_module("flashinfer")
        self.about = f"flashinfer {getattr(self._module, '__version__', '')}".strip()
        with torch.inference_mode(False):
            self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        self._device = device
        self._wrappers: dict[tuple[str, int, int], _Wrapper] = {}
        """By kind, KV heads, and the rows of captured steps; 0 for all others."""

    def check(self, head_dim: int, dtype: torch.dtype, block_size: int) -> None:
        """See `Library`. Pages may have any size."""
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim is {head_dim}; flashinfer takes {', '.join(map(str, HEAD_DIMS))}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; flashinfer takes bf16 and fp16")

    def plan(self, rows: Rows, spans: Spans, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Attend:
        """See `Library`. JIT compilers run when a kind of wrapper is first planned."""
        if not rows.size:
            return lambda q, kv, out: None
        single = len(spans.counts) == rows.size
        key = ("decode" if single else "chunk", kv_heads, rows.size if spans.captured else 0)
        if key not in self._wrappers:
            with torch.inference_mode(False):
                self._wrappers[key] = self._made(key, rows)
        pages = np.array([len(blocks) for blocks in spans.blocks])
        last = np.where(pages > 0, np.array(spans.stops) - (pages - 1) * spans.block_size, 0)
        table = np.concatenate([np.zeros(0, np.int32), *spans.blocks])
        held = (_host(ends(pages.tolist())), send(table, self._device), _host(last))
        shape = (q_heads, kv_heads, head_dim, spans.block_size)
        more = {"sm_scale": head_dim**-0.5, "q_data_type": dtype, "kv_data_type": dtype}
        wrapper = self._wrappers[key]
        if single:
            wrapper.plan(*held, *shape, **more)
        else:
            wrapper.plan(_host(ends(spans.counts)), *held, *shape, causal=True, **more)
        return wrapper.attend

    def _made(self, key: tuple[str, int, int], rows: Rows) -> _Wrapper:
        kind, _, captured = key
        if kind == "chunk":
            return _Wrapper(self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND"), self._device)
        fixed = {}
        if captured:
            sizes = {"indptr": captured + 1, "indices": max(1, captured * rows.tables.shape[1]), "last_page_len": captured}
            fixed = {f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=self._device)
                     for name, size in sizes.items()}  # fmt: skip
        make = self._module.BatchDecodeWithPagedKVCacheWrapper
        made = make(self._workspace, "HND", use_cuda_graph=bool(captured), use_tensor_cores=True, **fixed)
        return _Wrapper(made, self._device)


class _Wrapper:
    """A wrapper, whose plans go through pinned memory of its own: that is written again once the device has read it."""

    def __init__(self, made: Any, device: torch.device) -> None:
        self._made, self._device = made, device
        self._read: torch.cuda.Event | None = None

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self._read is not None:
            self._read.synchronize()
        self._made.plan(*args, **kwargs)
        if self._device.type == "cuda":
            self._read = torch.cuda.Event()
            self._read.record()

    def attend(self, q: Tensor, kv: PagedKV, out: Tensor) -> None:
        q = q.contiguous()
        if out.is_contiguous():
            self._made.run(q, (kv.k, kv.v), out=out)
        else:
            out.copy_(self._made.run(q, (kv.k, kv.v)))


def _host(values: Any) -> Tensor:
    """Numbers that plans are made from, which stay on the host: from a device they would be waited for."""
    return torch.from_numpy(np.asarray(values, np.int32))
