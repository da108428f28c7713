"""Silence is time that the process had and the engine did not use: a process that stood still is not a dead engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from kvloom.engine.thread.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_silence_is_counted_in_ticks_of_ones_own() -> None:
    clock, busy = Clock(), [True]
    dog = Watchdog(lambda: busy[0], interval=1.0, clock=clock)
    for _ in range(121):
        clock.now += 1.0
        dog.tick()
    assert dog.silence == 121.0, "an engine that hangs for two minutes is silent for as long"
    dog.beat()
    assert dog.silence == 0.0
    clock.now += 500.0  # the whole process stood still
    dog.tick()
    assert dog.silence == 2.0
    clock.now += 1.0
    dog.tick()
    assert dog.silence == 3.0
    busy[0] = False
    clock.now += 1.0
    dog.tick()
    assert dog.silence == 0.0, "nothing to do"


STOPPED = """
import sys, time
from kvloom.engine.thread.watchdog import Watchdog
dog = Watchdog(lambda: True, interval=0.02)
dog.start()
print("ready", flush=True)
sys.stdin.readline()  # meanwhile: stopped and continued
print(dog.silence, flush=True)
dog.close()
"""


def test_a_process_that_was_stopped_goes_on_as_if_nothing_had_happened() -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    time.sleep(5.0)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate("\n", timeout=60)
    assert float(out) < 4.0
