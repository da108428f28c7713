"""A segment: KV of a span of tokens that prompts may reuse, and its link to what stood in front of it (`chains`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvloom.engine.cache.prefix import Domain

START = b""
"""The link in front of a chain's first segment."""


def link(domain: Domain, before: bytes, tokens: npt.NDArray[np.int32]) -> bytes:
    """The link of a segment of these tokens behind another one: 16 bytes, under the domain's secret."""
    digest = hashlib.blake2b(before, key=domain.key[:64], digest_size=16)
    digest.update(tokens.astype(np.int32, copy=False).tobytes())
    return digest.digest()


@dataclass(slots=True, eq=False, kw_only=True)
class Segment:
    """KV of a span of tokens, private to the store: requests copy from it."""

    domain: Domain
    tokens: npt.NDArray[np.int32]
    """[len]"""
    k: Tensor
    """[layers, len, kv_heads, head_dim], rotated for positions [position, position + len)."""
    v: Tensor
    position: int
    donor: int
    """What computed it: segments of one donor stand beside each other in one context."""
    isolated: bool
    """Computed alone: the only kind that may be found outside its owner's domain."""
    owner: str
    """Tenant that is charged."""
    before: bytes = START
    """In a shared domain: the link of what stood between the neutral prose and this,"""
    link: bytes = field(init=False, default=START)
    """and its own (`chains`)."""
    heirs: list[str] = field(default_factory=list)
    """Tenants that left the same in this shared domain since: the first of them takes it over when its owner gives it up."""
    uses: int = 0
    deviation: float = 0.0
    """Moving mean of the relative deviation seen when it was reused."""
    rejections: int = 0

    def __post_init__(self) -> None:
        if self.domain.shared:
            self.link = link(self.domain, self.before, self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes
