"""What a front and the routers of its handles share in one process, on two threads: where prompts go, and who is there.

A file of its own because Ray Serve ships the module of a router by value: `deploy.router` may hold no state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvloom.deploy.placement import Placement

Watcher = Callable[[Sequence[str]], None]
"""Is told the names of the replicas that there are."""

_lock = threading.Lock()
_placements: dict[str, Placement] = {}
_watchers: dict[str, Watcher] = {}
_present: dict[str, Sequence[str]] = {}


def placement_of(application: str, secret: bytes = b"") -> Placement:
    """The placement of an application in this process; secret: of its keys, where it is made by this call."""
    with _lock:
        if application not in _placements:
            _placements[application] = Placement(secret, announced=True)
        return _placements[application]


def watch(application: str, watcher: Watcher) -> None:
    """Have a front told which replicas there are, now and at every change; called on a thread of Ray's."""
    with _lock:
        _watchers[application] = watcher
        if (present := _present.get(application)) is not None:
            watcher(present)  # inside: a newer list comes later


def tell(application: str, names: Sequence[str]) -> None:
    """These are the replicas now."""
    with _lock:
        _present[application] = names
        if (watcher := _watchers.get(application)) is not None:
            watcher(names)
