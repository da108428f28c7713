"""How the stages of a load test send, read from the command line: rates, concurrencies, ramps, stages by time, a search."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any, get_args

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.arrivals import Curve, Load, Ramp
from kvloom.loadtest.load.search import FASTEST, MOST_STEPS
from kvloom.loadtest.study.flags import seconds_of

MOST_STAGES = 100
MOST_AT_ONCE = 100_000
LONGEST_STAGE = 7 * 86_400.0
"""Seconds."""
WAYS = ("rate", "ramp_up", "concurrency", "stages")
_STAGE = re.compile(r"(c?)([^@]+)@([^@]+)")


def add_loads(group: Any) -> None:
    """The flags."""
    add = group.add_argument
    add("--rate", metavar="R[,R...]", help="open loop: requests per second, or inf; with --find-rate where the search begins")
    add("--burstiness", type=float, default=1.0, metavar="B",
        help="1 is Poisson, less is burstier, more is steadier (default: 1)")  # fmt: skip
    add("--ramp-up", choices=get_args(Curve), help="open loop with a rate that changes")
    add("--ramp-from", type=float, metavar="R", help="requests per second at the start of the ramp")
    add("--ramp-to", type=float, metavar="R", help="and at its end")
    add("--concurrency", metavar="N[,N...]", help="closed loop: requests under way")
    add(
        "--stages", metavar="R@TIME,...", help="stages by time: 2@30s,4@1m (requests per second) or c8@30s (requests under way)"
    )
    add("--max-concurrency", type=int, metavar="N", help="most under way in an open loop or trace; others wait")
    add("--warmup", type=int, default=4, metavar="N", help="uncounted requests before the first stage (default: %(default)s)")
    add("--find-rate", action="store_true", help="search for the highest rate that keeps --slo; every step is a stage")
    add("--find-steps", type=int, default=10, metavar="N", help=f"most steps of the search, up to {MOST_STEPS} (default: 10)")


def loads_of(args: argparse.Namespace) -> tuple[Load, ...]:
    """The stages. Raises ConfigError for flags that do not go together."""
    ways = [flag for flag in WAYS if getattr(args, flag) is not None]
    if len(ways) > 1:
        names = " and ".join("--" + way.replace("_", "-") for way in ways)
        raise ConfigError(f"{names} exclude each other; --max-concurrency bounds an open loop")
    if args.find_rate and ways not in ([], ["rate"]):
        raise ConfigError("--find-rate sends at rates of its own; give --rate to say where it begins, or nothing")
    if (args.concurrency is not None or (args.stages or "").startswith("c")) and args.max_concurrency is not None:
        raise ConfigError("--max-concurrency bounds an open loop; --concurrency is one already")
    open_loop = {"burstiness": args.burstiness, "max_concurrency": args.max_concurrency}
    if args.concurrency is not None:
        return tuple(Load(concurrency=int(n)) for n in _numbers("--concurrency", args.concurrency, MOST_AT_ONCE, whole=True))
    if args.stages is not None:
        return _stages(args.stages, open_loop)
    if args.rate is not None or args.find_rate:
        rates = _numbers("--rate", args.rate or "1", FASTEST, whole=False)
        if args.find_rate and (len(rates) > 1 or math.isinf(rates[0])):
            raise ConfigError(f"--rate is {args.rate!r}; --find-rate begins at one rate")
        return tuple(Load(rate=rate, **open_loop) for rate in rates)
    if args.ramp_up is not None:
        return (Load(ramp=_ramp(args), **open_loop),)
    return (Load(max_concurrency=args.max_concurrency),)


def _stages(text: str, open_loop: dict[str, Any]) -> tuple[Load, ...]:
    """`2@30s,4@1m` or `c8@30s`. Raises ConfigError."""
    loads, marks = [], set()
    for part in text.split(","):
        found = _STAGE.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"--stages has {part.strip()!r}; write RATE@TIME or cREQUESTS@TIME, such as 2@30s,4@1m or c8@30s")
        closed, amount, time = found.groups()
        seconds = _seconds(time)
        marks.add(closed)
        if closed:
            (number,) = _numbers("--stages", amount, MOST_AT_ONCE, whole=True)
            loads.append(Load(concurrency=int(number), seconds=seconds))
        else:
            (rate,) = _numbers("--stages", amount, FASTEST, whole=False)
            if math.isinf(rate):
                raise ConfigError("--stages has a rate of inf; for a time a rate must be a number")
            loads.append(Load(rate=rate, seconds=seconds, **open_loop))
    if len(marks) > 1 or len(loads) > MOST_STAGES:
        raise ConfigError(
            f"--stages is {text!r}; allowed: up to {MOST_STAGES} stages, all of rates or all of requests under way"
        )
    return tuple(loads)


def _seconds(text: str) -> float:
    try:
        seconds = seconds_of(text)
    except ValueError as error:
        raise ConfigError(f"--stages: {error}") from None
    if not 0 < seconds <= LONGEST_STAGE:
        raise ConfigError(f"--stages has a time of {text}; allowed: more than 0, up to {LONGEST_STAGE / 86400:g} days")
    return seconds


def _ramp(args: argparse.Namespace) -> Ramp:
    if not all(rate is not None and 0 < rate <= FASTEST for rate in (args.ramp_from, args.ramp_to)):
        raise ConfigError(
            f"--ramp-up needs --ramp-from and --ramp-to, in requests per second, more than 0 and up to {FASTEST:g}"
        )
    return Ramp(args.ramp_up, args.ramp_from, args.ramp_to)


def _numbers(flag: str, text: str, most: float, *, whole: bool) -> list[float]:
    """Positive numbers between commas, up to `most` (or inf, where they need not be whole)."""
    try:
        values = [float(int(part)) if whole else float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        values = []
    allowed = all(0 < value <= most or (not whole and value == math.inf) for value in values)
    if not (values and allowed and len(values) <= MOST_STAGES):
        kind = "whole numbers" if whole else "numbers (or inf)"
        raise ConfigError(
            f"{flag} is {text!r}; allowed: up to {MOST_STAGES} {kind} above 0, up to {most:g}, separated by commas"
        )
    return values
