"""Control groups: what they grant this process of the processors' time and of memory.

Reads versions 1 and 2, and systems that mount both. A limit of a group holds for all groups in it, so what counts is the least
of the process's own group and those around it, as far as they can be seen: inside a container that is often the root alone.
What is absent, unlimited or makes no sense limits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """A group as one controller has it."""

    folder: Path
    version: int

    def read(self, name: str) -> str:
        """A file of the group. Raises OSError, or UnicodeError, which is a ValueError."""
        return (self.folder / name).read_text()


def granted_cores(root: Path = Path("/")) -> float:
    """Cores whose time this process gets in every period; infinite without a limit. root: where proc and sys/fs/cgroup are."""
    return _least(root, "cpu", _cores)


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may still take, cached files counted as free; infinite without a limit."""
    return _least(root, "memory", _bytes)


def _least(root: Path, controller: str, granted: Callable[[Group], float]) -> float:
    found = math.inf
    for group in _groups(root, controller):
        try:
            found = min(found, granted(group))
        except (OSError, ValueError, ArithmeticError):
            continue
    return found


def _groups(root: Path, controller: str) -> Iterator[Group]:
    """The groups that the process is in, at all places where systems mount them."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if not controllers:
            places, version = (mounted, mounted / "unified"), 2
        elif controller in controllers.split(","):
            places, version = (mounted / controller, mounted / controllers), 1
        else:
            continue
        for place in dict.fromkeys(places):
            yield from (Group(folder, version) for folder in _upwards(place, path))


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The group's folder and those around it, up to the top: all that a container sees where it sees no path of its own."""
    folder = top / path.lstrip("/")
    while folder != top and top in folder.parents:
        yield folder
        folder = folder.parent
    yield top


def _cores(group: Group) -> float:
    if group.version == 2:
        granted, period = group.read("cpu.max").split()
    else:
        granted, period = (group.read(f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if granted in ("max", "-1"):
        return math.inf
    return int(granted) / int(period) if int(granted) > 0 < int(period) else math.inf


def _bytes(group: Group) -> float:
    if group.version == 2:
        limit, used, cached = group.read("memory.max").strip(), group.read("memory.current"), ("active_file", "inactive_file")
    else:
        limit, used = (group.read(f"memory.{name}_in_bytes").strip() for name in ("limit", "usage"))
        cached = ("total_active_file", "total_inactive_file")
    if limit == "max" or int(limit) < 0:
        return math.inf
    return min(int(limit), max(0, int(limit) - int(used) + _cached(group, cached)))


def _cached(group: Group, names: tuple[str, ...]) -> int:
    """Bytes of files that the group keeps in memory, which make room when it is wanted."""
    try:
        lines = [line.split() for line in group.read("memory.stat").splitlines()]
        return sum(int(line[1]) for line in lines if line and line[0] in names)
    except (OSError, ValueError, IndexError):
        return 0
