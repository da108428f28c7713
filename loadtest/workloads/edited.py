"""edited: near-duplicates. A document is sent again and again, each time with other small edits at random places.

An exact prefix ends at the first edit; everything behind it is the same text at a slightly other offset.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import Reader, TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedOptions:
    """Prompts have exactly input_len tokens: what an edit takes away is made up for at the end."""

    bases: int = 4
    """Different documents; each comes unedited first."""
    input_len: int = 1024
    """Tokens of a prompt."""
    edit_rate: float = 0.004
    """Edits per token of a prompt (0.004: one in 250 tokens), at least one edit per prompt."""
    edit_len: int = 4
    """Most tokens that one edit inserts, deletes or replaces."""
    output_len: int = 64
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        require(self, 1, 100_000, "bases")
        require(self, 16, LONGEST, "input_len")
        require(self, 1, LONGEST, "output_len")
        require(self, 1, 64, "edit_len")
        require(self, 0.0, 0.1, "edit_rate")

    @property
    def edits(self) -> int:
        """Edits of one prompt."""
        return max(round(self.edit_rate * self.input_len), 1)


def build(options: EditedOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"edited {seed}")
    reader = text.reader(f"edited {seed}")
    spare = options.edits * options.edit_len
    bases = [reader.tokens(options.input_len + spare) for _ in range(options.bases)]
    jobs = []
    for index in range(count):
        base = bases[index % options.bases]
        tokens = base if index < options.bases else edit(base, options, rng, reader)
        label = "base" if index < options.bases else "edited"
        jobs.append(Job(prompt=tokens[: options.input_len], output_tokens=options.output_len, label=label))
    return jobs


def edit(base: list[int], options: EditedOptions, rng: random.Random, reader: Reader) -> list[int]:
    """A copy with `options.edits` edits within its first `options.input_len` tokens; at least that long."""
    places = sorted(rng.sample(range(options.input_len), options.edits))
    result: list[int] = []
    done = 0  # [0, done) of base is in the result, or deleted
    for place in places:
        result += base[done:place]
        size = rng.randint(1, options.edit_len)
        kind = rng.choice(("insert", "delete", "replace"))
        result += reader.tokens(size) if kind != "delete" else []
        done = max(done, place) + (size if kind != "insert" else 0)
    return result + base[done:]


EDITED = Workload(
    name="edited",
    help="documents sent again with a few local edits: an exact prefix ends at the first one",
    options=EditedOptions,
    make=build,
)
