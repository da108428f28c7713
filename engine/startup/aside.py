"""Work beside the imports of a start: they hold the interpreter's lock, so only what does without it comes for nothing.

Imports neither torch nor numpy: it is used before they are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def aside(work: Callable[[], T]) -> Future[T]:
    """Do something short on a thread of its own. The future holds what it returns or raises.

    The end of the process waits for it: to tear down the interpreter under a library that comes back for its lock is a crash.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # also the panics of libraries, which whoever asks for the result is to see
            future.set_exception(error)

    threading.Thread(target=run, name="kvloom-aside").start()
    return future


def load_torch_library() -> None:
    """Load the largest of torch's libraries, which `import torch` would do with the interpreter's lock held, as `ctypes.CDLL`
    does; a foreign function gives it up. Does nothing where torch looks otherwise: the import loads it then, or says what is
    wrong."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError, TypeError):
        found = importlib.util.find_spec("torch")
        if found is not None and found.origin is not None:
            load = ctypes.CDLL(None).dlopen
            load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
            load(os.fsencode(Path(found.origin).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOW)
