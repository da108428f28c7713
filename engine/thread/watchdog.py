"""Whether the engine's loop turns, told by a clock that stops when the process does.

The watchdog counts ticks of a thread of its own since the last beat. When the whole process stands still (a stopped job, a
paused virtual machine), its ticks stand still, too; so that time is not held against the engine, which had none either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

INTERVAL = 1.0
"""Seconds between ticks. A tick that comes later than that counts as one that came in time, up to twice as long."""


class Watchdog:
    """Measures silence: time that this process really had, with work to do and without a beat."""

    def __init__(
        self, busy: Callable[[], bool], *, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """busy: whether a beat is to be expected."""
        self.silence = 0.0
        """Seconds."""
        self._busy, self._interval, self._clock = busy, interval, clock
        self._last = clock()
        self._ended = threading.Event()

    def beat(self) -> None:
        """The loop has come round. Cheap; from any thread."""
        self.silence = 0.0

    def tick(self) -> None:
        """A moment has passed."""
        now = self._clock()
        passed, self._last = now - self._last, now
        self.silence = self.silence + min(passed, 2 * self._interval) if self._busy() else 0.0

    def start(self) -> None:
        """Tick on a thread of its own until `close`."""
        threading.Thread(target=self._run, name="kvloom-watchdog", daemon=True).start()

    def close(self) -> None:
        """End that thread. Idempotent."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self.tick()
