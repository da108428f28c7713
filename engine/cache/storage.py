"""The tensors that hold K and V, per head group and layer.

A head group is a set of KV heads with one retention rule; normally one group holds every head of every layer. A block id
means the same block in every layer of its group.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvloom.engine.device import CPU
from kvloom.engine.errors import ConfigError
from kvloom.kernels.interface import PagedKV

ALLOCATION_ERRORS = (OSError, OverflowError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Which KV heads a group holds. `heads[layer]` are ascending KV head indices; a layer may have none."""

    name: str
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def everything(cls, layers: int, kv_heads: int) -> GroupSpec:
        """The one group of a model that keeps all heads alike."""
        return cls("all", (tuple(range(kv_heads)),) * layers)


def bytes_per_token(spec: GroupSpec, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one token takes in this group, over all layers."""
    return sum(len(heads) for heads in spec.heads) * 2 * head_dim * dtype.itemsize


class Storage:
    """K and V of one head group: per layer a `PagedKV` of [blocks, heads, block_size, head_dim].

    A CPU's pages are only taken from the system when a block is first written.
    """

    def __init__(
        self, spec: GroupSpec, blocks: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        """Raises ConfigError if there cannot be so much."""
        self.spec = spec
        self.device = device
        self.blocks = blocks
        self.block_size = block_size
        shapes = [(blocks, len(heads), block_size, head_dim) for heads in spec.heads]
        try:
            self.layers: Sequence[PagedKV] = [
                PagedKV(lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)) for shape in shapes
            ]
        except ALLOCATION_ERRORS:
            size = blocks * block_size * bytes_per_token(spec, head_dim, dtype)
            cause = "kv_memory" if device.type == "cpu" else "kv_memory or gpu_memory_utilization"
            raise ConfigError(f"the KV cache of {size} bytes cannot be allocated; lower {cause}") from None
        self.block_bytes: int = sum(tensor[0].nbytes for layer in self.layers for tensor in layer)
        """Bytes of one block over all layers."""


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, which cost a CPU nothing until they are touched. Raises one of ALLOCATION_ERRORS if there cannot be so many.

    There they come page by page: a new block of a cache is new in every layer at once, and clearing huge pages of two
    megabytes in each of them would hold up a step for a fifth of a second.
    """
    if 0 in shape or device.type != "cpu":  # a layer without heads in this group has none
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
