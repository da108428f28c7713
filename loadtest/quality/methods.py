"""Quality, speed and memory of every method and budget, in one table and from one run.

    kvloom eval methods --methods dense,sink_window,token_select --budgets 128,256,512 --context 7500 --batch 8 \\
        --json results/methods.json --markdown docs/methods.md

    KL, top-1, ppl   real text, teacher-forced: every scored token is a decode row; against this engine's own dense rows
    needle           planted facts at evenly spread depths; the question is fed through the decode path, token by token
    asked            planted five-digit numbers; the question ends the prompt, as users ask it, and the answer is decoded
    step, attention  medians over decode steps of batch x context of the same texts, dense and method in turns
    bytes read       per step, by the kernels' counters; KV held: blocks in use, plus the method's own state

The cheap baseline (sink_window) stands beside every method at the same budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Sequence

import numpy as np

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.loadtest.quality import spec, text
from kvloom.loadtest.quality.decoding import WARM_STEPS, Cost, Passage, follow, prefill
from kvloom.loadtest.quality.divergence import BLOCK, Agreement, Scores
from kvloom.loadtest.quality.spec import BASELINE, DENSE, METHOD_COLUMNS, MethodSpec
from kvloom.loadtest.quality.tasks import NEEDLES, Answers, ask, haystacks, in_prompt, trials
from kvloom.loadtest.study.flags import add
from kvloom.loadtest.study.intervals import bootstrap, ratio
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, described


def timed(
    args: argparse.Namespace, passages: Sequence[Passage], found: tuple[LLM, KVOptions], exact: tuple[LLM, KVOptions]
) -> Row:
    """Decode the first texts of `--batch` in both ways in turns, `--rounds` times; the figures of `speed`.

    Raises ConfigError if a KV cache does not hold all of them at once.
    """
    texts = text.cut(passages[: args.batch], args.steps + WARM_STEPS + 1)
    costs = Cost(), Cost()
    for _ in range(args.rounds):
        for cost, (llm, kv) in zip(costs, (exact, found)):
            cost.add(follow(llm, texts, kv).cost)
            if not cost.seconds:  # prompts that are not cached are computed while others decode already
                raise ConfigError(
                    f"the KV cache of {llm.core.cache.capacity_tokens} tokens cannot hold {len(texts)} requests at once, so no "
                    "step has the whole batch; give more --kv-memory or a smaller --batch"
                )
    return speed(costs[1], costs[0])


def speed(found: Cost, exact: Cost) -> Row:
    """Figures of a method's steps beside dense ones of the same rounds (`*_dense`)."""
    row: Row = {**found.figures(), **{f"{key}_dense": value for key, value in exact.figures().items()}}
    for name, values, dense in (
        ("speed_up", found.seconds, exact.seconds),
        ("attention_up", found.attention, exact.attention),
    ):
        row[name] = float(np.median(dense) / np.median(values))
        row[f"{name}_ci"] = ratio(dense, values)
    return row


def over(scores: Scores, baseline: Scores) -> Row:
    """KL less the baseline's on the same tokens, with the interval of the difference: below zero is better."""
    difference = scores.kl - baseline.kl
    windows, positions = np.indices(difference.shape)
    blocks = (windows * 1_000_000 + positions // BLOCK).ravel()
    return {"kl_over_baseline": float(difference.mean()), "kl_over_baseline_ci": bootstrap(difference.ravel(), blocks)}


class Methods(Study):
    """Measures methods one by one, on an engine whose cache holds the texts."""

    title = "Selection methods: quality beside speed"
    columns = (
        *METHOD_COLUMNS,
        Column("KL to dense", "kl_mean", ".4f"),
        Column("less baseline's", "kl_over_baseline", "+.4f"),
        Column("KL p99", "kl_p99", ".3f"),
        Column("top-1", "top1", ".1%"),
        Column("ppl", "ppl", ".3f"),
        Column("needle", "needle", ".1%"),
        Column("asked", "asked", ".1%"),
        Column("step ms", "step_ms", ".1f"),
        Column("speed-up", "speed_up", ".2f"),
        Column("attention ms", "attention_ms", ".1f"),
        Column("of dense", "attention_up", ".2f"),
        Column("MB read", "bytes_read", ".1f", 1e-6),
        Column("positions read", "attended_share", ".1%"),
        Column("KV MB", "kv_bytes", ".1f", 1e-6),
        Column("state MB", "state_bytes", ".2f", 1e-6),
    )
    identity = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "windows", "scored",
                "haystacks", "seed")  # fmt: skip

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        spec.add_flags(made)
        add(
            made,
            ("context", 2000, "tokens in front of every measured decode row"),
            ("windows", 8, "texts for the agreement"),
            ("scored", 128, "tokens scored in each"),
            ("rounds", 6, "turns of dense and method for step times"),
            ("steps", 8, "timed steps per turn"),
        )
        add(made, ("haystacks", 8, "texts with 8 needles each; 0 for none"), kind=int)

    def __init__(self, args: argparse.Namespace) -> None:
        if args.windows < args.batch:
            few = f"--windows is {args.windows}, but steps of {args.batch} requests are timed on texts of their own"
            raise ConfigError(f"{few}; give at least as many windows as --batch")
        self.args, specs = args, spec.plan(args.methods, args.budgets)
        self.cases = spec.cases(specs)
        self.llm = llm = spec.engine_for(args, specs)
        tokens = text.real_text(llm, args.text)
        self.passages = text.passages(llm, tokens, args.context, max(args.scored, args.steps + WARM_STEPS) + 1, args.windows)
        self.agreement = Agreement(llm, text.cut(self.passages, args.scored + 1), args.batch)
        needles, numbers = (
            trials(task, llm.tokenizer, tokens, args.context, args.haystacks, args.seed) if args.haystacks else []
            for task in ("needle", "number")
        )
        self.questions = {"needle": needles, "asked": in_prompt(numbers)}
        self.prompts = [*(passage.prompt for passage in self.passages), *haystacks(needles), *haystacks(numbers)]
        self._dense: dict[str, Answers] = {}
        self._baselines: dict[int | None, Scores] = {}
        self.note = (
            f"Context {args.context}, batch {args.batch}; {args.windows} windows of text, {args.scored} tokens scored in each; "
            f"{args.haystacks} haystacks with {NEEDLES} questions of either kind. In brackets: 95% intervals, by bootstrap "
            f"over blocks of {BLOCK} tokens, Wilson's for needles. Speed-up over dense steps of the same rounds. "
            f"{described(llm)}"
        )

    def choose(self, missing: Sequence[Case]) -> Sequence[Case]:
        needed = {case.what.budget for case in missing} - {None}
        return [c for c in self.cases if c in missing or (c.what.method == BASELINE and c.what.budget in needed)]

    def preparations(self, group: Hashable) -> int:
        return len(self.prompts) + self.agreement.batches

    def measurements(self, case: Case) -> int:
        return self.agreement.batches + sum(-(-len(asked) // self.args.batch) for asked in self.questions.values()) + 1

    def prepare(self, group: Hashable, steps: Steps) -> None:
        text.warn_of_room(self.llm, sum(map(len, self.prompts)) + self.args.batch * (self.args.scored + 64))
        steps.name("computing prompts")
        prefill(self.llm, self.prompts, steps.done)
        steps.name("dense distributions")
        self.agreement.remember_dense(steps.done)

    def measure(self, case: Case, steps: Steps) -> Row:
        method: MethodSpec = case.what
        steps.name(f"{case.label}: agreement")
        scores = self.agreement.measure(method.kv, steps.done)
        row = scores.figures(self.agreement.dense)
        if method.method == BASELINE:
            self._baselines[method.budget] = scores
        elif method.budget in self._baselines:
            row |= over(scores, self._baselines[method.budget])
        for name, asked in self.questions.items():
            row |= self._ask(name, method, steps) if asked else {}
        steps.name(f"{case.label}: step time")
        row |= timed(self.args, self.passages, (self.llm, method.kv), (self.llm, MethodSpec(DENSE).kv))
        steps.done()
        return row

    def _ask(self, name: str, method: MethodSpec, steps: Steps) -> Row:
        """Accuracy of one kind of question, beside dense's."""
        asked, batch = self.questions[name], self.args.batch
        if name not in self._dense:  # a resumed run need not have measured dense
            steps.name(f"dense: {name}")
            self._dense[name] = ask(self.llm, asked, MethodSpec(DENSE).kv, batch)
        steps.name(f"{method.label}: {name}")
        dense = found = self._dense[name]
        if method.method != DENSE:
            found = ask(self.llm, asked, method.kv, batch, steps.done)
        figures = found.figures()
        changed = [a.score - b.score for a, b in zip(found.answers, dense.answers)]
        return {
            name: figures["accuracy"],
            f"{name}_ci": figures["accuracy_ci"],
            f"{name}_trials": figures["trials"],
            f"{name}_dense": dense.accuracy,
            f"{name}_over_dense": float(np.mean(changed)),
            f"{name}_over_dense_ci": bootstrap(changed, [answer.trial.haystack for answer in found.answers]),
        }


main = command("eval methods", Methods)
