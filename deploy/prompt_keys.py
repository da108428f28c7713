"""What of a prompt replicas are compared by: keys of its beginnings, and of its segments wherever they stand.

    key(i)    = H(key(i - 1), tokens[64 i : 64 (i + 1)])      H = keyed BLAKE2b, begun with tenant and salt
    segment   = H(tenant, tokens between two cuts)            cut where a hash of 8 tokens is a multiple of 64

Cuts depend on the text alone (content-defined chunking), so a document has the same segments behind any other. Keys cannot be
predicted without the secret, and tenants have none in common.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHUNK = 64
"""Tokens per key of a prefix."""
ANCHOR, WINDOW = 64, 8
"""A segment ends behind every WINDOW tokens whose hash is a multiple of ANCHOR."""
MOST_SEGMENTS = 512
"""Of one prompt, the first so many are looked at."""
MIXERS = np.array([0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64 for i in range(WINDOW)], np.uint64)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as replicas are compared for it."""

    tokens: int
    prefixes: tuple[int, ...]
    """Keys of its full chunks, each of all tokens up to its end."""
    segments: tuple[tuple[int, int], ...] = ()
    """(key, tokens) of its segments, wherever they stand; none where only an exact prefix may be reused."""


class PromptKeys:
    """Makes them."""

    def __init__(self, secret: bytes) -> None:
        """secret: the same in every front whose keys shall agree."""
        self.secret = hashlib.blake2b(secret, digest_size=32).digest()
        """Of BLAKE2b, 32 bytes."""

    def prompt(self, tokens: Sequence[int] | bytes, tenant: str = "", salt: str = "", *, segments: bool = False) -> Prompt:
        """The keys of a prompt: token ids, or 4 bytes for each. Tenants and salts find only their own. segments: whether KV may
        come from any position."""
        numbers = np.frombuffer(tokens, np.int32) if isinstance(tokens, bytes) else np.array(tokens, np.int32)
        digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{salt}".encode(), key=self.secret, digest_size=16)
        raw, keys = memoryview(numbers.tobytes()), array("Q")
        for start in range(0, len(numbers) - CHUNK + 1, CHUNK):
            digest.update(raw[4 * start : 4 * (start + CHUNK)])
            keys.append(int.from_bytes(digest.digest()[:8], "little"))
        return Prompt(len(numbers), tuple(keys), tuple(self._segments(numbers, raw, tenant)) if segments else ())

    def _segments(self, numbers: npt.NDArray[np.int32], raw: memoryview, tenant: str) -> Iterable[tuple[int, int]]:
        if len(numbers) < WINDOW:
            return
        windows = np.lib.stride_tricks.sliding_window_view(numbers, WINDOW).astype(np.uint64)
        mixed = (windows * MIXERS).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(29)
        ends = (np.flatnonzero(mixed % np.uint64(ANCHOR) == 0) + WINDOW).tolist()[:MOST_SEGMENTS]
        owner = hashlib.blake2b(tenant.encode(), key=self.secret, digest_size=16)
        for start, end in itertools.pairwise(ends):
            if end - start >= WINDOW:
                digest = owner.copy()
                digest.update(raw[4 * start : 4 * end])
                yield int.from_bytes(digest.digest()[:8], "little"), end - start
