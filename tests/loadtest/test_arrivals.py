"""When requests are due: the totals and the shape of open loops, traces, and what stages are called."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from kvloom.loadtest.client.arrivals import Load, Ramp, due_times
from kvloom.loadtest.client.record import Job

JOBS = [Job(prompt="x", output_tokens=1)] * 400


def gaps(due: list[float]) -> np.ndarray:
    return np.diff([0.0, *due])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_the_last_request_is_due_at_n_over_rate_however_bursty(burstiness: float) -> None:
    due = due_times(Load(rate=5.0, burstiness=burstiness), JOBS, seed=1)
    assert due[-1] == pytest.approx(len(JOBS) / 5.0)
    assert all(a <= b for a, b in pairwise(due))
    # A gamma distribution's coefficient of variation is 1 / sqrt(shape).
    assert np.std(gaps(due)) / np.mean(gaps(due)) == pytest.approx(burstiness**-0.5, rel=0.25)


def test_the_seed_decides() -> None:
    load = Load(rate=2.0)
    assert due_times(load, JOBS, 3) == due_times(load, JOBS, 3) != due_times(load, JOBS, 4)


def test_an_infinite_rate_and_a_closed_loop_send_at_once() -> None:
    assert set(due_times(Load(rate=math.inf), JOBS, 0)) == set(due_times(Load(concurrency=4), JOBS, 0)) == {0.0}


@pytest.mark.parametrize(("curve", "middle"), [("linear", 5.5), ("exponential", 10**0.5)])
def test_a_ramp_changes_the_rate(curve: str, middle: float) -> None:
    ramp = Ramp(curve, 1.0, 10.0)  # type: ignore[arg-type]
    assert (ramp.rate(0.0), ramp.rate(0.5), ramp.rate(1.0)) == pytest.approx((1.0, middle, 10.0))
    between = gaps(due_times(Load(ramp=ramp, burstiness=1000.0), JOBS, 0))  # nearly steady
    assert 1 / between[:10].mean() == pytest.approx(1.0, rel=0.2)
    assert 1 / between[195:205].mean() == pytest.approx(middle, rel=0.2)
    assert 1 / between[-10:].mean() == pytest.approx(10.0, rel=0.2)


def test_a_trace_keeps_its_times() -> None:
    jobs = [Job(prompt="x", output_tokens=1, at=at) for at in (0.0, 0.5, 4.0)]
    assert due_times(Load(), jobs, 0) == [0.0, 0.5, 4.0]
    with pytest.raises(ValueError, match="1 of 4"):
        due_times(Load(), [*jobs, JOBS[0]], 0)


def test_names_and_modes() -> None:
    loads = (Load(rate=2.5), Load(concurrency=8), Load(), Load(ramp=Ramp("linear", 1, 8), max_concurrency=3))
    assert [load.name for load in loads] == ["rate 2.5", "concurrency 8", "trace", "rate 1 to 8"]
    assert [load.mode for load in loads] == ["open", "closed", "trace", "open"]
    assert [load.limit for load in loads] == [None, 8, None, 3]
