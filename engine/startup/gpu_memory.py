"""How a GPU's memory is divided, and what is said where it runs out at start.

    total * gpu_memory_utilization  =  held, by the weights, by CUDA and by whoever else uses the GPU
                                     + steps (`step_memory`): what they work in, and the graphs that are captured of them
                                     + KV cache, and beside it selection state and segments

`kv_memory`, where it is given, takes the place of the last line's first part, whatever the utilization.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kvloom.engine.config import SchedulerOptions, WeightMode
from kvloom.engine.device import memory_of, out_of_memory
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.load import open_checkpoint
from kvloom.engine.startup.available import MIB, size
from kvloom.engine.startup.capacity import weight_bytes

log = logging.getLogger("kvloom.engine")

UTILIZATION = 0.92
"""By default: vLLM's."""
FIXED = 512 * MIB
"""For steps of any size: captured graphs, partial results of split attention, and what the allocator cannot use."""
COPIES = 3
"""Of logits at a time: raw, penalised, sorted or as probabilities."""
SMALLER_STEPS = "lower --gpu-memory-utilization (or --kv-memory), --max-batched-tokens or --max-num-seqs"
"""What to do where steps, or what is made for them, did not fit."""
CODES: dict[WeightMode, float] = {"int8": 8.5, "int4": 5.0}
"""Bits to a weight with its group's scales, by the mode that holds it so."""


def step_memory(model: ModelConfig, dtype: torch.dtype, scheduler: SchedulerOptions, length: int) -> int:
    """Bytes that steps may take: the activations of `max_batched_tokens` rows, and of `max_num_seqs` rows logits and the scores
    of one layer over `length` positions, with a quarter of them again for growth; and `FIXED`."""
    rows, seqs = scheduler.max_batched_tokens, scheduler.max_num_seqs
    heads = 2 * model.q_heads * model.head_dim + model.qkv_size
    widths = 3 * model.intermediate_size + 2 * model.hidden_size + heads
    activations = rows * (widths * dtype.itemsize + model.hidden_size * 4)
    logits = COPIES * seqs * model.vocab_size * 4
    scores = seqs * (model.q_heads + model.kv_heads) * length * 4
    return FIXED + activations + logits + scores + scores // 4


def kv_memory(device: torch.device, utilization: float, steps: int, least: int, beside: Callable[[int], int]) -> int:
    """Bytes for the KV cache of a device that holds the weights already.

    steps: bytes that steps may take; least: those of the smallest cache that serves; beside: from the cache's bytes, those that
    are taken beside it. Raises ConfigError, which says what would do, if there are not even so many.
    """
    free, total = memory_of(device)
    held, granted = total - free, int(total * utilization)
    left = granted - held - steps
    memory = largest(left, beside)
    parts = f"{utilization:g} of {size(total)} are {size(granted)}, of which {size(held)} are taken and steps get {size(steps)}"
    if memory < least:
        needed = held + steps + least + beside(least)
        raise ConfigError(
            f"no KV cache fits {device}: {parts}, and a cache takes at least {size(least)}, with what is kept beside it "
            f"{size(least + beside(least))}; {_remedy(needed / total)}"
        )
    log.info("%s: %s, the KV cache %s and what is kept beside it %s", device, parts, size(memory), size(beside(memory)))
    return memory


def largest(left: int, beside: Callable[[int], int]) -> int:
    """The bytes of the largest KV cache that fits into so many with what is beside it; 0 or less if there is none."""
    return bisect.bisect_right(range(max(0, left) + 1), left, key=lambda kv: kv + beside(kv)) - 1


def _remedy(needed: float) -> str:
    """needed: part of the device's memory."""
    if needed <= 1:
        return f"--gpu-memory-utilization {math.ceil(needed * 100) / 100:g} would do"
    return "lower --max-model-len, --max-num-seqs or --max-batched-tokens, or hold weights in fewer bits with --weights"


@contextmanager
def fitting(device: torch.device, what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Work of the start. Raises ConfigError in place of torch.OutOfMemoryError: what did not fit, and what would.

    advice: what to do, asked for then.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked, (free, total) = out_of_memory(error), memory_of(device)
        raise ConfigError(
            f"{what} did not fit {device}: {asked} were asked for, and {size(free)} of {size(total)} are free; {advice()}"
        ) from None


def fewer_bits(path: Path, dtype: torch.dtype, codes: bool) -> str:
    """What to do where the weights of a model did not fit. codes: whether the kernels multiply them in fewer bits."""
    model, _, files = open_checkpoint(path)
    needed, stored = weight_bytes(model, files, dtype), any(file.suffix == ".gguf" for file in files)
    sizes = {} if stored or not codes else {mode: int(needed * bits / 8 / dtype.itemsize) for mode, bits in CODES.items()}
    told = "".join(f", with --weights {mode} about {size(count)}" for mode, count in sizes.items())
    held = "as they are stored" if stored else f"in {str(dtype).removeprefix('torch.')}"
    return f"all weights take about {size(needed)} {held}{told}; give that, end what else runs there, or choose a smaller model"
