"""Texts that were uploaded, for replicas that come later: each once, bounded, and no tenant at the cost of others."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from kvloom.engine.requests.request import KVOptions

MOST_UPLOADED_TOKENS = 4 * 1024**2
"""Of all that is kept; beyond, the oldest go of the tenant that has most."""


class Upload(NamedTuple):
    """A text to compile alone."""

    prompt: bytes
    """Token ids, 4 bytes each."""
    kv: KVOptions
    tenant: str
    cache_salt: str

    @property
    def key(self) -> tuple[str, str, str, bytes]:
        """The same for the same text of the same tenant, salt and scope."""
        return self.tenant, self.cache_salt, self.kv.segment or "", hashlib.blake2b(self.prompt, digest_size=16).digest()


class Uploads:
    """What is kept, the oldest first."""

    def __init__(self, most_tokens: int = MOST_UPLOADED_TOKENS) -> None:
        self._most = most_tokens
        self._kept: OrderedDict[tuple[str, str, str, bytes], Upload] = OrderedDict()
        self._tokens: Counter[str] = Counter()

    def add(self, upload: Upload) -> None:
        """One more; it is the newest now, also if it was there."""
        self.discard(upload)
        self._kept[upload.key] = upload
        self._tokens[upload.tenant] += len(upload.prompt) // 4
        while self._tokens.total() > self._most:
            most = max(self._tokens, key=self._tokens.__getitem__)
            self.discard(next(one for one in self._kept.values() if one.tenant == most))

    def discard(self, upload: Upload) -> None:
        """Forget one, if it is there."""
        if (found := self._kept.pop(upload.key, None)) is not None:
            self._tokens[found.tenant] -= len(found.prompt) // 4
            if not self._tokens[found.tenant]:
                del self._tokens[found.tenant]

    def purge(self, tenant: str) -> None:
        """Forget all of a tenant's."""
        for upload in [one for one in self._kept.values() if one.tenant == tenant]:
            self.discard(upload)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._tokens.clear()

    def __contains__(self, upload: Upload) -> bool:
        return upload.key in self._kept

    def __iter__(self) -> Iterator[Upload]:
        """A copy: it may change while it is gone through."""
        return iter(list(self._kept.values()))
