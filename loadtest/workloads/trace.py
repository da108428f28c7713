"""trace: replay of a recorded day. Arrival times, lengths and the sharing of prefixes come from the trace, text from here.

Each hash id becomes a block of text of its own, so prompts share exactly what they shared when the trace was taken. Scaling
lengths scales the block, not the list of ids: the sharing stays.

Rows of a request trace in the format of Mooncake (Qin et al., FAST 2025): read from a file, or made up with its statistics.

A line is one JSON object:

  {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353, ...]}

timestamp: milliseconds; lengths: tokens; hash_ids: one id per block of the prompt (512 tokens, the last one maybe less), the
same id where the prompt up to that block's end is the same.

The made-up traces are near the published ones. `conversation` was fitted to the 12,031 requests of conversation_trace.jsonl: a
common first block, 61% new talks, turns added to talks of the last minutes, on average 12,035 tokens in and 343 out, 37% of
blocks seen before. `toolagent` has long tool prompts of unequal popularity and the averages of the paper's table: 8,596 tokens
in, 182 out, 59% reuse. Made up at that length, they come within 10% of these averages, and reuse within 4 percentage points;
arrivals are Poisson, where the recorded ones come in batches.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine.bounds import bounded
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Options, workload
from kvloom.loadtest.workloads.corpus import TextSource

_EXAMPLE = '{"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}'
SYNTHETIC_BLOCK = 512


class TraceRow(NamedTuple):
    """One request of a trace."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_rows(path: Path, block_tokens: int) -> list[TraceRow]:
    """All requests of a file in order of time. Raises ConfigError naming the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read ({error}); give a JSONL file or synthetic:NAME") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_row(line, block_tokens))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}; expected a line such as {_EXAMPLE}") from None
    if not rows:
        raise ConfigError(f"the trace {path} holds no requests; expected lines such as {_EXAMPLE}")
    return sorted(rows, key=lambda row: row.timestamp)


def _row(line: str, block_tokens: int) -> TraceRow:
    """Raises ValueError saying what is wrong."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    timestamp = _number(value, "timestamp", (int, float), 0)
    length, output = (_number(value, name, (int,), 1) for name in ("input_length", "output_length"))
    ids = value.get("hash_ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"hash_ids is {_shown(ids)}, not a list of whole numbers")
    if len(ids) != -(-length // block_tokens):
        needed = -(-length // block_tokens)
        raise ValueError(f"{len(ids)} hash_ids, but {length} tokens are {needed} blocks of {block_tokens} (block_tokens)")
    return TraceRow(timestamp, length, output, tuple(ids))


def _number(value: dict[str, Any], name: str, kinds: tuple[type, ...], least: int) -> Any:
    if name not in value:
        raise ValueError(f"{name} is missing")
    number = value[name]
    if type(number) not in kinds or not least <= number < math.inf:  # type(), as a bool is an int, too
        wanted = "number" if float in kinds else "whole number"
        raise ValueError(f"{name} is {_shown(number)}, not a {wanted} of {least} or more")
    return number


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


# Made-up traces ------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The statistics of a made-up trace; lengths in tokens."""

    rate: float
    """Requests per second."""
    prefixes: tuple[int, ...]
    """Blocks of each common beginning, the most popular first (popularity 1 / rank)."""
    new: float
    """Share of requests that begin a talk."""
    median: float
    """Tokens that a new talk adds to the common beginning; log-normal with `spread`."""
    spread: float
    turn: float
    """Tokens that a later turn adds, on median."""
    output: float
    output_spread: float
    recent: int
    """A later turn continues one of this many last requests."""


SHAPES = {
    "conversation": Shape(3.4, (1,), 0.63, 5200, 1.2, 900, 250, 0.8, 800),
    "toolagent": Shape(6.6, (9, 7, 10, 5, 8, 12, 3, 6), 0.78, 2200, 1.1, 600, 110, 1.0, 400),
}
LONGEST_INPUT = 126_195  # of the conversation trace
LONGEST_OUTPUT = 2_000


def synthetic_rows(shape: Shape, rng: random.Random) -> Iterator[TraceRow]:
    """An endless trace."""
    fresh = iter(range(sum(shape.prefixes), 1 << 62))
    starts = [sum(shape.prefixes[:i]) for i in range(len(shape.prefixes))]
    commons = [tuple(range(start, start + size)) for start, size in zip(starts, shape.prefixes)]
    popularity = [1 / (rank + 1) for rank in range(len(commons))]
    recent: list[TraceRow] = []
    clock = 0.0
    while True:
        if not recent or rng.random() < shape.new:
            known = rng.choices(commons, popularity)[0]
            length = len(known) * SYNTHETIC_BLOCK + _draw(shape.median, shape.spread, LONGEST_INPUT, rng)
        else:
            before = recent.pop(rng.randrange(len(recent)))
            known = before.hash_ids[: before.input_length // SYNTHETIC_BLOCK]  # a block that was not full goes on otherwise
            length = before.input_length + before.output_length + _draw(shape.turn, 1.0, LONGEST_INPUT, rng)
        length = min(length, LONGEST_INPUT)
        blocks = -(-length // SYNTHETIC_BLOCK)
        ids = known[:blocks] + tuple(next(fresh) for _ in range(blocks - len(known)))
        row = TraceRow(int(clock), length, _draw(shape.output, shape.output_spread, LONGEST_OUTPUT, rng), ids)
        yield row
        recent = [*recent[-shape.recent + 1 :], row]
        clock += rng.expovariate(shape.rate) * 1000


def _draw(median: float, spread: float, most: int, rng: random.Random) -> int:
    return min(max(round(rng.lognormvariate(math.log(median), spread)), 1), most)


SYNTHETIC = "synthetic:"
_SMALLEST_BLOCK = 8
"""Tokens: smaller blocks could not all differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions(Options):
    """The number of requests limits how much of the trace is replayed."""

    trace: str = "synthetic:conversation"
    """A JSONL file in Mooncake's format, or a made-up trace: synthetic:conversation, synthetic:toolagent."""
    length_scale: float = bounded(0.0625, 0.001, 16)
    """Factor on all lengths: 1 as recorded, 0.0625 makes blocks of 512 tokens to blocks of 32."""
    time_scale: float = bounded(1.0, 0.0001, 10_000)
    """Factor on all times: 1 as recorded, 10 ten times slower."""
    block_tokens: int = bounded(512, 1, 65536)
    """Tokens that a hash id stands for in the file."""
    max_input: int | None = bounded(None, 1, LONGEST)
    """Cut longer prompts (after scaling) to this many tokens; what they share at the front stays."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
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


@workload("trace", TraceOptions, "replay of a Mooncake trace: its times, lengths and sharing of prefixes")
def trace(options: TraceOptions, text: TextSource, seed: int, count: int) -> list[Job]:
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
