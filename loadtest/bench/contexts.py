"""Long contexts that cost no time: prompts whose KV is made up and found in the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.engine.core import EngineCore
from kvloom.engine.errors import ConfigError


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    tokens: list[int] = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def remember(core: EngineCore, prompt: Sequence[int]) -> None:
    """Put made-up KV for a prompt's full blocks into the prefix cache, in blocks of its own. Raises ConfigError if it does not
    fit."""
    cache = core.cache
    table = cache.open(core.domain("", ""))
    if not cache.reserve(table, len(prompt)):
        raise ConfigError(f"the KV cache of {cache.capacity_tokens} tokens is too small; give --kv-memory")
    blocks = torch.tensor(table.blocks, device=cache.storage.device)
    for layer in cache.storage.layers:
        for tensor in layer:
            noise = torch.randn(tensor.shape[1:])
            tensor[blocks] = noise.to(tensor.device, tensor.dtype)
    cache.commit(table, prompt, len(prompt))
    cache.close(table)
