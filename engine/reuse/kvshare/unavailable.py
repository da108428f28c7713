"""In place of KVShare on a server that cannot have it: whoever asks for approximate reuse is told why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.lifecycle import Feature
from kvloom.engine.requests.request import Request


class NoKVShare(Feature):
    """Refuses what needs approximate reuse."""

    def __init__(self, default: str) -> None:
        """default: what requests reuse that do not say."""
        self._default = default

    def received(self, request: Request) -> None:
        """See `Feature`."""
        if request.kv.segment is not None:
            raise _refusal()

    def opened(self, request: Request) -> None:
        """See `Feature`."""
        if request.kv.reuse_or(self._default) == "approx":
            raise _refusal()

    def look(self, tokens: Sequence[int], prefix: int, tenant: str, salt: str) -> Mapping[str, Any]:
        """See `Feature`: nothing, in the form in which there would be something."""
        return {"runs": [], "broken": [], "dropped": []}

    def purge(self, tenant: str) -> int:
        """See `Feature`."""
        raise _refusal()


def _refusal() -> InvalidRequestError:
    return InvalidRequestError(
        "approximate reuse is asked for, but this server runs with --retention razor, which drops KV that would be reused; use "
        "kv.reuse exact",
        param="kv.reuse",
    )
