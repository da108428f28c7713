"""Rotary position embedding: a model's effective inverse frequencies and its cosine and sine tables.

Owns the frequency formulas (default, linear, llama3, YaRN, and the per-frequency divisors of GGUF files). Tables are computed
in fp64 and rounded once; rotation itself is a kernel (`rotate_store`, `rotate`) over half-split pairs (i, i + dim/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvloom.engine.device import CPU
from kvloom.engine.errors import ModelError

_MOST_THETA, _MOST_FACTOR, _MOST_POSITION = 1e15, 1e6, 1 << 30  # beyond any model, and far from what arithmetic cannot hold
_SPAN = 4096  # positions computed at a time, so that the fp64 intermediates stay small

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """What the frequencies are made from. Names are those of Hugging Face's rope_parameters."""

    dim: int
    """Rotary dimensions: the whole head."""
    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    """Context extension (linear, llama3, yarn)."""
    original_max_position: int = 0
    """Context of pretraining (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """YaRN: round the correction range to whole dimensions."""
    attention_factor: float = 1.0
    """Temperature that cosine and sine are multiplied by (`yarn_attention_factor`)."""
    divisors: tuple[float, ...] | None = None
    """GGUF rope_freqs.weight: one divisor per frequency, [dim/2]."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ModelError(f"rotary dimensions (head_dim) are {self.dim}; allowed: an even number")
        if not 1 < self.theta <= _MOST_THETA:
            raise ModelError(f"rotary base rope_theta is {self.theta}; allowed: above 1, at most {_MOST_THETA:g}")
        if not 1 <= self.factor <= _MOST_FACTOR:
            raise ModelError(f"rotary factor is {self.factor}; allowed: 1 to {_MOST_FACTOR:g}")
        if self.kind in ("llama3", "yarn") and not 1 <= self.original_max_position <= _MOST_POSITION:
            raise ModelError(
                f"{self.kind} rotary embedding has original_max_position_embeddings of {self.original_max_position}; "
                f"allowed: 1 to {_MOST_POSITION}"
            )
        if not 0 <= self.low_freq_factor < self.high_freq_factor <= _MOST_FACTOR:
            raise ModelError(
                f"low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; allowed: 0 or more, and "
                f"the second above the first, at most {_MOST_FACTOR:g}"
            )
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if not 0 < getattr(self, name) <= _MOST_FACTOR:
                raise ModelError(f"rotary {name} is {getattr(self, name)}; allowed: above 0, at most {_MOST_FACTOR:g}")
        if self.divisors is not None and (
            len(self.divisors) != self.dim // 2 or not all(0 < d < math.inf for d in self.divisors)
        ):
            raise ModelError(f"rope_freqs needs {self.dim // 2} positive entries (head_dim / 2); it has {len(self.divisors)}")


class RotaryTable(NamedTuple):
    """cos, sin: [max_position, dim/2] fp32, temperature included; inv_freq: [dim/2] fp32, for `Kernels.rotate`."""

    cos: Tensor
    sin: Tensor
    inv_freq: Tensor


def rotary_table(rope: RopeConfig, max_position: int, device: torch.device = CPU) -> RotaryTable:
    """Tables for positions [0, max_position), made on the CPU."""
    inv_freq = inverse_frequencies(rope)
    cos, sin = torch.empty(max_position, rope.dim // 2), torch.empty(max_position, rope.dim // 2)
    for begin in range(0, max_position, _SPAN):
        angles = torch.arange(begin, min(begin + _SPAN, max_position), dtype=torch.float64)[:, None] * inv_freq
        cos[begin : begin + _SPAN] = angles.cos().mul_(rope.attention_factor)
        sin[begin : begin + _SPAN] = angles.sin_().mul_(rope.attention_factor)
    return RotaryTable(*(table.to(device) for table in (cos, sin, inv_freq.float())))


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair, highest frequency first: [dim/2] fp64."""
    inv_freq = rope.theta ** (-torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim)
    if rope.divisors is not None:
        inv_freq = inv_freq / torch.tensor(rope.divisors, dtype=torch.float64)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq)
    return inv_freq


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: keep wavelengths that fit the pretraining context high_freq_factor times, divide those that do not fit
    low_freq_factor times, interpolate between."""
    turns = rope.original_max_position * inv_freq / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, "NTK-by-parts"): keep dimensions that turn beta_fast times or more within the pretraining
    context, divide those that turn beta_slow times or fewer by the factor, a linear ramp between."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001  # transformers' guard against a ramp of no width
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return inv_freq * ((1 - ramp) + ramp / rope.factor)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Temperature of YaRN (section 3.4), with DeepSeek's two coefficients when both are given, as transformers infers it."""

    def scale(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not mscale or not mscale_all_dim:
        return scale(1.0)
    if not scale(mscale_all_dim) > 0:
        raise ModelError(f"rotary mscale_all_dim is {mscale_all_dim} at a factor of {factor}; allowed: 0 or more")
    return scale(mscale) / scale(mscale_all_dim)
