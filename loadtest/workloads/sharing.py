"""What an ideal cache could have reused: read from the prompts themselves, so that it is true whatever a workload intended.

"Ideal" means: never evicts, is shared by all tenants, and every earlier job has been computed when a job comes. One token of a
prompt is always computed, as its logits are needed.

  reusable_tokens     longest common prefix with any earlier prompt
  reusable_anywhere   tokens that lie in a run of at least `RUN` tokens which an earlier prompt holds at any offset, or in the
                      prefix. Repetition inside one prompt does not count.

Both compare 64-bit hashes h(i) = sum of r(token j) * B^j for j < i, modulo 2^64, with random r (Karp and Rabin 1987): a prefix
is h(i), a run is (h(i + RUN) - h(i)) / B^i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.corpus import TextSource

RUN = 32
"""Tokens: shorter runs are common phrases, and no method reuses KV of so few."""

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_Hashes = NDArray[np.uint64]


def with_sharing(jobs: Sequence[Job], text: TextSource) -> list[Job]:
    """The jobs with `reusable_tokens` and `reusable_anywhere` filled in.

    A job that follows another is taken to begin with all of that one's prompt and answer (but the answer's last token, whose KV
    is never computed), and its own prompt to be new where it is not found elsewhere.
    """
    prompts = [text.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt for job in jobs]
    found = shared(prompts)
    history: list[int] = []  # tokens in front of a job's own prompt
    counted = []
    for job, (prefix, anywhere) in zip(jobs, found):
        if job.follows is None:
            history.append(0)
        else:
            before = history[job.follows] + len(prompts[job.follows]) + jobs[job.follows].output_tokens
            history.append(before)
            prefix, anywhere = before - 1, before - 1 + anywhere
        counted.append(dataclasses.replace(job, reusable_tokens=prefix, reusable_anywhere=anywhere))
    return counted


def shared(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each prompt, tokens shared with earlier ones: (as a prefix, anywhere); both less than the prompt's length."""
    hashed = [_prefix_hashes(prompt) for prompt in prompts]
    prefixes = _seen([hashes[1:] for hashes in hashed])
    runs = _seen([_run_hashes(hashes) for hashes in hashed])
    return [_count(len(prompt), *marks) for prompt, *marks in zip(prompts, prefixes, runs)]


def _count(length: int, prefix_seen: NDArray[np.bool_], run_seen: NDArray[np.bool_]) -> tuple[int, int]:
    most = max(length - 1, 0)
    new = np.flatnonzero(~prefix_seen)
    prefix = min(int(new[0]) if new.size else length, most)
    steps = np.zeros(length + 1, dtype=np.int64)  # +1 where a known run begins, -1 behind its end
    starts = np.flatnonzero(run_seen)
    steps[starts] += 1
    steps[starts + RUN] -= 1
    covered = np.cumsum(steps)[:length] > 0
    covered[:prefix] = True
    return prefix, min(int(covered.sum()), most)


def _seen(hashes: Sequence[_Hashes]) -> list[NDArray[np.bool_]]:
    """For each hash, whether an earlier prompt has it, too."""
    sizes = [len(h) for h in hashes]
    owner = np.repeat(np.arange(len(hashes)), sizes)
    everything = np.concatenate([*hashes, np.empty(0, dtype=np.uint64)])
    _, first, inverse = np.unique(everything, return_index=True, return_inverse=True)
    earlier = owner[first][inverse] < owner if everything.size else np.empty(0, dtype=bool)
    return np.split(earlier, np.cumsum(sizes)[:-1])


def _prefix_hashes(prompt: Sequence[int]) -> _Hashes:
    """h(0) ... h(len)."""
    tokens = np.asarray(prompt, dtype=np.uint64)
    terms = _mixed(tokens) * _powers(_BASE, len(prompt))
    return np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])


def _run_hashes(hashes: _Hashes) -> _Hashes:
    """One hash per run of `RUN` tokens, the same wherever the run stands."""
    count = max(len(hashes) - RUN, 0)
    return (hashes[RUN:] - hashes[:count]) * _powers(pow(_BASE, -1, 1 << 64), count)


def _powers(base: int, count: int) -> _Hashes:
    """base^0 ... base^(count - 1), modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers, dtype=np.uint64)


def _mixed(tokens: NDArray[Any]) -> _Hashes:
    """A fixed random-looking 64-bit number per token (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = (tokens + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
