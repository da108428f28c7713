"""needle: one fact in a long real text, and a question about it, over a grid of lengths and depths."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource
from kvloom.loadtest.workloads.facts import Fact, ask, facts, plant

_SHORTEST = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleOptions:
    """Requests go through the grid, lengths first, and start again at its end with other text and another fact."""

    lengths: str = "1024,2048,4096"
    """Tokens of a prompt, about; several lengths with commas between them."""
    depths: int = 5
    """Depths of the fact, spread evenly from the start of the text to its end."""
    output_len: int = 16
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        require(self, 1, 101, "depths")
        require(self, 1, LONGEST, "output_len")
        if not all(_SHORTEST <= length <= LONGEST for length in self.grid_lengths):
            raise ConfigError(f"lengths is {self.lengths!r}; allowed: each from {_SHORTEST} to {LONGEST}")

    @property
    def grid_lengths(self) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in self.lengths.split(","))
        except ValueError:
            raise ConfigError(
                f"lengths is {self.lengths!r}; allowed: whole numbers with commas between, as 1024,2048"
            ) from None

    @property
    def grid_depths(self) -> tuple[float, ...]:
        """0 to 1; the middle if there is only one."""
        last = self.depths - 1
        return tuple(i / last for i in range(self.depths)) if last else (0.5,)


def build(options: NeedleOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"needle {seed}")
    grid = [(length, depth) for depth in options.grid_depths for length in options.grid_lengths]
    jobs = []
    for index in range(count):
        length, depth = grid[index % len(grid)]
        fact = facts(1, rng)[0]
        # Another order of the text's sections per request: a needle wants real text all through, new or not.
        haystack = text.reader(f"needle {seed} {index}").text(max(length - _overhead(fact, text), 1))
        prompt = ask(fact, plant(fact, haystack, depth))
        label = f"{length} tokens, depth {depth:.0%}"
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, label=label, expect=fact.value))
    return jobs


def _overhead(fact: Fact, text: TextSource) -> int:
    """Tokens of a prompt that are not haystack."""
    return len(text.encode(ask(fact, fact.sentence))) + 2  # the paragraph breaks around the fact


NEEDLE = Workload(
    name="needle",
    help="a fact in a long text and a question about it; answers are checked",
    options=NeedleOptions,
    make=build,
)
