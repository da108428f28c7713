"""The simulation: as the same every time, right by hand where that can be done, and on the side of what is true."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvloom.deploy.prompt_keys import CHUNK, Prompt
from kvloom.deploy.simulate import MEASURED, main, one_cache, recovered, simulated, summed
from kvloom.deploy.simulated_load import LOADS, Scale
from kvloom.deploy.simulated_routers import Placing, RoundRobin
from kvloom.deploy.simulation import LOST_SECONDS, RESTART_SECONDS, Cache, Call, Failure, Fleet
from kvloom.loadtest.simulate_scheduler import Machine

ROOT = Path(__file__).resolve().parents[2]
SCALE = Scale(replicas=8, rate=400.0, seconds=1.0, fronts=3, seed=5)
FAST = Machine(rows_per_second=20_000, step_seconds=0.0003, stream_seconds=0.0001, max_seqs=64, max_tokens=1024)
SLOW = Machine(rows_per_second=1000, step_seconds=0.01, stream_seconds=0.002, max_seqs=2, max_tokens=100)
CAPACITY = 20_000


def call(number: int, at: float, tokens: int, output: int = 10, keys: tuple[int, ...] = ()) -> Call:
    return Call(number, at, Prompt(tokens, keys), output, 0, key=str(number))


def first_tokens(*calls: Call) -> dict[int, float]:
    done = Fleet(RoundRobin(1), SLOW, 1, CAPACITY).run(calls)
    return {one.number: one.first for one in done}


def test_a_call_takes_what_its_steps_take() -> None:
    assert first_tokens(call(0, 1.0, 50)) == {0: pytest.approx(1.0 + 0.01 + 0.05)}
    assert first_tokens(call(0, 0.0, 250)) == {0: pytest.approx(3 * 0.01 + 0.25)}, "three chunks"


def test_a_newcomer_waits_for_the_end_of_a_step_and_shares_the_next_one() -> None:
    found = first_tokens(call(0, 0.0, 50), call(1, 0.065, 20))
    assert found[1] == pytest.approx(0.06 + 0.012 + 0.012 + 0.02)  # a step of the first one alone, and one of both


def test_no_more_run_than_there_are_seats() -> None:
    found = first_tokens(call(0, 0.0, 10, 5), call(1, 0.0, 10, 5), call(2, 0.0, 10))
    first, second, both = 0.01 + 0.01, 0.012 + 0.01, 3 * 0.014
    assert found[1] == pytest.approx(first + second)
    assert found[2] == pytest.approx(first + second + both + 0.012 + 0.01)


def test_what_is_held_need_not_be_computed() -> None:
    keys = (1, 2, 3)
    again = call(1, 5.0, 3 * CHUNK + 8, keys=keys)
    found = first_tokens(call(0, 0.0, 3 * CHUNK + 8, keys=keys), again)
    assert again.found == 3 * CHUNK
    assert found[1] == pytest.approx(5.0 + 0.01 + 0.008)


def test_a_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    cache = Cache(4 * CHUNK)
    cache.hold(Prompt(2 * CHUNK, (1, 2)))
    cache.hold(Prompt(2 * CHUNK, (3, 4)))
    cache.hold(Prompt(2 * CHUNK, (1, 2)))
    cache.hold(Prompt(CHUNK, (5,)))
    assert cache.tokens == 4 * CHUNK and list(cache.held) == [3, 2, 1, 5], "of a prompt its end goes first"
    assert cache.match(Prompt(200, (1, 2, 9), ((5, 100), (3, 100)))) == (2 * CHUNK, 72), (
        "what the prefix has does not count twice"
    )


@pytest.mark.parametrize("load", LOADS)
def test_all_are_answered_once_and_nothing_waits_in_the_end(load: str) -> None:
    fleet = simulated(load, "kvloom", SCALE, FAST, CAPACITY)
    numbers = sorted(one.number for one in fleet.done)
    assert numbers == list(range(len(numbers))) and 300 < len(numbers) < 500
    assert all(one.first >= one.at for one in fleet.done)
    router = fleet.router
    assert isinstance(router, Placing)
    assert not any(front._placed or any(replica.own or replica.tells for replica in front._replicas) for front in router.fronts)
    assert all(not engine.calls and engine.cache.tokens <= CAPACITY for engine in fleet.engines.values())
    hit = summed(fleet.done)["hit"]
    assert hit <= one_cache(LOADS[load](SCALE), math.inf, 0.0) + 0.01  # of calls in other order


def test_the_same_seed_gives_the_same_and_another_one_something_else() -> None:
    runs = [simulated("chats", "kvloom", SCALE._replace(seed=seed), FAST, CAPACITY) for seed in (5, 5, 6)]
    told = [[(one.number, one.first, one.found) for one in fleet.done] for fleet in runs]
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize(("load", "more"), [("shared", 0.15), ("chats/own", 0.15), ("documents", 0.03)])
def test_ours_finds_more_than_round_robin(load: str, more: float) -> None:
    ours, other = (summed(simulated(load, name, SCALE, FAST, CAPACITY).done) for name in ("kvloom", "round robin"))
    assert ours["hit"] > other["hit"] + more


def test_a_failure_loses_no_call_and_is_made_up_for() -> None:
    long = SCALE._replace(rate=200.0, seconds=1.0 + RESTART_SECONDS + 1.0)
    fleet = simulated("shared", "kvloom", long, FAST, CAPACITY, failure=Failure(1.0, 0.25))
    assert sorted(one.number for one in fleet.done) == list(range(len(fleet.done)))
    assert fleet.retried
    assert sum(engine.alive for engine in fleet.engines.values()) == SCALE.replicas
    new = [name for name in fleet.engines if int(name.removeprefix("replica-")) >= SCALE.replicas]
    assert len(new) == 2 and all(fleet.engines[name].cache.held for name in new)
    waited = [one.first - one.at for one in fleet.done if 1.0 - LOST_SECONDS < one.at < 1.0 + LOST_SECONDS]
    assert max(waited) >= LOST_SECONDS / 2
    before, after = (summed([one for one in fleet.done if begin <= one.at < begin + 1.0]) for begin in (0.0, 7.0))
    assert after["hit"] > before["hit"]


def test_when_it_is_recovered() -> None:
    usual = [{"begin": 0.25 * i, "hit": 0.8, "p95": 0.1} for i in range(40)]
    slots = [dict(slot) for slot in usual]
    assert recovered(slots, usual, 2.0) == 0
    slots[8]["hit"] = slots[10]["p95"] = 0.5
    assert recovered(slots, usual, 2.0) == 0.75
    slots[4]["hit"] = 0.0
    assert recovered(slots, usual, 2.0) == 0.75, "that was before"
    slots[-1]["hit"] = 0.0
    assert recovered(slots, usual, 2.0) == math.inf


def test_constants_are_those_of_the_published_measurement() -> None:
    def rows(name: str) -> list[list[str]]:
        found: list[list[str]] = json.loads((ROOT / f"docs/figures/engine-{name}.json").read_text())["rows"]
        return found

    rates = {row[0]: float(row[2]) for row in rows("prefill")}
    assert rates["512"] == MEASURED.rows_per_second
    steps = {int(row[0]): float(row[2]) for row in rows("decode") if row[1] == "512"}
    assert steps.keys() == {1, 2, 4, 8}
    for streams, measured in steps.items():
        assert 1e3 * (MEASURED.step_seconds + streams * MEASURED.stream_seconds) == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("part", ["routers", "sweep", "failure", "cost"])
def test_the_command_publishes_a_table_that_says_how_it_was_made(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    words = f"{part} --replicas 4 --rate 200 --fronts 2 --seconds 0.5 --capacity 4096 --load chats".split()
    assert main([*words, "--publish", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["command"] == "python -m kvloom.deploy.simulate " + " ".join(words)
    assert (
        len(result["rows"]) > 3
        and ("Processor time" if part == "cost" else "4 replicas, 200 calls/s over 2 fronts") in result["note"]
    )
    assert all(len(row) == len(result["head"]) for row in result["rows"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("routers --rate 0", "--rate: invalid positive value: '0'"),
        ("routers --replicas 0", "--replicas: '0' is not a whole number of 1 or more"),
        ("routers --replicas 1000000", "--replicas"),
        ("routers --rate 10 --seconds 1", "allowed: 100 calls or more"),
        ("cost --plot x.png", "leave out --plot"),
        ("all", "choose from"),
    ],
)
def test_what_cannot_be_simulated_is_refused(flags: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(flags.split())
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert told in capsys.readouterr().err
