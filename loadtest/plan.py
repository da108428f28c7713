"""The command line of `kvloom bench serve`, read into a `Plan`: what is sent where, how, and what is measured."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kvloom.engine.config import option_fields
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.arrivals import Curve, Load, Ramp
from kvloom.loadtest.flags import Parser, add_options, options_of
from kvloom.loadtest.measures import Slo
from kvloom.loadtest.record import PATHS, Endpoint
from kvloom.loadtest.workloads import WORKLOADS

API_KEY_VARIABLE = "KVLOOM_API_KEY"
ABOUT = """Measure a running OpenAI-compatible server: time to first token, time per token, throughput, failures.

--rate sends at given times whatever the server does (open loop), --concurrency sends when an answer has come (closed loop);
several values, separated by commas, are run one after the other. A workload with times of its own (trace) needs neither. Exit
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
    count: int
    """Requests per stage."""
    seed: int
    same_prompts: bool
    loads: tuple[Load, ...]
    """One per stage."""
    warmup: int
    slo: Slo | None
    api_key: str | None
    tenant_keys: Mapping[str, str]
    extra_body: Mapping[str, Any]
    retries: int
    timeout: float
    ready_timeout: float
    scrape_interval: float
    out: Path
    save_text: bool

    def stage_seed(self, stage: int) -> int:
        """Other prompts in every stage, so that one stage does not fill the cache for the next."""
        return self.seed if self.same_prompts else self.seed + stage


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
    _add_load(parser.add_argument_group("The load"))
    _add_report(parser.add_argument_group("The report"))
    add = parser.add_argument_group("The work", "\n".join(f"{name}: {w.help}" for name, w in WORKLOADS.items())).add_argument
    add("--workload", default="random", metavar="NAME", help="one of the above (default: %(default)s)")
    add("--num-requests", type=int, default=64, metavar="N", help="requests per stage (default: %(default)s)")
    add("--seed", type=int, default=0, help="stage k draws its prompts with seed + k (default: %(default)s)")
    add("--same-prompts", action="store_true", help="the same prompts in every stage; a cache then helps the later ones")
    add("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokens prompts are counted in (default: %(default)s)")
    add_options(parser.add_argument_group(f"The workload {workload}"), WORKLOADS[workload].options)
    return parser


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--endpoint", choices=tuple(PATHS), default="completions", help="chat takes text prompts (default: %(default)s)")
    add("--api-key", metavar="KEY", help=f"bearer token; can also come from ${API_KEY_VARIABLE}")
    add("--tenant-key", action="append", default=[], metavar="TENANT=KEY", help="bearer token of one tenant; repeat it")
    add("--extra-body", default="{}", metavar="JSON", help="more fields of every request, such as '{\"top_k\": 1}'")
    add("--retries", type=int, default=0, metavar="N", help="tries again after a 429 or 503, when the server says (default: 0)")
    add("--timeout", type=float, default=1800.0, metavar="S", help="seconds for a request (default: %(default)g)")
    add(
        "--ready-timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds until the server is healthy (default: %(default)g)",
    )


def _add_load(group: Any) -> None:
    add = group.add_argument
    add("--rate", metavar="R[,R...]", help="open loop: requests per second, or inf")
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="1 is Poisson, less is burstier, more is steadier (default: 1)",
    )
    add("--ramp-up", choices=get_args(Curve), help="open loop with a rate that changes")
    add("--ramp-from", type=float, metavar="R", help="requests per second at the start of the ramp")
    add("--ramp-to", type=float, metavar="R", help="and at its end")
    add("--concurrency", metavar="N[,N...]", help="closed loop: requests under way")
    add("--max-concurrency", type=int, metavar="N", help="most under way in an open loop or trace; others wait")
    add("--warmup", type=int, default=4, metavar="N", help="uncounted requests before the first stage (default: %(default)s)")


def _add_report(group: Any) -> None:
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits of a good request: ttft:500 tpot:50 e2el:5000")
    add("--scrape-interval", type=float, default=1.0, metavar="S", help="seconds between looks at /metrics; 0: none meanwhile")
    add("--out", type=Path, default=Path("results/serve"), metavar="DIR", help="folder for results (default: %(default)s)")
    add("--save-text", action="store_true", help="keep the answers in requests.jsonl")


def _plan(args: argparse.Namespace) -> Plan:
    if not args.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url is {args.base_url!r}; write http://HOST:PORT")
    for name, least in (("num_requests", 1), ("warmup", 0), ("retries", 0), ("scrape_interval", 0), ("ready_timeout", 0)):
        if not getattr(args, name) >= least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; allowed: {least} or more")
    if not args.timeout > 0:
        raise ConfigError(f"--timeout is {args.timeout:g}; allowed: more than 0")
    return Plan(
        base_url=args.base_url.rstrip("/").removesuffix("/v1"),
        model=args.model,
        endpoint=args.endpoint,
        tokenizer=args.tokenizer,
        workload=args.workload,
        options=options_of(WORKLOADS[args.workload].options, args),
        count=args.num_requests,
        seed=args.seed,
        same_prompts=args.same_prompts,
        loads=loads_of(args),
        warmup=args.warmup,
        slo=Slo.parse(args.goodput) if args.goodput else None,
        api_key=args.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        tenant_keys=dict(_pair(text) for text in args.tenant_key),
        extra_body=_extra_body(args.extra_body),
        retries=args.retries,
        timeout=args.timeout,
        ready_timeout=args.ready_timeout,
        scrape_interval=args.scrape_interval,
        out=args.out,
        save_text=args.save_text,
    )


def loads_of(args: argparse.Namespace) -> tuple[Load, ...]:
    """The stages. Raises ConfigError for flags that do not go together."""
    ways = [flag for flag in ("rate", "ramp_up", "concurrency") if getattr(args, flag) is not None]
    if len(ways) > 1:
        names = " and ".join("--" + way.replace("_", "-") for way in ways)
        raise ConfigError(f"{names} exclude each other; --max-concurrency bounds an open loop")
    if not args.burstiness > 0:
        raise ConfigError(f"--burstiness is {args.burstiness:g}; allowed: more than 0")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency is {args.max_concurrency}; allowed: 1 or more")
    if args.concurrency is not None:
        if args.max_concurrency is not None:
            raise ConfigError("--max-concurrency bounds an open loop; --concurrency is one already")
        return tuple(Load(concurrency=int(n)) for n in _numbers("--concurrency", args.concurrency, whole=True))
    open_loop = {"burstiness": args.burstiness, "max_concurrency": args.max_concurrency}
    if args.rate is not None:
        return tuple(Load(rate=rate, **open_loop) for rate in _numbers("--rate", args.rate, whole=False))
    if args.ramp_up is not None:
        return (Load(ramp=_ramp(args), **open_loop),)
    return (Load(max_concurrency=args.max_concurrency),)


def _ramp(args: argparse.Namespace) -> Ramp:
    if not all(rate is not None and 0 < rate < math.inf for rate in (args.ramp_from, args.ramp_to)):
        raise ConfigError("--ramp-up needs --ramp-from and --ramp-to, in requests per second, more than 0")
    return Ramp(args.ramp_up, args.ramp_from, args.ramp_to)


def _numbers(flag: str, text: str, *, whole: bool) -> list[float]:
    """Positive numbers between commas."""
    try:
        values = [float(int(part)) if whole else float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(value > 0 for value in values):
        kind = "whole numbers" if whole else "numbers (or inf)"
        raise ConfigError(f"{flag} is {text!r}; allowed: {kind} above 0, separated by commas")
    return values


def _pair(text: str) -> tuple[str, str]:
    tenant, mark, key = text.partition("=")
    if not (tenant and mark and key):
        raise ConfigError("--tenant-key must be TENANT=KEY")  # the value may be a secret: not repeated
    return tenant, key


def _extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError("--extra-body must be a JSON object, such as '{\"top_k\": 1}'")
    return body
