"""The garbage collector while a server starts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Collect nothing inside. A start makes a million objects that nearly all stay; walking over them again and again takes a
    good part of its time. Later collections leave out what was made inside, too, so that they hold up no step."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
