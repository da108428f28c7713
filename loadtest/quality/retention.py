"""What a retention costs and gains: quality, speed and memory, the memory counted by running into its limits.

kvloom eval retention --settings razor,razor:induction_share=0.3 --context 8000 --batch 8 --memory 600MiB

KL, top-1      real text, teacher-forced, against an engine that keeps everything
step, attention  medians over decode steps of batch x context of the same texts, both engines in turns
held           memory of the blocks that these requests hold while they decode, from the pools
at once        requests of that context in a cache of --memory that were seen decoding together, without a preemption
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.request import KVOptions, Request, SamplingParams, Status
from kvloom.loadtest.figures import add_publish
from kvloom.loadtest.quality import setup
from kvloom.loadtest.quality.decoding import WARM_STEPS, Cost, Passage, follow, prefill
from kvloom.loadtest.quality.divergence import Agreement
from kvloom.loadtest.quality.methods import speed
from kvloom.loadtest.quality.spec import parse_methods
from kvloom.loadtest.study.results import Column, Results, Row

EVERYTHING = "everything"
COLUMNS = (
    Column("retention", "retention"),
    Column("options", "options"),
    Column("retrieval heads", "retrieval_share", ".0%"),
    Column("KL to dense", "kl_mean", ".4f"),
    Column("top-1", "top1", ".1%"),
    Column("step ms", "step_ms", ".1f"),
    Column("speed-up", "speed_up", ".2f"),
    Column("attention ms", "attention_ms", ".1f"),
    Column("of everything", "attention_up", ".2f"),
    Column("MB read", "bytes_read", ".1f", 1e-6),
    Column("held MB", "held_bytes", ".1f", 1e-6),
    Column("held, of everything", "held_share", ".3f"),
    Column("at once", "at_once"),
    Column("capacity tokens", "capacity_tokens"),
)
IDENTITY = ("model", "dtype", "weights", "retention", "options", "context", "batch", "windows", "scored", "memory")


class Setting(NamedTuple):
    """One retention and its options."""

    name: str
    options: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """What the engine is started with."""
        return {"retention": self.name, **({"retention_options": json.dumps(dict(self.options))} if self.options else {})}


def at_once(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Most of these requests that decode together, when all come at once. Raises ConfigError if one was preempted."""
    core, most = llm.core, 0
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [Request(id=f"at-once-{i}", prompt=list(prompt), sampling=sampling, arrival=time.monotonic())
                for i, prompt in enumerate(prompts)]  # fmt: skip
    try:
        for request in requests:
            core.add(request)
        while core.busy and any(request.generated == 0 for request in requests):
            core.step()
            most = max(most, sum(r.generated > 0 and r.status is Status.RUNNING for r in requests))
    finally:
        for request in requests:
            core.abort(request.id)
    if core.stats().preemptions:
        raise ConfigError("a request was preempted while capacity was measured, so the figure means nothing; report this")
    return most


class Study:
    """Measures settings beside one engine that keeps everything."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense = self._engine(Setting(EVERYTHING, {}), args.kv_memory)
        text = setup.real_text(self.dense, args.text)
        forced = max(args.scored, args.steps + WARM_STEPS) + 1
        self.passages = setup.passages(self.dense, text, args.context, forced, args.windows)
        self.agreement = Agreement(
            self.dense, [Passage(p.prompt, p.forced[: args.scored + 1]) for p in self.passages], args.batch
        )

    def _engine(self, setting: Setting, memory: str) -> LLM:
        args = self.args
        return LLM(
            args.model, dtype=args.dtype, weights=args.weights, backend=args.backend, threads=args.threads, kv_memory=memory,
            shadow_interval=0, **setting.config,
        )  # fmt: skip

    def identity(self, setting: Setting) -> Row:
        keys = ("context", "batch", "windows", "scored", "memory")
        about = setup.about(self.dense)
        return {"retention": setting.name, "options": dict(setting.options)} | {k: getattr(self.args, k) for k in keys} | about

    def prepare(self) -> None:
        """Compute the texts, and what the dense engine thinks of them."""
        prefill(self.dense, [passage.prompt for passage in self.passages])
        self.agreement.remember_dense()

    def measure(self, setting: Setting, capacity: int) -> Row:
        """Everything about one setting. capacity: requests to try at once."""
        llm = self.dense if setting.name == EVERYTHING else self._engine(setting, self.args.kv_memory)
        prefill(llm, [passage.prompt for passage in self.passages])
        scores = self.agreement.measure(KVOptions(), on=llm)
        row = self.identity(setting) | scores.figures(self.agreement.dense) | self._speed(llm)
        retention = llm.core.retention
        row["retrieval_share"] = 1.0 if retention is None else retention.classes.share
        del llm
        small = self._engine(setting, self.args.memory)
        prompts = [self.passages[i % len(self.passages)].prompt[i:] for i in range(capacity)]
        row["at_once"] = at_once(small, [prompt[: self.args.context - capacity] for prompt in prompts], self.args.room)
        row["capacity_tokens"] = small.core.cache.capacity_tokens
        return row

    def _speed(self, llm: LLM) -> Row:
        """Decode steps of both engines in turns."""
        args = self.args
        cut = [Passage(p.prompt, p.forced[: args.steps + WARM_STEPS + 1]) for p in self.passages[: args.batch]]
        exact, found = Cost(), Cost()
        for _ in range(args.rounds):
            exact.add(follow(self.dense, cut, KVOptions()).cost)
            found.add(follow(llm, cut, KVOptions()).cost)
        if not exact.seconds or not found.seconds:  # prompts that are not cached are computed while others decode already
            raise ConfigError(
                f"--kv-memory {args.kv_memory} does not keep the prompts of {len(cut)} requests cached between runs, so no "
                "step had them all decoding; give more"
            )
        row = speed(found, exact)
        row["held_share"] = found.held_bytes / exact.held_bytes
        return row


def settings(text: str) -> list[Setting]:
    """What to measure, everything first. Raises ConfigError."""
    found = [Setting(name, options) for name, options in parse_methods(text)]
    return [Setting(EVERYTHING, {}), *(setting for setting in found if setting.name != EVERYTHING)]


def run(study: Study, chosen: Sequence[Setting], results: Results) -> None:
    """Measure every setting that the results lack."""
    missing = [setting for setting in chosen if results.find(study.identity(setting)) is None]
    if missing:
        setup.console.print("computing texts")
        study.prepare()
    for setting in missing:
        setup.console.print(f"measuring {setting.name} {json.dumps(dict(setting.options)) if setting.options else ''}")
        results.add(study.measure(setting, study.args.requests))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="kvloom eval retention", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    made.add_argument("model", nargs="?", default="smollm2")
    made.add_argument("--settings", default="razor", help="NAME or NAME:OPTION=VALUE:..., comma-separated (default: razor)")
    for name, default in (("dtype", "bf16"), ("weights", "auto"), ("backend", "auto"), ("kv-memory", "4GiB")):
        made.add_argument(f"--{name}", default=default, help="as in kvloom serve (default: %(default)s)")
    made.add_argument("--threads", type=setup.count, help="compute threads (default: one per core)")
    for name, number, text in (
        ("context", 8000, "tokens in front of every measured decode row"),
        ("batch", 8, "requests that decode at once"),
        ("windows", 8, "texts for the agreement"),
        ("scored", 64, "tokens scored in each"),
        ("rounds", 4, "turns of both engines for step times"),
        ("steps", 8, "timed steps per turn"),
        ("requests", 10, "requests that come at once to the small cache"),
        ("room", 150, "tokens that each of those generates: long enough for all to be there at once"),
    ):
        made.add_argument(f"--{name}", type=setup.count, default=number, help=f"{text} (default: %(default)s)")
    made.add_argument("--memory", default="600MiB", help="KV cache of which the requests at once are counted")
    made.add_argument("--text", type=Path, help="a text file to measure on (default: the Python reference)")
    made.add_argument("--json", type=Path, help="write rows into this file")
    made.add_argument("--markdown", type=Path, help="write the table into this file")
    add_publish(made)
    made.add_argument("--resume", action="store_true", help="keep the rows that --json holds already for the same settings")
    return made.parse_args(argv)


def note(llm: LLM, args: argparse.Namespace) -> str:
    return (
        f"Context {args.context}, batch {args.batch}; {args.windows} windows of text, {args.scored} tokens scored in each. At "
        f"once: of {args.requests} requests of that context in {args.memory} of KV cache. In brackets: 95% intervals. "
        f"{setup.described(llm)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    chosen = settings(args.settings)
    study = Study(args)
    results = Results(
        COLUMNS,
        IDENTITY,
        "Retention: quality, speed and memory",
        args.json,
        args.markdown,
        args.publish,
        note(study.dense, args),
    )
    if args.resume:
        results.resume()
    return setup.finish(results, lambda: run(study, chosen, results))


if __name__ == "__main__":
    sys.exit(main())
