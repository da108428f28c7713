"""shared_prefix: groups of prompts that begin alike (a system prompt, a manual) and end in their own question."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, choose, require
from kvloom.loadtest.workloads.corpus import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixOptions:
    """A prompt is its group's prefix and a question of its own, prefix_len + question_len tokens."""

    groups: int = 8
    """Different prefixes; a group gets requests / groups prompts."""
    prefix_len: int = 512
    """Tokens that the prompts of a group share."""
    question_len: int = 64
    """Tokens of a prompt's own, behind the prefix."""
    output_len: int = 64
    """Tokens of an answer."""
    popularity: Literal["uniform", "zipf"] = "uniform"
    """Which group comes next: uniform (all equally often), zipf (the n-th group 1 / n^EXPONENT as often as the first)."""
    zipf_exponent: float = 1.0
    """How steep zipf is."""

    def __post_init__(self) -> None:
        require(self, 1, 100_000, "groups")
        require(self, 1, LONGEST, "prefix_len", "question_len", "output_len")
        require(self, 0, 10, "zipf_exponent")
        choose(self, "popularity", ("uniform", "zipf"))


def build(options: SharedPrefixOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    reader = text.reader(f"shared_prefix {seed}")
    prefixes = [reader.tokens(options.prefix_len) for _ in range(options.groups)]
    chosen = _groups(options, random.Random(f"shared_prefix {seed}"))
    jobs: list[Job] = []
    known: set[int] = set()
    for group, _ in zip(chosen, range(count)):
        prompt = prefixes[group] + reader.tokens(options.question_len)
        label = "prefix seen before" if group in known else "first of its group"
        known.add(group)
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, label=label))
    return jobs


def _groups(options: SharedPrefixOptions, rng: random.Random) -> Iterator[int]:
    """Endless group numbers; uniform ones come in shuffled rounds, so that no group is left out by chance."""
    groups = list(range(options.groups))
    weights = [(rank + 1) ** -options.zipf_exponent for rank in groups]
    while True:
        if options.popularity == "zipf":
            yield from rng.choices(groups, weights, k=1)
        else:
            rng.shuffle(groups)
            yield from groups


SHARED_PREFIX = Workload(
    name="shared_prefix",
    help="groups of prompts with a common beginning, such as system prompts: what a prefix cache is for",
    options=SharedPrefixOptions,
    make=build,
)
