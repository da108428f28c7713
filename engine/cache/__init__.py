"""The KV cache: tensors (`storage`), blocks (`pool`), and the only door to both (`manager`)."""

from kvloom.engine.cache.manager import HOLE, BlockTable, CacheManager, HeadGroup, Match
from kvloom.engine.cache.storage import GroupSpec, Storage, bytes_per_token

__all__ = ["HOLE", "BlockTable", "CacheManager", "GroupSpec", "HeadGroup", "Match", "Storage", "bytes_per_token"]
