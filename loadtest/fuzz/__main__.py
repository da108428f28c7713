"""python -m kvloom.loadtest.fuzz [--requests N | --minutes M] [--seed S] [--structured P]: fuzz engines of all settings."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kvloom.loadtest.fuzz.engines import SETTINGS, engine, stage
from kvloom.loadtest.fuzz.fuzzer import CONSTRAINED, Fuzzer, FuzzError

BATCHES = 6
"""Of one engine before the next one's turn."""


def main() -> int:
    """Returns 1 if something did not hold: then the seed is printed that finds it again."""
    parser = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=None, help="end after so many requests; default: 10000")
    parser.add_argument("--minutes", type=float, default=None, help="end after so many minutes")
    parser.add_argument("--structured", type=float, default=CONSTRAINED, help="share with a grammar, 0 to 1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: another each time")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    most = args.requests or (sys.maxsize if args.minutes else 10_000)
    until = time.monotonic() + (args.minutes * 60 if args.minutes else float("inf"))
    first = secrets.randbelow(10**6) if args.seed is None else args.seed
    began, done, errors, ends = time.monotonic(), 0, 0, Counter[str]()
    preemptions = number = 0
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder)):
        while done < most and time.monotonic() < until:
            seed = first + number
            fuzzer = Fuzzer(engine(Path(folder), number), seed, args.structured)
            try:
                for _ in range(BATCHES):
                    fuzzer.batch()
                    if done + fuzzer.tally.requests >= most:
                        break
            except (FuzzError, Exception):
                errors += 1
                logging.exception("seed %d, settings %d", seed, number % len(SETTINGS))
            number += 1
            done += fuzzer.tally.requests
            preemptions += fuzzer.tally.preemptions
            ends.update(fuzzer.tally.ends)
            if number % len(SETTINGS) == 0 or done >= most or time.monotonic() >= until:
                rate = done / (time.monotonic() - began)
                print(f"seed {first}: {done} requests, {errors} errors, {rate:.0f} requests/s, {preemptions} preemptions, "
                      + ", ".join(f"{count} {name}" for name, count in sorted(ends.items())), flush=True)  # fmt: skip
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
