"""`kvloom bench sweep`: a grid of server settings under load, each server started fresh, speed and quality in one report.

    kvloom bench sweep smollm2 --grid selection=dense,token_select --grid budget=256,512 \\
        --workload random --input-len 1024 --concurrency 1,8 --num-requests 32 --quality agreement --out results/sweep

MODEL is what kvloom serves; without it only --start servers are measured. Every flag that is not listed here goes to the load
(see `kvloom bench serve --help`). What is measured so far is in OUT/sweep.json after every combination; Ctrl-C ends the sweep
and reports on that. A combination that the server refuses at its start is listed with the server's words and does not end the
sweep. Each combination has a folder of its own, on which `kvloom bench report` reports alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.loadtest.load.plan import Plan
from kvloom.loadtest.load.plan import parse as parse_load
from kvloom.loadtest.study.flags import FAILED, INTERRUPTED, USAGE_ERROR, Parser, complain, need
from kvloom.loadtest.sweep.grid import PROBES, Point, Settings, expand, flags, parse_grid

OWN_FLAGS = ("--base-url", "--out")
"""Flags of the load that the sweep sets itself."""

PROBE_SIZES = (
    ("requests", 24, "questions of the needle probe"),
    ("texts", 4, "texts of the agreement probe"),
    ("context", 1024, "tokens in front of what is scored"),
    ("tokens", 64, "scored tokens of each text"),
)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own flags, and those for the load."""
    parser = Parser(
        prog="kvloom bench sweep",
        usage="kvloom bench sweep [MODEL] [flags below] [flags of kvloom bench serve]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "ARG"}
    add("--grid", **{**several, "metavar": "NAME=A,B"}, help="values of a server setting; repeat it, the product is run")
    add("--server-arg", **several, help="a flag of every kvloom server: --server-arg=--threads=2")
    start = "another server: {port} is filled in; with {settings} it is run for every combination, else once"
    add("--start", **{**several, "metavar": "NAME=COMMAND"}, help=start)
    add("--quality", action="append", default=[], choices=sorted(PROBES), help="measure quality after the load; repeat it")
    add("--quality-arg", **several, help="a flag of the needle workload: --quality-arg=--lengths=1024")
    for name, default, text in PROBE_SIZES:
        add(f"--quality-{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    out = Path("results/sweep")
    add("--out", type=Path, default=out, metavar="DIR", help="folder for results (default: %(default)s)")
    words = list(sys.argv[1:] if argv is None else argv)
    # MODEL comes first: anywhere else it could not be told from the value of a flag that is meant for the load.
    model = words.pop(0) if words and not words[0].startswith("-") else None
    args, load = parser.parse_known_args(words)
    args.model = model
    for name, _, _ in PROBE_SIZES:
        if (size := getattr(args, f"quality_{name}")) < 1:
            parser.error(f"--quality-{name} is {size}; allowed: 1 or more")
    return args, load


def points(args: argparse.Namespace) -> list[Point]:
    """Everything to measure; the reference of quality first. Raises ConfigError."""
    combinations: list[Settings] = expand(parse_grid(args.grid))
    found = []
    if args.model is not None:
        command = [sys.executable, "-m", "kvloom.server.cli", "serve", args.model, "--port", "{port}", *args.server_arg]
        found = [Point("kvloom", settings, shlex.join([*command, *flags(settings)])) for settings in combinations]
    for text in args.start:
        name, mark, command_text = text.partition("=")
        if not (name and mark and "{port}" in command_text):
            raise ConfigError(f"--start {text!r} is not NAME=COMMAND with {{port}} in it")
        if "{settings}" in command_text:
            found += [Point(name, s, command_text.replace("{settings}", shlex.join(flags(s)))) for s in combinations]
        else:
            found.append(Point(name, (), command_text))
    if not found:
        raise ConfigError("there is nothing to measure; give a MODEL for kvloom to serve, or --start NAME=COMMAND")
    if len({point.slug for point in found}) < len(found):
        raise ConfigError("two servers have the same name; give every --start a name of its own")
    return found


def load_plan(load: Sequence[str]) -> Plan:
    """Read the flags of the load before any server is started. Raises ConfigError."""
    if wrong := [flag for flag in load if flag.split("=")[0] in OWN_FLAGS]:
        raise ConfigError(f"{wrong[0]} is set by the sweep, which starts every server itself")
    return parse_load(load)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; 0 if every combination was measured or refused, and at least one was measured."""
    try:
        args, load = parse(argv)
        todo, plan = points(args), load_plan(load)
        need("aiohttp", "matplotlib")
        from kvloom.loadtest.sweep.measure import Sweep
        from kvloom.loadtest.sweep.report import write_sweep

        sweep = Sweep(args, load, plan)
        sweep.run(todo)
        for path in write_sweep(args.out):
            print(path)
    except ConfigError as error:
        return complain(error, USAGE_ERROR)
    except (KVLoomError, OSError) as error:
        return complain(error, FAILED)
    if sweep.interrupted:
        return complain(f"interrupted; what was measured until then is in {args.out}", INTERRUPTED)
    outcomes = {result.outcome for result in sweep.results}
    return 0 if "measured" in outcomes and "failed" not in outcomes else FAILED
