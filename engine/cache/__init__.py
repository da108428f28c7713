"""The KV cache: tensors (`storage`), blocks (`pool`), and the only door to both (`manager`)."""

from kvloom.engine.cache.manager import BlockTable, CacheManager, Match
from kvloom.engine.cache.storage import GroupSpec, Storage, bytes_per_token

__all__ = ["BlockTable", "CacheManager", "GroupSpec", "Match", "Storage", "bytes_per_token"]
