"""flash-attn, which reads block tables as they are, and K and V through views: [blocks, block_size, kv_heads, head_dim].

Version 2 (package flash-attn) wants pages of multiples of 256 positions; version 3 (module flash_attn_interface, for compute
capability 8.0 to 9.0) takes any. Version 2's call for decode steps asks the device for the longest length: the one for ragged
batches, which does not, serves both. Written by the sources of 2.8.4 and of 3 as of August 2026.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.kernels.dense import HALVES, Attend, ends, send
from kvloom.kernels.interface import PagedKV, Rows, Spans

DTYPES = HALVES
LARGEST_HEAD = 256
PAGE_2 = 256
"""A page of version 2 has a multiple of so many positions."""


def _check(head_dim: int, dtype: torch.dtype) -> None:
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        raise ValueError(f"head_dim is {head_dim}; flash_attn takes multiples of 8 up to {LARGEST_HEAD}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; flash_attn takes bf16 and fp16")


class FlashAttention2:
    """See `Library`."""

    name = "flash_attn"

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError if it is broken, ValueError if it is too old for block tables."""
        module: Any = importlib.import_module("flash_attn")
        self.about, self._device = f"flash_attn {module.__version__}", device
        self._call = module.flash_attn_varlen_func
        if "block_table" not in inspect.signature(self._call).parameters:
            raise ValueError(f"{self.about} takes no block tables; install a newer one")
        self._ends: dict[int, tuple[Tensor, Tensor]] = {}
        """Of captured steps, by their rows: where those of queries and of keys lie."""

    def check(self, head_dim: int, dtype: torch.dtype, block_size: int) -> None:
        """See `Library`."""
        _check(head_dim, dtype)
        if block_size % PAGE_2:
            raise ValueError(f"block size is {block_size}; flash_attn 2 takes multiples of {PAGE_2}: use --block-size {PAGE_2}")

    def plan(self, rows: Rows, spans: Spans, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Attend:
        """See `Library`."""
        if not rows.size:
            return lambda q, kv, out: None
        queries, keys = (send(ends(lengths), self._device) for lengths in (spans.counts, spans.stops))
        longest = max(1, *spans.stops)
        if spans.captured:
            longest = rows.tables.shape[1] * spans.block_size  # a number that replays repeat
            if rows.size not in self._ends:
                with torch.inference_mode(False):
                    self._ends[rows.size] = torch.zeros_like(queries), torch.zeros_like(keys)
            queries, keys = (held.copy_(new) for held, new in zip(self._ends[rows.size], (queries, keys)))
        tables, most = _tables(rows, spans), max(spans.counts)

        def attend(q: Tensor, kv: PagedKV, out: Tensor) -> None:
            k, v = (cache.transpose(1, 2) for cache in kv)
            found = self._call(q, k, v, queries, keys, most, longest, softmax_scale=head_dim**-0.5, causal=True,
                               block_table=tables)  # fmt: skip
            out.copy_(found)

        return attend


class FlashAttention3:
    """See `Library`."""

    name = "flash_attn"

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError if it is broken, ValueError for a GPU that it is not made for."""
        module: Any = importlib.import_module("flash_attn_interface")
        self.about, self._device, self._call = "flash_attn 3", device, module.flash_attn_with_kvcache
        if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) >= (10, 0):
            raise ValueError(f"flash_attn 3 is made for compute capability 8.0 to 9.0, and this GPU has {found[0]}.{found[1]}")

    def check(self, head_dim: int, dtype: torch.dtype, block_size: int) -> None:
        """See `Library`. Pages may have any size."""
        _check(head_dim, dtype)

    def plan(self, rows: Rows, spans: Spans, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Attend:
        """See `Library`. Rows of one request each need nothing of the host: lengths are read where they are."""
        if not rows.size:
            return lambda q, kv, out: None
        common = {"page_table": _tables(rows, spans), "softmax_scale": head_dim**-0.5, "causal": True}
        if len(spans.counts) == rows.size:
            common |= {"cache_seqlens": rows.stop}
        else:
            common |= {"cache_seqlens": send(spans.stops, self._device), "cu_seqlens_q": send(ends(spans.counts), self._device),
                       "max_seqlen_q": int(np.max(spans.counts))}  # fmt: skip

        def attend(q: Tensor, kv: PagedKV, out: Tensor) -> None:
            k, v = (cache.transpose(1, 2) for cache in kv)
            out.copy_(self._call(q if "cu_seqlens_q" in common else q[:, None], k, v, **common).view_as(out))

        return attend


def _tables(rows: Rows, spans: Spans) -> Tensor:
    """[requests, max_blocks]: those of the spans."""
    return rows.tables[spans.first : spans.first + len(spans.counts)]
