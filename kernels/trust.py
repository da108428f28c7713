"""Folders from which code is loaded: nobody but their owner and root may write there, and the owner is who runs this process.

Whoever can put a file into a cache of compiled code runs code as everybody who loads from it. So a folder that another user
owns, or may write to, is not used: what would lie there is made anew, in a folder of this process alone.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH
log = logging.getLogger("kvloom.kernels")


def foreign(path: Path) -> str | None:
    """Why what lies at `path` must not be loaded: another user owns or may change it, or may put another thing in its place.
    None if it may. Raises OSError if it is not there."""
    real = path.resolve(strict=True)
    for place in (real, *real.parents):
        state = place.stat()
        sticky = place is not real and state.st_mode & stat.S_ISVTX  # as /tmp: nobody moves what is another's
        if (problem := _open(place, state, sticky=bool(sticky))) is not None:
            return problem
    return None


def _open(place: Path, state: os.stat_result, *, sticky: bool = False) -> str | None:
    if hasattr(os, "geteuid") and state.st_uid not in (os.geteuid(), 0):
        return f"{place} belongs to another user ({state.st_uid})"
    if state.st_mode & OTHERS and not sticky:
        return f"{place} can be written by other users (mode {stat.S_IMODE(state.st_mode):o})"
    return None


def code_folder(folder: Path) -> Path:
    """`folder`, made if it is not there; or, if others could have put or changed something there, one of this process alone,
    with a warning. Raises OSError if it cannot be made."""
    _make(folder)
    problem = foreign(folder)
    if problem is None and folder.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH):  # others reach what lies there
        problem = next((found for file in folder.rglob("*") if (found := _open(file, file.stat())) is not None), None)
    return folder if problem is None else _private(str(folder), problem)


@functools.cache
def _private(folder: str, problem: str) -> Path:
    """A new folder that goes with this process: one for each that is refused."""
    log.warning(
        "%s is not used for compiled code: %s; it is compiled anew for this process. Give the folder to the user that runs "
        "kvloom and take write permission from others (chmod go-w), or set KVLOOM_CACHE to another one",
        folder,
        problem,
    )
    made = Path(tempfile.mkdtemp(prefix="kvloom-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _make(folder: Path) -> None:
    """Make a folder and what it lies in, which others may not write to. With a umask that lets others write to new files, they
    may not enter either: then it does not matter who may write to a file there."""
    umask = os.umask(OTHERS)
    try:
        mode = 0o755 if umask & OTHERS == OTHERS else 0o700
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir(mode=mode, exist_ok=True)
    finally:
        os.umask(umask)
