"""What crosses between a front, where HTTP is, and the replicas. All of it can be pickled; Ray carries it, with its token."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvloom.engine.client import EngineStats, Health
from kvloom.engine.errors import KVLoomError
from kvloom.engine.requests.request import KVOptions, RequestOutput
from kvloom.engine.requests.sampling import SamplingParams

ASKED = ("explain", "peek", "purge", "reset", "tenants")
"""Methods of `EngineClient` that a front may have a replica call."""


class ReplicaLostError(KVLoomError):
    """A replica ended, or cannot be reached, before an answer was complete: another takes it up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request on its way to a replica. Its outputs come back over the front's line (`Batch`), under `key`."""

    front: str
    """Whose line."""
    key: str
    """Of this try: a request that is taken up by another replica gets another."""
    replica: str | None = None
    """The only one that may take it; None for the one that the router chooses."""
    avoid: tuple[str, ...] = ()
    """Those that were lost under it: not again, where there are others."""
    request_id: str
    prompt: bytes
    """Token ids, 4 bytes each."""
    sampling: SamplingParams
    kv: KVOptions
    priority: int
    tenant: str
    cache_salt: str


class Question(NamedTuple):
    """A method of `EngineClient` that a replica is to call."""

    method: str
    arguments: Mapping[str, Any]
    replica: str | None = None
    """The only one that may answer; None for the one to which a prompt among the arguments would go."""


class Line(NamedTuple):
    """A front asks a replica for the outputs of all its requests there, for as long as it lives."""

    front: str
    replica: str


class Batch(NamedTuple):
    """What a replica has for a front: all outputs of one step in one message."""

    outputs: Sequence[tuple[str, RequestOutput]]
    """With the keys of their orders."""
    stats: EngineStats | None = None
    """Now and then, and with the last message,"""
    health: Health | None = None
    """the same."""
    process: int = 0
    """With them: the replica's process id, on its machine."""


def packed(prompt: Sequence[int]) -> bytes:
    """Token ids as they travel."""
    return array("i", prompt).tobytes()


def unpacked(prompt: bytes) -> tuple[int, ...]:
    """Token ids that have arrived."""
    return tuple(array("i", prompt))
