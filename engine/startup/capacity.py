"""How many tokens and requests a given memory holds, for every retention: arithmetic alone, no tensor is made.

memory = weights + KV cache          weights of the model's files or, in a wider type, of its parameters
KV cache / bytes of one request      how many requests of the greatest length run at once

Of a GPU's memory, steps and selection state have their parts as well, as `gpu_memory` divides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from kvloom.engine.cache import GroupSpec, bytes_per_token
from kvloom.engine.calibration import find_razor
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.load import fingerprint_of, open_checkpoint
from kvloom.engine.model.weights import expected_shapes
from kvloom.engine.retention.razor import RazorOptions, block_bytes, divide, window_blocks

SHARES = (None, 0.3, 0.5)
"""Induction shares that razor is planned with; None is the default one."""


class Setting(NamedTuple):
    """One retention and what fits with it."""

    name: str
    retrieval_share: float
    """KV heads that keep everything."""
    flags: str
    """What to give to `kvloom serve`."""
    request_bytes: int
    """KV of one request of the greatest length while it decodes."""
    tokens: int
    """Tokens of such requests that fit at once."""
    requests: int


class Capacity(NamedTuple):
    """What fits into a memory."""

    model: ModelConfig
    length: int
    weight_bytes: int
    kv_bytes: int
    settings: list[Setting]
    calibrated: bool
    """Whether the model's retrieval heads are known; without, razor is not listed."""


def capacity(
    path: Path,
    memory: int,
    dtype: torch.dtype,
    length: int | None,
    block_size: int,
    cache: Callable[[ModelConfig, int, int], int] = lambda model, length, left: left,
) -> Capacity:
    """Plan a memory for a model's files. cache: from the model, the greatest length and the bytes that weights leave, those of
    the KV cache. Raises ModelError, or ConfigError if nothing is left for it."""
    model, _, files = open_checkpoint(path)
    longest = length or model.max_position
    if not 1 <= longest <= model.max_position:
        raise ConfigError(f"max_model_len is {longest}; this model allows 1 to {model.max_position}")
    weights = weight_bytes(model, files, dtype)
    if memory <= weights:
        raise ConfigError(f"memory is {memory} bytes, but the weights alone take about {weights}; give more")
    left = cache(model, longest, memory - weights)
    if left <= 0:
        raise ConfigError(f"memory is {memory} bytes, of which weights take about {weights} and steps the rest; give more")
    key = fingerprint_of(path)
    settings = list(_settings(model, key, left, dtype, longest, block_size))
    return Capacity(model, longest, weights, left, settings, find_razor(key) is not None)


def weight_bytes(model: ModelConfig, files: tuple[Path, ...], dtype: torch.dtype) -> int:
    """Memory that weights take: a GGUF's codes as they are (weights auto), other files in `dtype`; the embedding in `dtype`."""
    elements = {name: math.prod(shape) for name, shape in expected_shapes(model).items()}
    if all(file.suffix == ".gguf" for file in files):
        return sum(file.stat().st_size for file in files) + elements["model.embed_tokens.weight"] * dtype.itemsize
    return sum(elements.values()) * dtype.itemsize


def _settings(model: ModelConfig, key: str, memory: int, dtype: torch.dtype, length: int, block_size: int) -> Iterator[Setting]:
    everything = bytes_per_token(GroupSpec.everything(model.layers, model.kv_heads), model.head_dim, dtype)
    blocks = -(-length // block_size)
    whole = blocks * block_size * everything
    yield _setting("everything", 1.0, "--retention everything", whole, memory // (block_size * everything) // blocks, length)
    if find_razor(key) is None:
        return
    for share in SHARES:
        options = RazorOptions() if share is None else RazorOptions(induction_share=share)
        classes = options.calibrated(key)
        flags = "--retention razor" + ("" if share is None else f" --retention-options '{{\"induction_share\": {share}}}'")
        sizes = block_bytes(classes, model.head_dim, dtype, block_size)
        divided = divide(memory, length, block_size, sizes, options.window)
        windows = window_blocks(length, block_size, options.window)
        held = blocks * sizes[0] + windows * sizes[1]
        spare = blocks - windows  # for the one prompt that is computed
        requests = min(divided.retrieval // blocks, max(0, divided.local - spare) // windows)
        yield _setting("razor", classes.share, flags, held, requests, length)


def _setting(name: str, share: float, flags: str, request_bytes: int, requests: int, length: int) -> Setting:
    return Setting(name, share, flags, request_bytes, requests * length, requests)
