"""What a retention costs and gains: quality, speed and memory, the memory counted by running into its limits.

kvloom eval retention --settings razor,razor:induction_share=0.3 --context 8000 --batch 8 --memory 600MiB

With --methods, every retention beside every selection method, whose rows choose among what is kept whole:

kvloom eval retention --methods tidal_decode --budgets 512 --haystacks 5 --context 7500 --batch 8

KL, top-1      real text, teacher-forced, against an engine that keeps everything and reads it
needle         planted facts; the question is fed through the decode path, token by token
step, attention  medians over decode steps of batch x context of the same texts, both engines in turns
held           memory of the blocks that these requests hold while they decode, from the pools
at once        requests of that context in a cache of --memory that were seen decoding together, without a preemption
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Status
from kvloom.loadtest.quality import spec, text
from kvloom.loadtest.quality.decoding import WARM_STEPS, greedy, prefill, under_way
from kvloom.loadtest.quality.divergence import Agreement
from kvloom.loadtest.quality.methods import timed
from kvloom.loadtest.quality.spec import MethodSpec, parse_methods
from kvloom.loadtest.quality.tasks import ask, haystacks, trials
from kvloom.loadtest.study.flags import add, add_engine, add_model, add_outputs, add_resume
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, described, engine

EVERYTHING = "everything"


class Setting(NamedTuple):
    """One retention and its options."""

    name: str
    options: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """What the engine is started with."""
        return {"retention": self.name, **({"retention_options": json.dumps(dict(self.options))} if self.options else {})}


class Pair(NamedTuple):
    """What is measured together."""

    setting: Setting
    method: MethodSpec

    @property
    def case(self) -> Case:
        """Its row."""
        kept, method = self.setting, self.method
        row = {"retention": kept.name, "options": dict(kept.options), "method": method.method, "budget": method.budget,
               "method_options": dict(method.options)}  # fmt: skip
        options = json.dumps(dict(kept.options)) if kept.options else ""
        return Case(self, " ".join(part for part in (kept.name, options, method.label) if part), row)


def at_once(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, kv: KVOptions) -> int:
    """Most of these requests that decode together, when all come at once. Raises ConfigError if one was preempted."""
    core, most = llm.core, 0
    requests = [greedy(f"at-once-{i}", prompt, tokens, kv) for i, prompt in enumerate(prompts)]
    with under_way(llm, requests):
        while core.busy and any(request.generated == 0 for request in requests):
            core.step()
            most = max(most, sum(r.generated > 0 and r.status is Status.RUNNING for r in requests))
    if core.stats().preemptions:
        raise ConfigError("a request was preempted while capacity was measured, so the figure means nothing; report this")
    return most


def settings(text: str) -> list[Setting]:
    """What to measure, everything first. Raises ConfigError."""
    found = [Setting(name, options) for name, options in parse_methods(text)]
    return [Setting(EVERYTHING, {}), *(setting for setting in found if setting.name != EVERYTHING)]


class Retention(Study):
    """Measures settings beside one engine that keeps everything."""

    title = "Retention: quality, speed and memory"
    columns = (
        Column("retention", "retention"),
        Column("options", "options"),
        Column("method", "method"),
        Column("budget", "budget"),
        Column("method's options", "method_options"),
        Column("retrieval heads", "retrieval_share", ".0%"),
        Column("KL to dense", "kl_mean", ".4f"),
        Column("top-1", "top1", ".1%"),
        Column("needle", "needle", ".1%"),
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
    identity = ("model", "dtype", "weights", "retention", "options", "method", "budget", "method_options", "context", "batch",
                "windows", "scored", "memory", "haystacks")  # fmt: skip

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        add_model(made)
        made.add_argument("--settings", default="razor", help="NAME or NAME:OPTION=VALUE:..., comma-separated (default: razor)")
        spec.add_methods(made, "dense")
        add_engine(made)
        add(
            made,
            ("context", 8000, "tokens in front of every measured decode row"),
            ("batch", 8, "requests that decode at once"),
            ("windows", 8, "texts for the agreement"),
            ("scored", 64, "tokens scored in each"),
            ("rounds", 4, "turns of both engines for step times"),
            ("steps", 8, "timed steps per turn"),
            ("requests", 10, "requests that come at once to the small cache"),
            ("room", 150, "tokens that each of those generates: long enough for all to be there at once"),
        )
        add(made, ("haystacks", 0, "texts with 8 needles each; 0 for none"), kind=int)
        made.add_argument("--memory", default="600MiB", help="KV cache of which the requests at once are counted")
        made.add_argument("--text", type=Path, help="a text file to measure on (default: the Python reference)")
        add_outputs(made)
        add_resume(made)

    def __init__(self, args: argparse.Namespace) -> None:
        methods = spec.plan(args.methods, args.budgets, baseline=False)
        self.args, self.cases = args, [Pair(one, method).case for one in settings(args.settings) for method in methods]
        self.llm = engine(args)
        spec.check(self.llm, methods)
        self._kept: tuple[Setting, LLM] | None = None
        forced, tokens = max(args.scored, args.steps + WARM_STEPS) + 1, text.real_text(self.llm, args.text)
        self.passages = text.passages(self.llm, tokens, args.context, forced, args.windows)
        self.needles = trials("needle", self.llm.tokenizer, tokens, args.context, args.haystacks, 0) if args.haystacks else []
        self.prompts = [*(passage.prompt for passage in self.passages), *haystacks(self.needles)]
        self.agreement = Agreement(self.llm, text.cut(self.passages, args.scored + 1), args.batch)
        self.note = (
            f"Context {args.context}, batch {args.batch}; {args.windows} windows of text, {args.scored} tokens scored in each. "
            f"At once: of {args.requests} requests of that context in {args.memory} of KV cache. In brackets: 95% intervals. "
            f"{described(self.llm)}"
        )

    def prepare(self, group: Hashable, steps: Steps) -> None:
        steps.name("computing texts")
        text.warn_of_room(self.llm, sum(map(len, self.prompts)) + self.args.batch * (self.args.scored + 64))
        prefill(self.llm, self.prompts)
        self.agreement.remember_dense()

    def measure(self, case: Case, steps: Steps) -> Row:
        args, (setting, method) = self.args, case.what
        llm, kv = self._engine(setting), method.kv
        row = self.agreement.measure(kv, on=llm).figures(self.agreement.dense)
        if self.needles:
            found = ask(llm, self.needles, kv, args.batch).figures()
            row |= {"needle": found["accuracy"], "needle_ci": found["accuracy_ci"], "needle_trials": found["trials"]}
        row |= timed(args, self.passages, (llm, kv), (self.llm, KVOptions()))
        row["held_share"] = row["held_bytes"] / row["held_bytes_dense"]
        heads = llm.core.runner.geometry.heads
        row["retrieval_share"] = sum(map(len, heads)) / (len(heads) * llm.core.runner.geometry.kv_heads)
        unpaced = {"kv_memory": args.memory, "step_time_ms": 0}  # else the first are done before the last have come
        small, count = engine(args, **setting.config, **unpaced), args.requests
        prompts = [self.passages[i % len(self.passages)].prompt[i:][: args.context - count] for i in range(count)]
        row["at_once"] = at_once(small, prompts, args.room, kv)
        row["capacity_tokens"] = small.core.cache.capacity_tokens
        steps.done()
        return row

    def _engine(self, setting: Setting) -> LLM:
        """One that keeps so much, whose cache holds the texts; beside the one that keeps everything there is one at a time."""
        if setting.name == EVERYTHING:
            return self.llm
        if self._kept is None or self._kept[0] != setting:
            self._kept = None
            self._kept = setting, engine(self.args, **setting.config)
            prefill(self._kept[1], self.prompts)
        return self._kept[1]


main = command("eval retention", Retention)
