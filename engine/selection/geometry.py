"""What a selection method may know of the model that it chooses for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a method may know of the model and its cache, and of the heads that it decides for."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    """Longest sequence this engine serves."""
    trained_len: int
    """Longest sequence the model was trained for."""
    inv_freq: Tensor
    """[rotary/2] fp32: the model's effective inverse frequencies."""
    model_key: str
    """Fingerprint of the weights: calibrations are stored under it."""
    block_size: int
    """Tokens of a block of the cache."""
    heads: tuple[tuple[int, ...], ...]
    """[layers]: the KV heads that methods decide for, ascending: all, or with a retention those that keep everything. A method
    is not called for a layer that has none of them."""

    @property
    def device(self) -> torch.device:
        """Where the model's tensors are."""
        return self.inv_freq.device

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many of `heads` a layer may have, ascending, without 0."""
        return tuple(sorted({*map(len, self.heads)} - {0}))

    @property
    def partial(self) -> bool:
        """Whether there are other KV heads."""
        return sum(map(len, self.heads)) < self.layers * self.kv_heads

    @property
    def own_layers(self) -> int:
        """Layers that have some."""
        return sum(map(bool, self.heads))

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim): the scale of attention logits."""
        return float(self.head_dim**-0.5)
