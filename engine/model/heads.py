"""The order of heads in a layer's projections, when head groups keep their KV apart.

    q, k, v of one group side by side      [q k v of group 0 | q k v of group 1 | ...]      rows of the fused projection
    attention output                       [heads of group 0 | heads of group 1 | ...]      columns of the output projection

so that a group's part of the projection is a view with a fused layout of its own, and nothing is copied while it runs. Weights
are put into this order once, when they are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.engine.model.config import ModelConfig

Heads = Sequence[Sequence[int]]
"""KV heads of every group in one layer: together each head once."""


def projection_rows(config: ModelConfig, heads: Heads) -> Tensor:
    """Rows of the plain fused projection (q, then k, then v) in the order of the groups: [qkv_size] int64."""
    dim, share = config.head_dim, config.q_heads // config.kv_heads
    order = []
    for group in heads:
        order += [head * share + i for head in group for i in range(share)]
        order += [config.q_heads + head for head in group]
        order += [config.q_heads + config.kv_heads + head for head in group]
    return _elements(order, dim)


def output_columns(config: ModelConfig, heads: Heads) -> Tensor:
    """Columns of the plain output projection in the order of the groups: [q_size] int64."""
    share = config.q_heads // config.kv_heads
    return _elements([head * share + i for group in heads for head in group for i in range(share)], config.head_dim)


def _elements(heads: list[int], dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()
