"""The command line of `kvloom bench serve`, read into a `Plan`: what is sent where, when and how, and what is measured."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import json_object, option_fields
from kvloom.loadtest.client.arrivals import Curve, Load, Ramp
from kvloom.loadtest.client.record import PATHS, Endpoint
from kvloom.loadtest.load.measures import Slo
from kvloom.loadtest.load.search import FASTEST, MOST_STEPS
from kvloom.loadtest.study.flags import Parser, add_options, listed, options_of, seconds_of
from kvloom.loadtest.workloads import WORKLOADS

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
        allowed = f"up to {MOST_STAGES} stages, all of rates or all of requests under way"
        raise ConfigError(f"--stages is {text!r}; allowed: {allowed}")
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
        rates = f"--ramp-from and --ramp-to, in requests per second, more than 0 and up to {FASTEST:g}"
        raise ConfigError(f"--ramp-up needs {rates}")
    return Ramp(args.ramp_up, args.ramp_from, args.ramp_to)


def _numbers(flag: str, text: str, most: float, *, whole: bool) -> list[float]:
    """Positive numbers between commas, up to `most` (or inf, where they need not be whole)."""
    kind = "whole numbers" if whole else "numbers (or inf)"
    return listed(
        flag,
        text,
        lambda part: float(int(part)) if whole else float(part),
        lambda value: 0 < value <= most or (not whole and value == math.inf),
        f"up to {MOST_STAGES} {kind} above 0, up to {most:g}",
        MOST_STAGES,
    )


DEFAULT_REQUESTS = 64
MOST_REQUESTS = 1_000_000
ANSWERS_PER_SECOND = 4
MOST_IN_TIME = 20_000
"""Requests that a closed loop by time is made of, at most, if nobody says how many."""
RANGES: dict[str, tuple[float, float]] = {
    "num_requests": (1, MOST_REQUESTS), "warmup": (0, 10_000), "retries": (0, 1000), "seed": (0, 2**31 - 1),
    "max_concurrency": (1, MOST_AT_ONCE), "find_steps": (1, MOST_STEPS), "burstiness": (0.001, 1000),
    "timeout": (0.001, 86_400), "ready_timeout": (0, 86_400), "scrape_interval": (0, 3600), "slo_share": (0.01, 1),
}  # fmt: skip
"""What numbers may be."""
MOST_PERCENTILES = 20
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
API_KEY_VARIABLE = "KVLOOM_API_KEY"
ABOUT = """Measure a running OpenAI-compatible server: time to first token, time per token, throughput, failures.

--rate sends at given times whatever the server does (open loop), --concurrency sends when an answer has come (closed loop);
several values, separated by commas, are run one after the other, --stages each for a time. --find-rate searches for the highest
rate at which --slo is kept. A workload with times of its own (trace) needs none of them. Exit
code: 0 if every stage completed some requests, 1 if one completed none or the server went away, 2 for a wrong flag, 130 after
Ctrl-C; whatever was measured is written in each case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A load test."""

    base_url: str
    model: str | None
    endpoint: Endpoint
    tokenizer: str
    workload: str
    options: Any
    """The workload's own settings, a dataclass."""
    count: int | None
    """Requests per stage, where its time does not say it."""
    seed: int
    same_prompts: bool
    loads: tuple[Load, ...]
    """One per stage."""
    warmup: int
    slo: Slo | None
    slo_share: float
    """Of the requests of a stage, how many must meet every limit for it to count as kept."""
    find_steps: int | None
    """Most steps of a search for the highest rate; None: the loads are what is run."""
    percentiles: tuple[float, ...]
    api_key: str | None
    tenant_keys: Mapping[str, str]
    extra_body: Mapping[str, Any]
    headers: Mapping[str, str]
    retries: int
    timeout: float
    ready_timeout: float
    scrape_interval: float
    out: Path
    save_text: bool

    def stage_seed(self, stage: int) -> int:
        """Other prompts in every stage, so that one stage does not fill the cache for the next."""
        return self.seed if self.same_prompts else self.seed + stage

    def requests(self, load: Load) -> int:
        """How many requests a stage is made of. One by time has as many as its rate gives in that time; a closed loop needs
        enough for a server that answers each in a quarter of a second, unless a number is given."""
        if load.seconds is None:
            return DEFAULT_REQUESTS if self.count is None else self.count
        if load.rate is not None:
            return max(1, round(load.rate * load.seconds))
        assert load.concurrency is not None
        return self.count or min(math.ceil(load.concurrency * load.seconds * ANSWERS_PER_SECOND), MOST_IN_TIME)


def parse(argv: Sequence[str] | None) -> Plan:
    """Read a command line. Raises ConfigError; ends the process with exit code 2 for flags that argparse refuses."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--workload", default="random")
    name = first.parse_known_args(argv)[0].workload
    if name not in WORKLOADS:
        raise ConfigError(f"no workload named {name!r}; there are {', '.join(WORKLOADS)}")
    parser = _parser(name)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown[0]))
    try:
        return _plan(arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _unknown(word: str) -> str:
    """Why a flag is not known: most often it belongs to another workload."""
    name = word.split("=")[0].removeprefix("--").replace("-", "_")
    owners = [key for key, work in WORKLOADS.items() if name in {option.name for option in option_fields(work.options)}]
    return f"unknown argument {word}" + (f", which is for --workload {' or '.join(owners)}" if owners else "")


def _parser(workload: str) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="kvloom bench serve", description=ABOUT, allow_abbrev=False, formatter_class=layout)
    _add_server(parser.add_argument_group("The server"))
    add_loads(parser.add_argument_group("The load"))
    _add_report(parser.add_argument_group("The report"))
    add = parser.add_argument_group("The work", "\n".join(f"{name}: {w.help}" for name, w in WORKLOADS.items())).add_argument
    add("--workload", default="random", metavar="NAME", help="one of the above (default: %(default)s)")
    many = f"requests per stage, and of every step of --find-rate (default: {DEFAULT_REQUESTS}; by time, what the time takes)"
    add("--num-requests", type=int, metavar="N", help=many)
    add("--seed", type=int, default=0, help="stage k draws its prompts with seed + k (default: %(default)s)")
    add("--same-prompts", action="store_true", help="the same prompts in every stage; a cache then helps the later ones")
    add("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokens prompts are counted in (default: %(default)s)")
    add_options(parser.add_argument_group(f"The workload {workload}"), WORKLOADS[workload].options)
    return parser


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add(
        "--endpoint", choices=tuple(PATHS), default="completions", help="chat is sent text for token ids (default: %(default)s)"
    )
    add("--api-key", metavar="KEY", help=f"bearer token; can also come from ${API_KEY_VARIABLE}")
    add("--tenant-key", action="append", default=[], metavar="TENANT=KEY", help="bearer token of one tenant; repeat it")
    add("--extra-body", default="{}", metavar="JSON", help="more fields of every request, such as '{\"top_k\": 1}'")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="an HTTP header of every request; repeat it")
    add("--retries", type=int, default=0, metavar="N", help="tries again after a 429 or 503, when the server says (default: 0)")
    add("--timeout", type=float, default=1800.0, metavar="S", help="seconds for a request (default: %(default)g)")
    healthy = "seconds until the server is healthy (default: %(default)g)"
    add("--ready-timeout", type=float, default=10.0, metavar="S", help=healthy)


def _add_report(group: Any) -> None:
    add = group.add_argument
    add("--slo", metavar="NAME=TIME,...", help="limits of a good request: ttft=500ms,tpot=50ms,e2el=5s")
    add("--slo-share", type=float, default=0.95, metavar="S", help="of requests that must keep them (default: %(default)g)")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="--slo as vLLM writes it: ttft:500 tpot:50 e2el:5000")
    add("--percentiles", default="50,90,99", metavar="P,...", help="of every time, such as 50,90,99.9 (default: %(default)s)")
    add("--scrape-interval", type=float, default=1.0, metavar="S", help="seconds between looks at /metrics; 0: none meanwhile")
    add("--out", type=Path, default=Path("results/serve"), metavar="DIR", help="folder for results (default: %(default)s)")
    add("--save-text", action="store_true", help="keep the answers in requests.jsonl")


def _plan(args: argparse.Namespace) -> Plan:
    if not args.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url is {args.base_url!r}; write http://HOST:PORT")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; allowed: {low:g} to {high:g}")
    if args.slo and args.goodput:
        raise ConfigError("--slo and --goodput say the same; give one of them")
    slo = Slo.parse(args.goodput or (args.slo or "").split(",")) if args.goodput or args.slo else None
    if args.find_rate and slo is None:
        raise ConfigError("--find-rate needs limits to keep: --slo ttft=500ms,tpot=50ms")
    loads = loads_of(args)
    if any(load.seconds and load.rate and load.seconds * load.rate > MOST_REQUESTS for load in loads):
        raise ConfigError(f"--stages has a stage of more than {MOST_REQUESTS:,} requests; give a shorter time or a lower rate")
    if args.num_requests is not None and any(load.seconds is not None and load.rate is not None for load in loads):
        raise ConfigError("--num-requests follows from rates and times; leave it out with --stages of rates")
    allowed = f"up to {MOST_PERCENTILES} numbers above 0, up to 100"
    percentiles = listed("--percentiles", args.percentiles, float, lambda part: 0 < part <= 100, allowed, MOST_PERCENTILES)
    given = {field.name: getattr(args, field.name, None) for field in fields(Plan)}
    made = {
        "base_url": args.base_url.rstrip("/").removesuffix("/v1"),
        "options": options_of(WORKLOADS[args.workload].options, args),
        "count": args.num_requests,
        "loads": loads,
        "slo": slo,
        "find_steps": args.find_steps if args.find_rate else None,
        "percentiles": tuple(sorted(set(percentiles))),
        "api_key": args.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        "tenant_keys": dict(map(_pair, args.tenant_key)),
        "extra_body": json_object("--extra-body", args.extra_body, '{"top_k": 1}'),
        "headers": dict(map(_header, args.header)),
    }
    return Plan(**{**given, **made})


def _header(text: str) -> tuple[str, str]:
    name, mark, value = (part.strip() for part in text.partition(":"))
    if not (mark and _HEADER.fullmatch(name)) or any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ConfigError("--header must be 'NAME: VALUE' on one line")  # the value may be a secret: not repeated
    if name.lower() in ("content-length", "transfer-encoding", "host", "connection"):
        raise ConfigError(f"--header cannot set {name}, which follows from the request itself")
    return name, value


def _pair(text: str) -> tuple[str, str]:
    tenant, mark, key = text.partition("=")
    if not (tenant and mark and key):
        raise ConfigError("--tenant-key must be TENANT=KEY")  # the value may be a secret: not repeated
    return tenant, key
