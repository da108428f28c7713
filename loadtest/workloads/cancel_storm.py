"""cancel_storm: many clients hang up in the middle. Do the others notice, and does the server give everything back?"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelStormOptions:
    """Prompts without common parts, some of which are given up."""

    input_len: int = 512
    """Tokens of a prompt."""
    output_len: int = 128
    """Tokens of an answer, if it is waited for."""
    cancel_share: float = 0.5
    """Share of requests whose client closes the connection, 0 to 1."""
    cancel_min: float = 0.0
    """Seconds after sending at which a client leaves at the earliest."""
    cancel_max: float = 2.0
    """Seconds after sending at which a client leaves at the latest."""

    def __post_init__(self) -> None:
        require(self, 1, LONGEST, "input_len", "output_len")
        require(self, 0, 1, "cancel_share")
        require(self, 0, 3600, "cancel_min", "cancel_max")
        if self.cancel_max < self.cancel_min:
            raise ConfigError(f"cancel_max is {self.cancel_max:g}; allowed: cancel_min ({self.cancel_min:g}) or more")


def build(options: CancelStormOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"cancel_storm {seed}")
    reader = text.reader(f"cancel_storm {seed}")
    jobs = []
    for _ in range(count):
        leaves = rng.random() < options.cancel_share
        after = rng.uniform(options.cancel_min, options.cancel_max) if leaves else None
        jobs.append(
            Job(
                prompt=reader.tokens(options.input_len),
                output_tokens=options.output_len,
                label="cancelled" if leaves else "kept",
                cancel_after=after,
            )
        )
    return jobs


CANCEL_STORM = Workload(
    name="cancel_storm",
    help="a share of the clients hangs up after a random time",
    options=CancelStormOptions,
    make=build,
)
