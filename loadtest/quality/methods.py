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
import sys
from collections.abc import Sequence

import numpy as np

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import setup
from kvloom.loadtest.quality.answers import Answers, ask
from kvloom.loadtest.quality.decoding import WARM_STEPS, Cost, Passage, follow, prefill
from kvloom.loadtest.quality.divergence import BLOCK, Agreement, Scores
from kvloom.loadtest.quality.spec import BASELINE, DENSE, MethodSpec, plan
from kvloom.loadtest.quality.tasks import NEEDLES, haystacks, in_prompt, trials
from kvloom.loadtest.study.intervals import bootstrap, ratio
from kvloom.loadtest.study.results import Column, Results, Row

COLUMNS = (
    Column("method", "method"),
    Column("budget", "budget"),
    Column("options", "options"),
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
IDENTITY = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "windows", "scored", "haystacks",
            "seed")  # fmt: skip


def timed(llm: LLM, passages: Sequence[Passage], spec: MethodSpec, rounds: int, steps: int) -> tuple[Cost, Cost]:
    """Decode the same passages with the method and densely, in turns. Returns (method's, dense's) costs.

    Raises ConfigError if the KV cache does not hold all passages at once.
    """
    cut = [Passage(passage.prompt, passage.forced[: steps + WARM_STEPS + 1]) for passage in passages]
    found, exact = Cost(), Cost()
    for _ in range(rounds):
        exact.add(follow(llm, cut, MethodSpec(DENSE).kv).cost)
        found.add(follow(llm, cut, spec.kv).cost)
        if not exact.seconds or not found.seconds:
            raise ConfigError(
                f"the KV cache of {llm.core.cache.capacity_tokens} tokens cannot hold {len(cut)} requests at once, so no "
                "step has the whole batch; give more --kv-memory or a smaller --batch"
            )
    return found, exact


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


class Study:
    """Measures specs one by one, on an engine whose cache holds the texts."""

    def __init__(self, llm: LLM, args: argparse.Namespace, results: Results) -> None:
        self.llm, self.args, self.results = llm, args, results
        forced = max(args.scored, args.steps + WARM_STEPS) + 1
        text = setup.real_text(llm, args.text)
        self.passages = setup.passages(llm, text, args.context, forced, args.windows)
        texts = [Passage(passage.prompt, passage.forced[: args.scored + 1]) for passage in self.passages]
        self.agreement = Agreement(llm, texts, args.batch)
        self.trials = trials("needle", llm.tokenizer, text, args.context, args.haystacks, args.seed) if args.haystacks else []
        numbers = trials("number", llm.tokenizer, text, args.context, args.haystacks, args.seed) if args.haystacks else []
        self.questions = {"needle": self.trials, "asked": in_prompt(numbers)}
        self.prompts = [*(passage.prompt for passage in self.passages), *haystacks(self.trials), *haystacks(numbers)]
        self._dense: dict[str, Answers] = {}
        self._baselines: dict[int | None, Scores] = {}

    @property
    def preparations(self) -> int:
        return len(self.prompts) + self.agreement.batches

    @property
    def measurements(self) -> int:
        """Steps of the progress bar per spec."""
        return self.agreement.batches + sum(-(-len(asked) // self.args.batch) for asked in self.questions.values()) + 1

    def prepare(self, steps: setup.Steps) -> None:
        """Compute what every spec needs: prompts, and dense distributions."""
        setup.warn_of_room(self.llm, sum(map(len, self.prompts)) + self.args.batch * (self.args.scored + 64))
        steps.name("computing prompts")
        prefill(self.llm, self.prompts, steps.done)
        steps.name("dense distributions")
        self.agreement.remember_dense(steps.done)

    def row(self, spec: MethodSpec) -> Row:
        """The row's settings, before anything is measured."""
        keys = ("context", "batch", "windows", "scored", "haystacks", "seed")
        settings = {key: getattr(self.args, key) for key in keys}
        about = setup.about(self.llm)
        return {"method": spec.method, "budget": spec.budget, "options": dict(spec.options), **settings, **about}

    def measure(self, spec: MethodSpec, steps: setup.Steps) -> Row:
        """Everything about one spec."""
        args, row = self.args, self.row(spec)
        steps.name(f"{spec.label}: agreement")
        scores = self.agreement.measure(spec.kv, steps.done)
        row |= scores.figures(self.agreement.dense)
        if spec.method == BASELINE:
            self._baselines[spec.budget] = scores
        elif spec.budget in self._baselines:
            row |= over(scores, self._baselines[spec.budget])
        if self.trials:
            for name in self.questions:
                row |= self._questions(name, spec, steps)
        steps.name(f"{spec.label}: step time")
        row |= speed(*timed(self.llm, self.passages[: args.batch], spec, args.rounds, args.steps))
        steps.done()
        return row

    def _questions(self, name: str, spec: MethodSpec, steps: setup.Steps) -> Row:
        """Accuracy of one kind of question, beside dense's."""
        asked, batch = self.questions[name], self.args.batch
        if name not in self._dense:  # a resumed run need not have measured dense
            steps.name(f"dense: {name}")
            self._dense[name] = ask(self.llm, asked, MethodSpec(DENSE).kv, batch)
        steps.name(f"{spec.label}: {name}")
        dense = found = self._dense[name]
        if spec.method != DENSE:
            found = ask(self.llm, asked, spec.kv, batch, steps.done)
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


def run(study: Study, specs: Sequence[MethodSpec]) -> None:
    """Measure every spec that the results lack."""
    missing = [spec for spec in specs if study.results.find(study.row(spec)) is None]
    needed = {spec.budget for spec in missing if spec.budget is not None}
    todo = [spec for spec in specs if spec in missing or (spec.method == BASELINE and spec.budget in needed)]
    if not missing:
        return
    with setup.Steps(study.preparations + len(todo) * study.measurements) as steps:
        study.prepare(steps)
        for spec in todo:
            study.results.add(study.measure(spec, steps))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = setup.parser("methods", __doc__)
    for name, default, text in (
        ("context", 2000, "tokens in front of every measured decode row"),
        ("windows", 8, "texts for the agreement"),
        ("scored", 128, "tokens scored in each"),
        ("rounds", 6, "turns of dense and method for step times"),
        ("steps", 8, "timed steps per turn"),
    ):
        parser.add_argument(f"--{name}", type=setup.count, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--haystacks", type=int, default=8, help="texts with 8 needles each; 0 for none (default: %(default)s)")
    return parser.parse_args(argv)


def note(llm: LLM, args: argparse.Namespace) -> str:
    return (
        f"Context {args.context}, batch {args.batch}; {args.windows} windows of text, {args.scored} tokens scored in each; "
        f"{args.haystacks} haystacks with {NEEDLES} questions of either kind. In brackets: 95% intervals, by bootstrap over "
        f"blocks of {BLOCK} tokens, Wilson's for needles. Speed-up over dense steps of the same rounds. {setup.described(llm)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    if args.windows < args.batch:
        raise ConfigError(f"--windows is {args.windows}, but steps of {args.batch} requests are timed on texts of their own; "
                          "give at least as many windows as --batch")  # fmt: skip
    specs = plan(args.methods, args.budgets)
    llm = setup.engine(args, specs)
    results = Results(
        COLUMNS, IDENTITY, "Selection methods: quality beside speed", args.json, args.markdown, args.publish, note(llm, args)
    )
    if args.resume:
        results.resume()
    study = Study(llm, args, results)
    return setup.finish(results, lambda: run(study, specs))


if __name__ == "__main__":
    sys.exit(main())
