"""Exact prefix index: which blocks already hold the KV of a prompt's beginning.

Owns the map from a block's chained key to its block id. Promises that a hit is exact: same domain, same tokens (compared,
not only hashed), same positions. Knows nothing of eviction order (`cache.pool`) or of approximate reuse.

    key(0) = H(domain, tokens[0:B])        key(i) = H(domain, key(i-1), tokens[iB:(i+1)B])        H = keyed BLAKE2b

The domain is itself a keyed hash over all that must agree before KV may be shared: model, dtype, the method parameters that
change stored KV, tenant, salt. Its secret is a setting, or drawn at start-up, so keys cannot be predicted from outside.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence
from typing import NamedTuple


class Domain(NamedTuple):
    """A scope inside which equal tokens mean equal KV."""

    key: bytes
    tenant: str
    shared: bool = False
    """Whether tenants find here what others sent: it is no tenant's own."""


class DomainFactory:
    """Makes domains for one model and one set of KV-changing parameters."""

    def __init__(self, *parts: str, secret: bytes | None = None) -> None:
        self._secret = secret or secrets.token_bytes(32)
        self._parts = parts

    def domain(self, tenant: str, salt: str, method: str = "") -> Domain:
        """method: parameters of whatever computed the KV, if that is not the plain dense way."""
        digest = hashlib.blake2b(key=self._secret, digest_size=32)
        for part in (*self._parts, tenant, salt, method):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)  # lengths first: ("ab", "c") is not ("a", "bc")
        return Domain(digest.digest(), tenant)


class Chain:
    """Keys of a growing token sequence's full blocks, each computed once."""

    __slots__ = ("_size", "domain", "keys")

    def __init__(self, domain: Domain, block_size: int) -> None:
        self.domain = domain
        self.keys: list[bytes] = []
        self._size = block_size

    def extend(self, tokens: Sequence[int], blocks: int) -> None:
        """Compute keys up to `blocks` full blocks of `tokens`, whose earlier part must not have changed."""
        for i in range(len(self.keys), blocks):
            digest = hashlib.blake2b(self.keys[-1] if self.keys else b"", key=self.domain.key, digest_size=16)
            digest.update(array("i", tokens[i * self._size : (i + 1) * self._size]).tobytes())
            self.keys.append(digest.digest())


class _Entry(NamedTuple):
    block: int
    parent: bytes
    tokens: tuple[int, ...]


class PrefixIndex:
    """Key -> block, and back."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, chain: Chain, tokens: Sequence[int], limit: int) -> list[int]:
        """Blocks that hold the longest known beginning of `tokens`, at most `limit` tokens of it, in sequence order.

        Stays true until one of them is evicted; the caller pins them before it does anything else.
        """
        blocks: list[int] = []
        parent = b""
        for i in range(limit // self._size):
            chain.extend(tokens, i + 1)
            entry = self._entries.get(chain.keys[i])
            span = tokens[i * self._size : (i + 1) * self._size]
            if entry is None or entry.parent != parent or entry.tokens != tuple(span):
                break
            blocks.append(entry.block)
            parent = chain.keys[i]
        return blocks

    def publish(self, chain: Chain, i: int, tokens: Sequence[int], block: int) -> bool:
        """Make block `i` of `tokens` findable as `block`. False if an equal (or colliding) block is known already."""
        chain.extend(tokens, i + 1)
        key = chain.keys[i]
        if key in self._entries:
            return False
        span = tuple(tokens[i * self._size : (i + 1) * self._size])
        self._entries[key] = _Entry(block, chain.keys[i - 1] if i else b"", span)
        self._keys[block] = key
        return True

    def holds(self, block: int) -> bool:
        """Whether a block can be found."""
        return block in self._keys

    def remove(self, block: int) -> None:
        """Forget a block that is about to hold something else."""
        del self._entries[self._keys.pop(block)]

    def check(self) -> None:
        """Prove that both directions agree. Raises AssertionError."""
        assert len(self._keys) == len(self._entries), "a block has two keys, or a key two blocks"
        assert all(self._entries[key].block == block for block, key in self._keys.items()), "a key leads elsewhere"

    def blocks(self) -> set[int]:
        return set(self._keys)
