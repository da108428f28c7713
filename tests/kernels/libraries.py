"""FlashInfer and flash-attn where neither can be had: what their documents say that calls do, in torch on the same arguments.

Arguments that they would refuse, or read beyond, are refused. In graph mode a FlashInfer wrapper reads its fixed buffers alone,
and what `plan` puts elsewhere is not seen by replays; while calls are captured, a run or a call is recorded as one.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.simulated import STREAM, Call

INT, WORKSPACE = torch.int32, 1 << 10


def here(tensor: Tensor) -> Tensor:
    """What a tensor of the simulated device holds."""
    return getattr(tensor, "here", tensor)


def one(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Tensor:
    """q: [n, q_heads, dim]; keys, values: [m, kv_heads, dim]. The last query sees all keys; if causal, others fewer."""
    n, m = len(q), len(keys)
    if not m:
        return torch.zeros_like(q)
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q.double(), keys.double().repeat_interleave(group, 1)) * scale
    if causal:
        seen = torch.arange(m) <= torch.arange(n)[:, None] + m - n
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hnm,mhd->nhd", weights, values.double().repeat_interleave(group, 1)).to(q.dtype)


def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
    """On the simulated device, a call that is captured and made again on the same tensors; results go where they went."""

    @functools.wraps(call)
    def called(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        def again() -> None:
            here(out).copy_(call(*args, **kwargs))

        if STREAM.captured is None:
            again()
        else:
            STREAM.captured.append(Call(again, (), {}, []))
        return out

    return called


class _Wrapper:
    """What both kinds of wrappers have. Pages of K and V: [pages, kv_heads, page_size, head_dim]."""

    made: list[_Wrapper]
    causal = False

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8 and workspace.numel() == WORKSPACE and not here(workspace).any()
        assert kv_layout == "HND"
        self.workspace, self.fixed, self.plans, self.captures = workspace, False, 0, 0
        self.made.append(self)

    def _planned(self, starts: Tensor, pages: Tensor, last: Tensor, shape: tuple[int, ...], more: dict[str, Any]) -> None:
        q_heads, kv_heads, _, size = shape
        for name, tensor in (("indptr", starts), ("last_page_len", last)):
            assert tensor.dtype == INT and tensor.device.type == "cpu", f"{name}: a plan would wait for the device"
        counts = starts.diff()
        assert starts[0] == 0 and starts[-1] == len(pages) and len(last) == len(counts) and (counts >= 0).all()
        assert (((last >= 1) & (last <= size)) | ((counts == 0) & (last == 0))).all()
        assert pages.dtype == INT and pages.device == self.workspace.device and q_heads % kv_heads == 0
        assert more["q_data_type"] == more["kv_data_type"] and more["sm_scale"] > 0
        self.shape, self.scale, self.dtype, self.plans = shape, more["sm_scale"], more["q_data_type"], self.plans + 1
        if self.fixed:
            assert len(last) == len(self.last) and len(pages) <= len(self.pages)
            self.starts.copy_(starts), self.pages[: len(pages)].copy_(pages), self.last.copy_(last)
        else:
            self.starts, self.pages, self.last = starts.clone(), pages.clone(), last.clone()

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        q_heads, kv_heads, dim, size = self.shape
        k, v = pages
        assert k.shape[1:] == v.shape[1:] == (kv_heads, size, dim) and k.stride() == v.stride() and k.stride(-1) == 1
        assert q.shape[1:] == (q_heads, dim) and q.dtype == k.dtype == v.dtype == self.dtype and q.is_contiguous()
        out = torch.empty_like(q) if out is None else out
        assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        self.captures += STREAM.captured is not None
        return recorded(self._run)(q, k, v, out=out)

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts, pages, last = (here(tensor).tolist() for tensor in (self.starts, self.pages, self.last))
        ends, found = self.queries(), []
        q, k, v = here(q), here(k), here(v)
        assert ends[-1] == len(q)
        for i, (first, stop) in enumerate(itertools.pairwise(ends)):
            own = pages[starts[i] : starts[i + 1]]
            seen = (len(own) - 1) * self.shape[3] + last[i] if own else 0
            keys, values = (cache[own].transpose(1, 2).flatten(0, 1)[:seen] for cache in (k, v))
            found.append(one(q[first:stop], keys, values, self.scale, self.causal))
        return torch.cat(found)

    def queries(self) -> list[int]:
        raise NotImplementedError


class Decode(_Wrapper):
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper`."""

    def __init__(
        self, workspace: Tensor, kv_layout: str, use_cuda_graph: bool = False, use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None, paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(workspace, kv_layout)
        self.fixed = use_cuda_graph
        if use_cuda_graph:
            buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            assert all(buffer is not None and buffer.dtype == INT for buffer in buffers)
            self.starts, self.pages, self.last = buffers  # type: ignore[assignment]
            assert len(self.starts) == len(self.last) + 1

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int,
             page_size: int, **more: Any) -> None:  # fmt: skip
        self._planned(indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim, page_size), more)

    def queries(self) -> list[int]:
        return list(range(len(self.last) + 1))


class Prefill(_Wrapper):
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`, without graphs."""

    def plan(self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
             num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, causal: bool = False,
             **more: Any) -> None:  # fmt: skip
        assert qo_indptr.dtype == INT and qo_indptr.device.type == "cpu" and len(qo_indptr) == len(paged_kv_indptr)
        self.rows, self.causal = qo_indptr.tolist(), causal
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._planned(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, shape, more)

    def queries(self) -> list[int]:
        return self.rows


def paged(q: Tensor, k: Tensor, v: Tensor, ends: list[int], lengths: list[int], table: Tensor, scale: float,
          causal: bool) -> Tensor:  # fmt: skip
    """flash-attn's calls. q: [rows, q_heads, dim]; k, v: [blocks, page, kv_heads, dim]; table: [n, most]."""
    assert len(ends) - 1 == len(lengths) == len(table) and ends[-1] == len(q) and k.shape == v.shape
    assert k.stride(-1) == v.stride(-1) == 1 and table.dtype == INT and table.stride(-1) == 1
    found = []
    for i, length in enumerate(lengths):
        assert length <= table.shape[1] * k.shape[1]
        blocks = here(table)[i, : -(-length // k.shape[1])].long()
        keys, values = (here(cache)[blocks].flatten(0, 1)[:length] for cache in (k, v))
        found.append(one(here(q)[ends[i] : ends[i + 1]], keys, values, scale, causal))
    return torch.cat(found)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, causal: bool, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """`flash_attn.flash_attn_varlen_func` of version 2."""
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == INT and max_seqlen_k > 0

    def call() -> Tensor:
        ends, keys = here(cu_seqlens_q).tolist(), here(cu_seqlens_k).diff()
        assert here(cu_seqlens_q).diff().max() <= max_seqlen_q and keys.max() <= max_seqlen_k
        return paged(q, k, v, ends, keys.tolist(), block_table, softmax_scale, causal)

    return recorded(call)(out=torch.empty_like(q))


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor,
                            softmax_scale: float, causal: bool, cu_seqlens_q: Tensor | None = None,
                            max_seqlen_q: int | None = None) -> Tensor:  # fmt: skip
    """`flash_attn_interface.flash_attn_with_kvcache` of version 3."""
    assert cache_seqlens.dtype == INT and cache_seqlens.is_contiguous() and q.ndim == (4 if cu_seqlens_q is None else 3)

    def call() -> Tensor:
        rows = q.flatten(0, 1) if cu_seqlens_q is None else q
        ends = list(range(0, len(rows) + 1, q.shape[1])) if cu_seqlens_q is None else here(cu_seqlens_q).tolist()
        assert cu_seqlens_q is None or here(cu_seqlens_q).diff().max() == max_seqlen_q
        lengths = here(cache_seqlens).tolist()
        return paged(rows, k_cache, v_cache, ends, lengths, page_table, softmax_scale, causal).view(q.shape)

    return recorded(call)(out=torch.empty_like(q))


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> list[_Wrapper]:
    """Have `import` find them: flashinfer, flash_attn (version 2) or flash_attn_interface (3), in every dtype and for heads of
    any size. Returns FlashInfer's wrappers as they are made."""
    _Wrapper.made = []
    contents: dict[str, dict[str, Any]] = {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Decode, "BatchPrefillWithPagedKVCacheWrapper": Prefill,
                       "__version__": "0.0"},
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func, "__version__": "2.0"},
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
    }  # fmt: skip
    for known in contents:
        monkeypatch.delitem(sys.modules, known, raising=False)
    made = ModuleType(name)
    vars(made).update(contents[name])
    monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr("kvloom.kernels.dense.installed", lambda library: name if library in name else None)
    everything = (torch.float32, torch.bfloat16, torch.float16)
    monkeypatch.setattr("kvloom.kernels.dense.HALVES", everything)
    for module in ("flashinfer", "flash_attn"):
        monkeypatch.setattr(f"kvloom.kernels.dense.{module}.DTYPES", everything)
    monkeypatch.setattr("kvloom.kernels.dense.flashinfer.HEAD_DIMS", (*range(8, 257, 8),))
    monkeypatch.setattr("kvloom.kernels.dense.flashinfer.WORKSPACE", WORKSPACE)
    return _Wrapper.made
