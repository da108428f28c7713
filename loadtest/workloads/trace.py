"""trace: replay of a recorded day. Arrival times, lengths and the sharing of prefixes come from the trace, text from here.

Each hash id becomes a block of text of its own, so prompts share exactly what they shared when the trace was taken. Scaling
lengths scales the block, not the list of ids: the sharing stays.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource
from kvloom.loadtest.workloads.trace_rows import SHAPES, SYNTHETIC_BLOCK, TraceRow, read_rows, synthetic_rows

SYNTHETIC = "synthetic:"
_SMALLEST_BLOCK = 8
"""Tokens: smaller blocks could not all differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """The number of requests limits how much of the trace is replayed."""

    trace: str = "synthetic:conversation"
    """A JSONL file in Mooncake's format, or a made-up trace: synthetic:conversation, synthetic:toolagent."""
    length_scale: float = 0.0625
    """Factor on all lengths: 1 as recorded, 0.0625 makes blocks of 512 tokens to blocks of 32."""
    time_scale: float = 1.0
    """Factor on all times: 1 as recorded, 10 ten times slower."""
    block_tokens: int = 512
    """Tokens that a hash id stands for in the file."""
    max_input: int | None = None
    """Cut longer prompts (after scaling) to this many tokens; what they share at the front stays."""

    def __post_init__(self) -> None:
        require(self, 0.001, 16, "length_scale")
        require(self, 0.0001, 10_000, "time_scale")
        require(self, 1, 65536, "block_tokens")
        if self.max_input is not None:
            require(self, 1, LONGEST, "max_input")
        if self.trace.startswith(SYNTHETIC):
            if self.trace.removeprefix(SYNTHETIC) not in SHAPES:
                raise ConfigError(f"trace is {self.trace!r}; allowed: a file, {', '.join(SYNTHETIC + name for name in SHAPES)}")
            if self.block_tokens != SYNTHETIC_BLOCK:
                raise ConfigError(f"block_tokens is {self.block_tokens}; a made-up trace has {SYNTHETIC_BLOCK}")
        if self.block < _SMALLEST_BLOCK:
            least = _SMALLEST_BLOCK / self.block_tokens
            raise ConfigError(
                f"length_scale is {self.length_scale:g}; allowed: {least:g} or more, so that a block of {self.block_tokens} "
                f"keeps {_SMALLEST_BLOCK} tokens"
            )

    @property
    def block(self) -> int:
        """Tokens that a hash id stands for in the replay."""
        return round(self.block_tokens * self.length_scale)


def build(options: TraceOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    """Up to `count` jobs in order of time, the first at 0. Raises ConfigError for a file that is absent or malformed."""
    rows = _rows(options, seed, count)
    blocks = Blocks(options.block, text, seed)
    return [
        Job(
            prompt=_prompt(row, options, blocks),
            output_tokens=max(round(row.output_length * options.length_scale), 1),
            at=(row.timestamp - rows[0].timestamp) / 1000 * options.time_scale,
        )
        for row in rows
    ]


def _rows(options: TraceOptions, seed: int, count: int) -> list[TraceRow]:
    if not options.trace.startswith(SYNTHETIC):
        return read_rows(Path(options.trace), options.block_tokens)[:count]
    shape = SHAPES[options.trace.removeprefix(SYNTHETIC)]
    return list(itertools.islice(synthetic_rows(shape, random.Random(f"{options.trace} {seed}")), count))


class Blocks:
    """The text of hash ids: of `size` tokens each, and no two alike."""

    def __init__(self, size: int, text: TextSource, seed: int) -> None:
        self._size = size
        self._reader = text.reader(f"trace {seed}")
        self._blocks: dict[int, tuple[int, ...]] = {}
        self._used: set[tuple[int, ...]] = set()

    def __getitem__(self, hash_id: int) -> tuple[int, ...]:
        block = self._blocks.get(hash_id)
        while block is None or hash_id not in self._blocks:
            block = tuple(self._reader.tokens(self._size))
            if block not in self._used:  # tables and rulers repeat themselves
                self._used.add(block)
                self._blocks[hash_id] = block
        return block


def _prompt(row: TraceRow, options: TraceOptions, blocks: Blocks) -> list[int]:
    tokens = [token for hash_id in row.hash_ids for token in blocks[hash_id]]
    full = len(row.hash_ids) - 1
    rest = row.input_length - full * options.block_tokens  # of the last block
    length = full * options.block + max(round(rest * options.block / options.block_tokens), 1)
    return tokens[: min(length, options.max_input or length)]


TRACE = Workload(
    name="trace",
    help="replay of a Mooncake trace: its times, lengths and sharing of prefixes",
    options=TraceOptions,
    make=build,
)
