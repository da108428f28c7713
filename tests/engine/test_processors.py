"""Threads that follow from affinity and the control groups' quota."""

from __future__ import annotations

import math
import os

import pytest

from kvloom.engine.startup.processors import Processors, processors


@pytest.mark.parametrize(
    ("cores", "granted", "threads"), [(2, math.inf, 2), (2, 1.5, 1), (2, 1.0, 1), (8, 2.9, 2), (2, 0.1, 1), (4, 16.0, 4)]
)
def test_no_more_threads_than_the_quota_feeds_all_the_time(cores: int, granted: float, threads: int) -> None:
    assert Processors(cores, granted).threads == threads


def test_what_is_said_of_them() -> None:
    assert str(Processors(2)) == "2 cores" and str(Processors(1, 4.0)) == "1 core"
    assert str(Processors(2, 1.5)) == "2 cores, of which the control group grants 1.5"


def test_this_process() -> None:
    assert 1 <= processors().threads <= processors().cores == len(os.sched_getaffinity(0))
