"""Workloads made of random ids or of real text without questions.

random: prompts of uniformly random token ids, of which no two share anything but an optional common prefix.

shared_prefix: groups of prompts that begin alike (a system prompt, a manual) and end in their own question.

multi_turn: chats. Every turn is sent after the answer to the one before, with the whole talk in front of it.

Prompts are text, not token ids, as answers come back as text; so lengths are near what is asked for, not exact.

edited: near-duplicates. A document is sent again and again, each time with other small edits at random places.

An exact prefix ends at the first edit; everything behind it is the same text at a slightly other offset.

tenants: several tenants, one of which sends many times as much as each other one. Is the service of the others held?

cancel_storm: many clients hang up in the middle. Do the others notice, and does the server give everything back?
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvloom.engine.bounds import bounded
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Options, require, workload
from kvloom.loadtest.workloads.corpus import Reader, TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOptions(Options):
    """Lengths, as vLLM's `--random-...` options have them."""

    input_len: int = bounded(512, 1, LONGEST)
    """Tokens of a prompt behind the common prefix, on average."""
    output_len: int = bounded(64, 1, LONGEST)
    """Tokens of an answer, on average."""
    range_ratio: float = bounded(0.0, 0, 0.99)
    """Spread of both lengths: drawn evenly from LEN * (1 - R) to LEN * (1 + R)."""
    prefix_len: int = bounded(0, 0, LONGEST)
    """Tokens that all prompts begin with, in addition to input_len."""


@workload("random", RandomOptions, "random token ids: nothing to reuse, as vLLM's random dataset")
def random_ids(options: RandomOptions, text: TextSource, seed: int, count: int) -> list[Job]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixOptions(Options):
    """A prompt is its group's prefix and a question of its own, prefix_len + question_len tokens."""

    groups: int = bounded(8, 1, 100_000)
    """Different prefixes; a group gets requests / groups prompts."""
    prefix_len: int = bounded(512, 1, LONGEST)
    """Tokens that the prompts of a group share."""
    question_len: int = bounded(64, 1, LONGEST)
    """Tokens of a prompt's own, behind the prefix."""
    output_len: int = bounded(64, 1, LONGEST)
    """Tokens of an answer."""
    popularity: Literal["uniform", "zipf"] = "uniform"
    """Which group comes next: uniform (all equally often), zipf (the n-th group 1 / n^EXPONENT as often as the first)."""
    zipf_exponent: float = bounded(1.0, 0, 10)
    """How steep zipf is."""


@workload(
    "shared_prefix",
    SharedPrefixOptions,
    "groups of prompts with a common beginning, such as system prompts: what a prefix cache is for",
)
def shared_prefix(options: SharedPrefixOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    reader = text.reader(f"shared_prefix {seed}")
    prefixes = [reader.tokens(options.prefix_len) for _ in range(options.groups)]
    chosen = _group_numbers(options, random.Random(f"shared_prefix {seed}"))
    jobs: list[Job] = []
    known: set[int] = set()
    for group, _ in zip(chosen, range(count)):
        prompt = prefixes[group] + reader.tokens(options.question_len)
        label = "prefix seen before" if group in known else "first of its group"
        known.add(group)
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, label=label))
    return jobs


def _group_numbers(options: SharedPrefixOptions, rng: random.Random) -> Iterator[int]:
    """Endless group numbers; uniform ones come in shuffled rounds, so that no group is left out by chance."""
    groups = list(range(options.groups))
    weights = [(rank + 1) ** -options.zipf_exponent for rank in groups]
    while True:
        if options.popularity == "zipf":
            yield from rng.choices(groups, weights, k=1)
        else:
            rng.shuffle(groups)
            yield from groups


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTurnOptions(Options):
    """Requests come in waves: the first turns of CONVERSATIONS talks, their second turns, ..., then new talks."""

    conversations: int = bounded(8, 1, 100_000)
    """Talks under way at the same time."""
    turns: int = bounded(4, 1, 100_000)
    """Turns of a talk."""
    first_len: int = bounded(256, 1, LONGEST)
    """Tokens of what the user says first, about."""
    turn_len: int = bounded(64, 1, LONGEST)
    """Tokens of what the user says in a later turn, about."""
    output_len: int = bounded(64, 1, LONGEST)
    """Tokens of an answer."""


@workload("multi_turn", MultiTurnOptions, "chats of several turns, each with the whole talk before it in front")
def multi_turn(options: MultiTurnOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    reader = text.reader(f"multi_turn {seed}")
    jobs = []
    for index in range(count):
        turn = index // options.conversations % options.turns
        said = reader.text(options.turn_len if turn else options.first_len)
        gap = "\n\n" if turn else ""
        jobs.append(
            Job(
                prompt=f"{gap}User: {said}\n\nAssistant:",
                output_tokens=options.output_len,
                label=f"turn {turn + 1}",
                follows=index - options.conversations if turn else None,
            )
        )
    return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedOptions(Options):
    """Prompts have exactly input_len tokens: what an edit takes away is made up for at the end."""

    bases: int = bounded(4, 1, 100_000)
    """Different documents; each comes unedited first."""
    input_len: int = bounded(1024, 16, LONGEST)
    """Tokens of a prompt."""
    edit_rate: float = bounded(0.004, 0.0, 0.1)
    """Edits per token of a prompt (0.004: one in 250 tokens), at least one edit per prompt."""
    edit_len: int = bounded(4, 1, 64)
    """Most tokens that one edit inserts, deletes or replaces."""
    output_len: int = bounded(64, 1, LONGEST)
    """Tokens of an answer."""

    @property
    def edits(self) -> int:
        """Edits of one prompt."""
        return max(round(self.edit_rate * self.input_len), 1)


@workload("edited", EditedOptions, "documents sent again with a few local edits: an exact prefix ends at the first one")
def edited(options: EditedOptions, text: TextSource, seed: int, count: int) -> list[Job]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsOptions(Options):
    """Of all requests, the noisy tenant sends NOISE / (TENANTS - 1 + NOISE), each quiet one 1 / (TENANTS - 1 + NOISE)."""

    tenants: int = bounded(4, 2, 1000)
    """Tenants, named noisy, quiet1, quiet2, ..."""
    noise: float = bounded(8.0, 1, 1000)
    """Requests of the noisy tenant per request of a quiet one."""
    input_len: int = bounded(1024, 2, LONGEST)
    """Tokens of a prompt."""
    prefix_len: int = 128
    """How many of them are the tenant's own system prompt, the same in each of its prompts."""
    output_len: int = bounded(64, 1, LONGEST)
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        require(self, 0, self.input_len - 1, "prefix_len")


@workload("tenants", TenantsOptions, "several tenants with long prompts, one of them far louder than the others")
def tenants(options: TenantsOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    names = ["noisy", *(f"quiet{i}" for i in range(1, options.tenants))]
    weights = [options.noise, *([1.0] * (options.tenants - 1))]
    reader = text.reader(f"tenants {seed}")
    prefixes = {name: reader.tokens(options.prefix_len) for name in names}
    rng = random.Random(f"tenants {seed}")
    jobs = []
    for _ in range(count):
        tenant = rng.choices(names, weights)[0]
        prompt = prefixes[tenant] + reader.tokens(options.input_len - options.prefix_len)
        label = "noisy" if tenant == "noisy" else "quiet"
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, tenant=tenant, label=label))
    return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelStormOptions(Options):
    """Prompts without common parts, some of which are given up."""

    input_len: int = bounded(512, 1, LONGEST)
    """Tokens of a prompt."""
    output_len: int = bounded(128, 1, LONGEST)
    """Tokens of an answer, if it is waited for."""
    cancel_share: float = bounded(0.5, 0, 1)
    """Share of requests whose client closes the connection, 0 to 1."""
    cancel_min: float = bounded(0.0, 0, 3600)
    """Seconds after sending at which a client leaves at the earliest."""
    cancel_max: float = bounded(2.0, 0, 3600)
    """Seconds after sending at which a client leaves at the latest."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.cancel_max < self.cancel_min:
            raise ConfigError(f"cancel_max is {self.cancel_max:g}; allowed: cancel_min ({self.cancel_min:g}) or more")


@workload("cancel_storm", CancelStormOptions, "a share of the clients hangs up after a random time")
def cancel_storm(options: CancelStormOptions, text: TextSource, seed: int, count: int) -> list[Job]:
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
