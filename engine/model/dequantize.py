"""GGUF block formats to floating point, in torch.

Owns the bit layouts of the common formats (ggml's block_q* structs; `gguf.quants` is the oracle in the tests). The rarer ones
(`BY_PACKAGE`) are left to `gguf.quants`, which takes two to five times as long. Works on slices of rows that fit the cache,
computes in fp32 and rounds once to the type of `out`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

# Values per slice. Just below the size from which torch spreads an element-wise operation over threads: the slice stays in
# the cache, and no thread waits for another at the end of each of thousands of short operations (on a busy machine that
# wait, not the arithmetic, is what loading would consist of).
_SLICE = (1 << 15) - 1


def dequantize(blocks: Tensor, kind: GGMLQuantizationType, out: Tensor) -> Tensor:
    """Decode stored rows. blocks: [rows, bytes] uint8; out: [rows, columns], any floating type, written and returned.

    Raises KeyError for a kind that is not in `SUPPORTED`.
    """
    decode = SUPPORTED[kind]
    block, size = GGML_QUANT_SIZES[kind]
    step = max(1, _SLICE // out.shape[1])
    for begin in range(0, out.shape[0], step):
        rows = blocks[begin : begin + step]
        decoded = decode(rows.reshape(-1, size) if block > 1 else rows)
        out[begin : begin + step] = decoded.reshape(rows.shape[0], -1)
    return out


# Each decoder: blocks [n, bytes] uint8 -> values [n, values per block] --------------------------------------------------


def _half(raw: Tensor) -> Tensor:
    """[n, 2 k] bytes as k halves, in fp32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """[n, k] bytes -> [n, 2 k]: all low halves, then all high halves."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _bits(raw: Tensor) -> Tensor:
    """[n, k] bytes -> [n, 8 k], lowest bit first."""
    return (raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).reshape(raw.shape[0], -1)


def _q4_0(b: Tensor) -> Tensor:
    return _nibbles(b[:, 2:]).float().sub_(8).mul_(_half(b[:, :2]))


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float().mul_(_half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4).float().sub_(16).mul_(_half(b[:, :2]))


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4).float().mul_(_half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_half(b[:, :2]))


# K-quants: super-blocks of 256 values in 8 groups of 32 (Q4_K, Q5_K) or 16 groups of 16 (Q6_K)


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each of the 8 groups: [n, 8, 1] fp32, from d, dmin and twelve bytes of packed 6-bit numbers."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((low & 63, rest & 15 | low >> 2 & 48), dim=1)
    minimum = torch.cat((high & 63, rest >> 4 | high >> 2 & 48), dim=1)
    return (_half(b[:, :2]) * scale).unsqueeze(-1), (_half(b[:, 2:4]) * minimum).unsqueeze(-1)


def _k_nibbles(raw: Tensor) -> Tensor:
    """[n, 128] bytes -> [n, 8, 32]: 32 bytes hold one group in their low halves and the next in their high halves."""
    quads = raw.reshape(-1, 4, 1, 32)
    return torch.cat((quads & 15, quads >> 4), dim=2).reshape(-1, 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scale, minimum = _k_scales(b)
    return _k_nibbles(b[:, 16:]).float().mul_(scale).sub_(minimum).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, minimum = _k_scales(b)
    fifth = b[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1) & 1
    return (_k_nibbles(b[:, 48:]) | fifth << 4).float().mul_(scale).sub_(minimum).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).reshape(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 8, 32)
    scale = b[:, 192:208].view(torch.int8).float() * _half(b[:, 208:])
    return (low | high << 4).reshape(-1, 16, 16).float().sub_(32).mul_(scale.unsqueeze(-1)).flatten(1)


def _by_package(kind: GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    def decode(b: Tensor) -> Tensor:
        with np.errstate(all="ignore"):  # scales that are no numbers stay so, as in the other decoders
            return torch.from_numpy(quants.dequantize(b.numpy(), kind))

    return decode


_K = GGMLQuantizationType

_RARE = "Q2_K Q3_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4"
BY_PACKAGE = tuple(kind for kind in GGMLQuantizationType if kind.name in _RARE.split())
"""Formats of fewer than 5 bits that no kernel multiplies: loaded by decoding, as far as the installed package knows them."""

SUPPORTED: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    _K.F32: lambda raw: raw.view(torch.float32),
    _K.F16: lambda raw: raw.view(torch.float16),
    _K.BF16: lambda raw: raw.view(torch.bfloat16),
    _K.Q4_0: _q4_0,
    _K.Q4_1: _q4_1,
    _K.Q5_0: _q5_0,
    _K.Q5_1: _q5_1,
    _K.Q8_0: _q8_0,
    _K.Q4_K: _q4_k,
    _K.Q5_K: _q5_k,
    _K.Q6_K: _q6_k,
    **{kind: _by_package(kind) for kind in BY_PACKAGE},
}
