"""How the numba kernels are compiled: flags, threading layer, and the disk cache.

Owns the two decorators of this package. `entry` marks the functions that Python calls; they are cached on disk, so that the
first start after an install compiles nothing. `device` marks what entries call; it is compiled into them.

The cache lies under the user's cache folder, or under KVLOOM_CACHE, in a folder named by a hash of this package's sources
(numba itself looks only at the file of the cached function, so an edited callee would otherwise go unnoticed). Without a
writable folder everything still works and is compiled anew in every process.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import platformdirs
from numba.core import config as numba_config

from kvloom.kernels.trust import code_folder

config: Any = numba_config  # its settings are set at run time, unknown to a type checker

# No 'nnan' or 'ninf': -inf is a legal logit and a legal lse. No 'afn': the exponential is our own.
FAST = {"contract", "reassoc", "nsz", "arcp"}
FLAGS: dict[str, Any] = {"fastmath": FAST, "nogil": True, "error_model": "numpy", "boundscheck": False}


def cache_root() -> Path:
    """Where kvloom keeps what it can make again: KVLOOM_CACHE, or the user's cache folder."""
    given = os.environ.get("KVLOOM_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("kvloom"))


def _cache_folder() -> str | None:
    """Folder for this version of the sources, or None if nothing can be written there. Numba loads code from it: it is one that
    nobody else may write to."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = cache_root() / "numba" / digest
    try:
        folder = code_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return str(folder)


def _choose_threading_layer() -> None:
    """OpenMP starts a region in 2 us and survives nested use; workqueue, always there, is the fallback.

    Numba raises only at the first parallel call, so the library is probed here.
    """
    if config.THREADING_LAYER != "default":
        return  # the user chose with NUMBA_THREADING_LAYER
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        config.THREADING_LAYER = "workqueue"
    else:
        config.THREADING_LAYER = "omp"


CACHE_FOLDER = _cache_folder()
_choose_threading_layer()

device = numba.njit(**FLAGS)


def entry(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for functions called from Python: cached on disk if possible, compiled on first use per type."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = config.CACHE_DIR  # ours for this decoration only: numba reads it when the dispatcher is made
        config.CACHE_DIR = CACHE_FOLDER or before
        try:
            return numba.njit(function, cache=CACHE_FOLDER is not None, parallel=parallel, **FLAGS)
        finally:
            config.CACHE_DIR = before

    return decorate
