"""Order, limits and early ends of a stage, against the fake server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvloom.loadtest.client.arrivals import Load
from kvloom.loadtest.client.client import Client, Job, Record
from kvloom.loadtest.client.drive import Driver, StageRun, check_order


def drive(server: Any, jobs: Sequence[Job], load: Load, due: Sequence[float] | None = None, stop_after: int = 0) -> StageRun:
    async def work() -> StageRun:
        ended: list[Record] = []

        def note(record: Record, started: float) -> None:
            ended.append(record)
            if len(ended) == stop_after:
                driver.stop()

        async with Client(server.url, "fake") as client:
            driver = Driver(client, jobs, due or [0.0] * len(jobs), load, on_end=note)
            run = await driver.run()
        assert sorted(record.index for record in ended) == [record.index for record in run.records]
        return run

    return asyncio.run(asyncio.wait_for(work(), 20))


def words(count: int, tokens: int = 3) -> list[Job]:
    return [Job(prompt=f"p{i} ", output_tokens=tokens) for i in range(count)]


def test_a_closed_loop_keeps_its_concurrency_and_order(server: Any) -> None:
    run = drive(server, words(9), Load(concurrency=3))
    assert [record.ok for record in run.records] == [True] * 9
    assert server.most == 3
    assert [body["prompt"] for body in server.seen] == [f"p{i} " for i in range(9)]
    ends = sorted(record.ended or 0.0 for record in run.records)
    for freed, record in zip(ends, run.records[3:]):
        assert freed <= record.scheduled <= record.sent, "waiting for a place is no lag"
    assert not (run.interrupted or run.lost)


def test_an_open_loop_sends_on_time_whatever_the_server_does(server: Any) -> None:
    server.hold = 4  # no answer before all are under way
    due = [0.0, 0.05, 0.1, 0.15]
    run = drive(server, words(4, tokens=1), Load(rate=20.0), due)
    assert server.most == 4 and all(record.ok for record in run.records)
    for record, at in zip(run.records, due):
        assert record.scheduled - run.started == pytest.approx(at)
        assert record.sent >= record.scheduled


def test_a_bounded_open_loop_waits_and_counts_it_as_lag(server: Any) -> None:
    server.delay = 0.05
    run = drive(server, words(3, tokens=1), Load(rate=1000.0, max_concurrency=1), [0.0, 0.001, 0.002])
    assert server.most == 1
    for before, record in zip(run.records, run.records[1:]):
        assert before.ended is not None and record.sent >= before.ended
        assert record.lag > 0.04


def test_a_follower_waits_for_the_reply_and_carries_it(server: Any) -> None:
    jobs = [Job(prompt="a", output_tokens=2), Job(prompt="b", output_tokens=1),
            Job(prompt="c", output_tokens=1, follows=0), Job(prompt="d", output_tokens=1, follows=2)]  # fmt: skip
    run = drive(server, jobs, Load(concurrency=4))
    prompts = {body["prompt"] for body in server.seen}
    assert prompts == {"a", "b", "aw0 w1 c", "aw0 w1 cw0 d"}
    first, _, second, third = run.records
    assert first.ended is not None and second.ended is not None
    assert second.sent >= first.ended and third.sent >= second.ended
    assert second.scheduled == pytest.approx(first.ended), "waiting for the reply is no lag"


def test_followers_of_a_failed_request_fail_without_being_sent(server: Any) -> None:
    server.refusals = [(500, {})]
    jobs = [
        Job(prompt="a", output_tokens=2),
        Job(prompt="c", output_tokens=1, follows=0),
        Job(prompt="d", output_tokens=1, follows=1),
    ]
    run = drive(server, jobs, Load(concurrency=2))
    assert [record.error_kind for record in run.records] == ["http_500", "follows", "follows"]
    assert len(server.seen) == 1


def test_impossible_orders_are_refused() -> None:
    text, ids = Job(prompt="a", output_tokens=1), Job(prompt=[1], output_tokens=1)
    with pytest.raises(ValueError, match="earlier"):
        check_order([Job(prompt="a", output_tokens=1, follows=0)])
    with pytest.raises(ValueError, match="token ids"):
        check_order([ids, Job(prompt="a", output_tokens=1, follows=0)])
    check_order([text, Job(prompt="b", output_tokens=1, follows=0)])


def test_stopping_sends_nothing_more_and_aborts_what_is_under_way(server: Any) -> None:
    server.delay = 0.01
    jobs = [Job(prompt="short", output_tokens=1), *words(50, tokens=1000)]
    run = drive(server, jobs, Load(concurrency=3), stop_after=1)
    assert run.interrupted and run.planned == 51
    assert 1 <= len(run.records) <= 4 and run.records[0].ok
    assert all(record.cancelled and record.ended for record in run.records[1:])


def test_a_server_that_goes_away_ends_the_stage(server: Any) -> None:
    server.die_after, server.delay = 4, 0.01
    run = drive(server, words(500, tokens=5), Load(concurrency=4))
    kinds = [record.error_kind for record in run.records]
    assert run.lost and not run.interrupted
    assert 0 < len(run.records) < 60, "the rest was not thrown at a closed port"
    assert any(record.ok for record in run.records) and "connect" in kinds
    assert set(kinds) <= {None, "connect", "stream"}
