"""How often chunks of text have been seen, per domain, with decay: what comes again is worth compiling."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvloom.engine.cache.prefix import Domain

LEAST, MOST = 64, 1024
"""Tokens of a text that is worth compiling, and of one that is compiled at once."""
SECOND = 1.5
"""Sightings, decayed, that count as the second one: two within a little less than a half-life."""


@dataclass(slots=True)
class _Seen:
    count: float
    time: float
    request: str


class Popularity:
    """Sightings of chunks; the least recently seen are forgotten."""

    def __init__(self, half_life: float = 600.0, capacity: int = 65536) -> None:
        """half_life: seconds."""
        self._half_life, self._capacity = half_life, capacity
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def see(self, domain: Domain, tokens: npt.NDArray[np.int32], request: str, now: float) -> float:
        """Count a chunk once per request; returns its count, this sighting included. now: seconds."""
        key = hashlib.blake2b(tokens.tobytes(), key=domain.key, digest_size=16).digest()
        entry = self._seen.get(key)
        if entry is None:
            entry = self._seen[key] = _Seen(0.0, now, "")
        if entry.request != request:
            entry.count = entry.count * 0.5 ** ((now - entry.time) / self._half_life) + 1.0
            entry.time, entry.request = now, request
        self._seen.move_to_end(key)
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return entry.count

    def second_sight(
        self, domain: Domain, tokens: npt.NDArray[np.int32], spans: Sequence[tuple[int, int]], request: str, now: float
    ) -> list[tuple[int, int]]:
        """Count all spans of a prompt, and return the stretches of LEAST to MOST tokens of neighbouring ones seen before."""
        found: list[tuple[int, int]] = []
        for first, last in spans:
            if self.see(domain, tokens[first:last], request, now) < SECOND:
                continue
            if found and found[-1][1] == first and last - found[-1][0] <= MOST:
                found[-1] = (found[-1][0], last)
            else:
                found.append((first, last))
        return [(first, last) for first, last in found if last - first >= LEAST]
