"""What the router makes of a thousand replicas, in simulated time.

    python -m kvloom.deploy.simulate routers    ours beside others: hits, balance, times to the first token
    python -m kvloom.deploy.simulate failure    a tenth of all replicas dies at once
    python -m kvloom.deploy.simulate sweep      the router's numbers, and how many fronts there are
    python -m kvloom.deploy.simulate cost       what choosing takes, and what a front remembers (measured, not simulated)

`--publish docs/figures/NAME.json` writes the documents' table, `--plot docs/NAME.png` a picture of it.
"""

from __future__ import annotations

import gc
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvloom.deploy.router_cost import COST_COLUMNS, COST_NOTE, costs
from kvloom.deploy.simulated_load import LOADS, Scale
from kvloom.deploy.simulated_routers import Hashing, Placing, RoundRobin, TwoChoices, constants
from kvloom.deploy.simulation import RESTART_SECONDS, Cache, Call, Failure, Fleet, Router, loads
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.figures import publish, without_outputs
from kvloom.loadtest.simulate_scheduler import Machine
from kvloom.loadtest.study.flags import USAGE_ERROR, add, add_publish, complain, parser
from kvloom.loadtest.study.pictures import picture
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

MEASURED = Machine(
    rows_per_second=1940, step_seconds=0.0035, stream_seconds=0.00144, max_seqs=64, max_tokens=1024, longest_step=0.11
)
"""Two cores of a Xeon with SmolLM2, 512 tokens: `kvloom bench engine`, docs/figures/engine-prefill.json and engine-decode.json.
The rest is the server's defaults."""
ROUTERS: dict[str, Callable[[Scale, int], Router | None]] = {
    "kvloom": lambda scale, capacity: Placing(scale.fronts, capacity, scale.seed),
    "kvloom without guard": lambda scale, capacity: Placing(scale.fronts, capacity, scale.seed),
    "hashing": lambda scale, capacity: Hashing(scale.seed),
    "two choices": lambda scale, capacity: None,
    "round robin": lambda scale, capacity: RoundRobin(scale.fronts, scale.seed),
}
UNAWARE = "others' calls unknown"
"""A `Placement` that takes it that it is the only front, but for what replicas tell."""
CONSTANTS = {"kvloom without guard": {"GUARD": math.inf}}
"""Of `deploy.placement`, that make another router of it."""
SWEEP: tuple[tuple[str, Sequence[float]], ...] = (
    ("fronts", (1, 3, 30)),
    ("NEAR", (0.5, 0.95)),
    ("LEAST_HIT", (0.3, 0.5)),
    ("GUARD", (1.0, 2.0, 8.0, 16.0)),
    ("DECODE_TOKENS", (8.0, 128.0)),
)
AFTER_SECONDS = 1.0
"""Of the failure: what is measured behind the restart."""
SLOT_SECONDS = 0.25
RECOVERED_HIT, RECOVERED_TTFT = 0.01, 1.5
"""Recovered: hits within so much of those undisturbed, the 95th percentile of times within so many times that."""

OUTCOME = (
    Column("hit rate", "hit", ".1%"), Column("of one cache", "share", ".1%"), Column("work", "work", ".2f"),
    Column("max / mean", "most", ".2f"), Column("CV", "spread", ".2f"), Column("TTFT p50, ms", "p50", ",.1f", 1e3),
    Column("p95", "p95", ",.1f", 1e3), Column("p99", "p99", ",.1f", 1e3),
)  # fmt: skip
ROUTER_COLUMNS = (Column("load", "load"), Column("router", "router"), *OUTCOME)
SWEEP_COLUMNS = (Column("load", "load"), Column("setting", "setting"), *OUTCOME)
FAILURE_COLUMNS = (
    Column("when", "when"), Column("hit rate", "hit", ".1%"), Column("hit rate undisturbed", "calm_hit", ".1%"),
    Column("TTFT p50, ms", "p50", ",.1f", 1e3), Column("p95", "p95", ",.1f", 1e3), Column("p99", "p99", ",.1f", 1e3),
    Column("p95 undisturbed", "calm_p95", ",.1f", 1e3), Column("calls sent again", "again"),
    Column("recovered after, s", "recovered", ".2f"),
)  # fmt: skip


def faster(machine: Machine, times: float) -> Machine:
    """A machine whose steps take so much less; the server's settings stay."""
    return replace(machine, rows_per_second=machine.rows_per_second * times, step_seconds=machine.step_seconds / times,
                   stream_seconds=machine.stream_seconds / times)  # fmt: skip


def one_cache(calls: Iterator[Call], capacity: float, begin: float) -> float:
    """The hit rate of calls from `begin` on where all replicas' memory is one cache, at once full of what came before."""
    cache, found, asked = Cache(capacity), 0, 0
    for call in calls:
        if call.at >= begin:
            found += min(sum(cache.match(call.prompt)), call.prompt.tokens - 1)
            asked += call.prompt.tokens
        cache.hold(call.prompt, call.after)
    return found / asked


def simulated(load: str, name: str, scale: Scale, machine: Machine, capacity: int, begin: float = 0.0,
              failure: Failure | None = None, numbers: Mapping[str, float] | None = None) -> Fleet:  # fmt: skip
    """One router under one load, to the end; work is measured from `begin` on. numbers: of `deploy.placement`."""
    fleet = Fleet(RoundRobin(1), machine, scale.replicas, capacity, (begin, scale.seconds))
    if name == UNAWARE:
        fleet.router = Placing(scale.fronts, capacity, scale.seed, told=1)
    else:
        fleet.router = ROUTERS[name](scale, capacity) or TwoChoices(lambda: fleet, scale.seed)
    with constants(**CONSTANTS.get(name, {}), **(numbers or {})):
        fleet.run(LOADS[load](scale), failure)
    return fleet


def summed(calls: Sequence[Call]) -> Row:
    """Hit rate and times of calls."""
    times = np.array([call.first - call.at for call in calls])
    hit = sum(call.found for call in calls) / sum(call.prompt.tokens for call in calls)
    return {"hit": hit, **{f"p{q}": float(np.percentile(times, q)) for q in (50, 95, 99)}}


def outcome(fleet: Fleet, begin: float, best: float) -> Row:
    """The row of a run. best: hit rate of one cache."""
    work = np.array(loads(fleet.engines))
    row = summed([call for call in fleet.done if call.at >= begin])
    seconds = fleet.window[1] - begin
    return row | {"share": row["hit"] / best if best else None, "work": work.mean() / seconds,
                  "most": work.max() / work.mean(), "spread": work.std() / work.mean()}  # fmt: skip


def routers(scale: Scale, machine: Machine, capacity: int, show: Callable[[Row], None]) -> Iterator[Row]:
    """Every router under every load; the second half of the time is what counts."""
    begin = scale.seconds / 2
    for load in scale.loads:
        best = one_cache(LOADS[load](scale), scale.replicas * capacity, begin)
        yield {"load": load, "router": "one cache of all memory", "hit": best}
        for name in [
            name for name in ROUTERS if best or name not in CONSTANTS
        ]:  # where nothing is found twice, those are the same
            yield {"load": load, "router": name, **outcome(simulated(load, name, scale, machine, capacity, begin), begin, best)}


def sweep(scale: Scale, machine: Machine, capacity: int, show: Callable[[Row], None]) -> Iterator[Row]:
    """The router's numbers, one at a time beside those that it has."""
    begin = scale.seconds / 2
    for load in scale.loads:
        for setting, values in (("as it is", (0.0,)), (UNAWARE, (0.0,)), *SWEEP):
            for value in values:
                here = scale._replace(fronts=int(value)) if setting == "fronts" else scale
                numbers = {setting: value} if setting.isupper() else {}
                best = one_cache(LOADS[load](here), here.replicas * capacity, begin)
                name = setting if setting == UNAWARE else "kvloom"
                found = outcome(simulated(load, name, here, machine, capacity, begin, numbers=numbers), begin, best)
                named = f"{setting} {value:g}" if value else setting
                yield {"load": load, "setting": named, **found}


def failure(scale: Scale, machine: Machine, capacity: int, show: Callable[[Row], None]) -> Iterator[Row]:
    """A tenth dies at the end of the time, which then goes on, and is back `RESTART_SECONDS` later. Undisturbed beside it."""
    at = scale.seconds
    longer = scale._replace(seconds=at + RESTART_SECONDS + AFTER_SECONDS)
    calm = simulated("shared", "kvloom", longer, machine, capacity).done
    fleet = simulated("shared", "kvloom", longer, machine, capacity, failure=Failure(at))
    slots, usual = by_slot(fleet.done, longer.seconds), by_slot(calm, longer.seconds)
    show({"slots": slots, "usual": usual, "at": at})
    ends = {"a second before": (-1.0, 0.0), "first half second": (0.0, 0.5), "from then to the restart": (0.5, RESTART_SECONDS),
            "a second after the restart": (RESTART_SECONDS, RESTART_SECONDS + AFTER_SECONDS)}  # fmt: skip
    for when, (begin, end) in ends.items():
        row, other = (summed([call for call in calls if begin <= call.at - at < end]) for calls in (fleet.done, calm))
        first = begin == 0.0
        row |= {"when": when, "calm_hit": other["hit"], "calm_p95": other["p95"]}
        yield row | ({"again": fleet.retried, "recovered": recovered(slots, usual, at)} if first else {})


def by_slot(calls: Sequence[Call], seconds: float) -> list[Row]:
    """What calls of every quarter second found and waited."""
    slots: list[list[Call]] = [[] for _ in range(math.ceil(seconds / SLOT_SECONDS))]
    for call in calls:
        slots[int(call.at / SLOT_SECONDS)].append(call)
    return [{"begin": i * SLOT_SECONDS, **summed(found)} for i, found in enumerate(slots) if found]


def recovered(slots: Sequence[Row], usual: Sequence[Row], at: float) -> float:
    """Seconds from a failure until hits and times are as without it, for good; infinite if they are not in the last slot."""
    worse = [
        slot["begin"] + SLOT_SECONDS - at
        for slot, calm in zip(slots, usual, strict=True)
        if slot["begin"] + SLOT_SECONDS > at
        and (slot["hit"] < calm["hit"] - RECOVERED_HIT or slot["p95"] > RECOVERED_TTFT * calm["p95"])
    ]
    if worse and worse[-1] == slots[-1]["begin"] + SLOT_SECONDS - at:
        return math.inf
    return max(worse, default=0.0)


def plot_routers(path: Path, rows: Sequence[Row]) -> None:
    """Hit rates, balance and times, by load and router."""
    names = list(dict.fromkeys(row["load"] for row in rows))
    panels = (("hit", "hit rate", 1.0), ("most", "most loaded / mean work", 1.0), ("p95", "TTFT p95, ms", 1e3))
    with picture(path, 1, len(panels), (15, 4.2)) as (figure, axes):
        for ax, (key, title, factor) in zip(axes[0], panels):
            for i, name in enumerate(ROUTERS):
                found = [row for row in rows if row["router"] == name]
                ax.bar(
                    np.array([names.index(row["load"]) for row in found]) + (i - 2) * 0.16,
                    [row[key] * factor for row in found],
                    0.16,
                    label=name,
                )
            best = [row["hit"] for row in rows if "cache" in row["router"]]
            if key == "hit":
                ax.hlines(
                    best, np.arange(len(best)) - 0.42, np.arange(len(best)) + 0.42, color="black", lw=1, label="one cache"
                )
            ax.set_xticks(np.arange(len(names)), names)
            ax.set_title(title)
            if key == "p95":
                ax.set_yscale("log")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)


def plot_failure(path: Path, shown: Sequence[Row]) -> None:
    """Hit rate and time over seconds from the failure."""
    one, at = shown[0], shown[0]["at"]
    with picture(path, 1, 2, (12, 4)) as (_, axes):
        for ax, (key, title, factor) in zip(axes[0], (("hit", "hit rate", 1.0), ("p95", "TTFT p95, ms", 1e3))):
            for slots, label in ((one["usual"], "undisturbed"), (one["slots"], "a tenth dies")):
                ax.step(
                    [slot["begin"] - at for slot in slots], [slot[key] * factor for slot in slots], where="post", label=label
                )
            for when in (0.0, RESTART_SECONDS):
                ax.axvline(when, color="grey", lw=0.8, ls=":")
            ax.set_title(title)
            ax.set_xlabel("seconds from the failure")
            ax.set_ylim(0)
        axes[0, 0].legend(frameon=False, loc="lower right")


def inputs(scale: Scale, machine: Machine, capacity: int, speed: float) -> str:
    """What a run was made from, in words."""
    return (
        f"{scale.replicas:,} replicas, {scale.rate:,.0f} calls/s over {scale.fronts} fronts for {scale.seconds:g} s, "
        f"seed {scale.seed}. A replica computes {machine.rows_per_second:,.0f} prompt tokens/s, a step takes "
        f"{machine.step_seconds * 1e3:.2f} ms and {machine.stream_seconds * 1e3:.3f} ms for each sequence that decodes: "
        f"{speed:g} times as fast as the two cores that were measured. Its cache holds {capacity:,} tokens."
    )


PARTS: dict[str, tuple[Callable[..., Iterator[Row]], Sequence[Column], Any]] = {
    "routers": (routers, ROUTER_COLUMNS, plot_routers),
    "failure": (failure, FAILURE_COLUMNS, plot_failure),
    "sweep": (sweep, SWEEP_COLUMNS, None),
    "cost": (costs, COST_COLUMNS, None),
}


LIMITS = {"replicas": 10_000, "fronts": 1000, "capacity": 2**31, "rate": 1e7, "seconds": 600.0, "speed": 1e6}


def positive(text: str) -> float:
    """A number above 0, for argparse. Raises ValueError."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print a table; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    made = parser("deploy.simulate", __doc__)
    made.prog = "python -m kvloom.deploy.simulate"
    made.add_argument("part", choices=PARTS, help="what is looked at")
    add(made, ("replicas", 1000, "engines"), ("fronts", 100, "HTTP processes, each with its own router"),
        ("capacity", 65536, "tokens that a replica's cache holds"), ("seed", 1, "of the calls"))  # fmt: skip
    add(made, ("rate", 100_000.0, "calls per second"), ("seconds", 1.0, "that calls come for"),
        ("speed", 16.0, "of a replica, times that of the two cores that were measured"), kind=positive)  # fmt: skip
    made.add_argument("--load", choices=LOADS, action="append", help="only this one, or these (routers, sweep; default: all)")
    made.add_argument("--plot", type=Path, help="draw a picture into this file")
    add_publish(made)
    args = made.parse_args(words)
    run, columns, plot = PARTS[args.part]
    scale = Scale(args.replicas, args.rate, args.seconds, args.fronts, tuple(args.load or LOADS), args.seed)
    machine = faster(MEASURED, args.speed)
    try:
        for name, most in LIMITS.items():
            if getattr(args, name) > most:
                raise ConfigError(f"--{name} is {getattr(args, name):,}; allowed: up to {most:,}")
        if scale.rate * scale.seconds < 100:
            raise ConfigError(f"{scale.rate:g} calls/s for {scale.seconds:g} s are too few; allowed: 100 calls or more")
        if args.plot and plot is None:
            raise ConfigError(f"there is no picture of {args.part}; leave out --plot")
        gc.disable()  # or millions of calls would be looked at again and again
        shown: list[Row] = []
        rows = []
        for row in run(scale, machine, args.capacity, shown.append):
            rows.append(row)
            gc.collect()  # a fleet and its engines know each other
            console.print(*cells(columns, [row])[1][0], sep="  ", soft_wrap=True)
    except ConfigError as error:
        return complain(error, USAGE_ERROR)
    finally:
        gc.enable()
    note = COST_NOTE if args.part == "cost" else inputs(scale, machine, args.capacity, args.speed)
    console.print(console_table(*cells(columns, rows)), note, sep="\n", soft_wrap=True)
    if args.plot:
        plot(args.plot, shown or rows)
    if args.publish:
        command = shlex.join(["python", "-m", "kvloom.deploy.simulate", *without_outputs(words)])
        publish(args.publish, *cells(columns, rows), note, command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
