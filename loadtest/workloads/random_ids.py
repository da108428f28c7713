"""random: prompts of uniformly random token ids, of which no two share anything but an optional common prefix."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOptions:
    """Lengths, as vLLM's `--random-...` options have them."""

    input_len: int = 512
    """Tokens of a prompt behind the common prefix, on average."""
    output_len: int = 64
    """Tokens of an answer, on average."""
    range_ratio: float = 0.0
    """Spread of both lengths: drawn evenly from LEN * (1 - R) to LEN * (1 + R)."""
    prefix_len: int = 0
    """Tokens that all prompts begin with, in addition to input_len."""

    def __post_init__(self) -> None:
        require(self, 1, LONGEST, "input_len", "output_len")
        require(self, 0, LONGEST, "prefix_len")
        require(self, 0, 0.99, "range_ratio")


def build(options: RandomOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"random {seed}")
    prefix = rng.choices(text.ordinary_ids, k=options.prefix_len)
    jobs = []
    for _ in range(count):
        length = _length(options.input_len, options.range_ratio, rng)
        prompt = prefix + rng.choices(text.ordinary_ids, k=length)
        jobs.append(Job(prompt=prompt, output_tokens=_length(options.output_len, options.range_ratio, rng)))
    return jobs


def _length(mean: int, ratio: float, rng: random.Random) -> int:
    return rng.randint(max(math.floor(mean * (1 - ratio)), 1), math.ceil(mean * (1 + ratio)))


RANDOM = Workload(
    name="random",
    help="random token ids: nothing to reuse, as vLLM's random dataset",
    options=RandomOptions,
    make=build,
)
