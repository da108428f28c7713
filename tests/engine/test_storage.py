"""Where K and V lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kvloom.engine.cache.storage import GroupSpec, Storage
from kvloom.engine.errors import ConfigError


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_taken_page_by_page() -> None:
    """A block is new in every layer at once: with pages of two megabytes each of them would have to be cleared for it."""
    spec = GroupSpec.everything(8, 2)
    before = resident()
    storage = Storage(spec, 4096, 64, 64, torch.bfloat16)
    assert resident() - before < 4 << 20, "a new cache takes nothing"
    for layer in storage.layers:
        assert not layer.k[7].any() and not layer.v[7].any()
        layer.k[7] = layer.v[7] = 1.0
    assert resident() - before < 6 << 20


def test_a_fork_has_a_cache_of_its_own() -> None:
    storage = Storage(GroupSpec.everything(1, 1), 4, 16, 16, torch.float32)
    storage.layers[0].k[1] = 1.0
    child = os.fork()
    if child == 0:
        storage.layers[0].k[1] = 2.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.layers[0].k[1].eq(1.0).all()


def test_a_cache_that_cannot_be_had_says_so() -> None:
    with pytest.raises(ConfigError, match=r"the KV cache of .* bytes cannot be allocated; lower kv_memory"):
        Storage(GroupSpec.everything(4, 8), 1 << 40, 64, 128, torch.bfloat16)
