"""Long generation: what a method's own output does to it.

    kvloom eval long --methods sink_window,recycled --budgets 256 --context 2000 --generate 256 [--json FILE] [--markdown FILE]

    divergence   greedy continuations of real text, against dense ones: position of the first token that differs
    recall       facts planted in *generated* text (forced through the decode path), each asked for after it. An answer is
                 right if every token of it was the likeliest: what greedy generation would have said

Short answers to long prompts hide both: KV that was computed under a method (polluted by what it did not see), and generated
tokens that a method no longer looks at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from torch import Tensor

from kvloom.engine import LLM
from kvloom.loadtest.quality import facts, setup
from kvloom.loadtest.quality.decoding import Cost, Followed, Passage, follow, prefill
from kvloom.loadtest.quality.spec import DENSE, MethodSpec, plan
from kvloom.loadtest.study.intervals import bootstrap, wilson
from kvloom.loadtest.study.results import Column, Results, Row

FACTS = 6
"""Planted in every generated text."""
COLUMNS = (
    Column("method", "method"),
    Column("budget", "budget"),
    Column("options", "options"),
    Column("same as dense for (median tokens)", "divergence", ".0f"),
    Column("never differed", "identical", ".0%"),
    Column("recall of generated facts", "recall", ".1%"),
    Column("facts", "facts"),
    Column("step ms", "step_ms", ".1f"),
    Column("MB read", "bytes_read", ".1f", 1e-6),
    Column("positions read", "attended_share", ".1%"),
    Column("KV MB", "kv_bytes", ".1f", 1e-6),
)
IDENTITY = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "generate", "prompts", "seed")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs; all of the shorter if none does."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


@dataclass(slots=True)
class Generated:
    """A text that is forced as if generated: facts in real text, then a question and its answer for each."""

    passage: Passage
    answers: list[range] = field(default_factory=list)
    """Indices of each answer's tokens among the forced ones."""


def generated_text(llm: LLM, prompt: Sequence[int], filler: Sequence[int], random: Random) -> Generated:
    """Facts at even distances in `filler`, which becomes the forced text; then questions in another order."""

    def encode(text: str) -> list[int]:
        return llm.tokenizer.encode(text, add_special_tokens=False)

    planted = facts.words(random, FACTS)
    tokens: list[int] = []
    for i, fact in enumerate(planted):
        tokens += filler[len(filler) * i // FACTS : len(filler) * (i + 1) // FACTS]
        tokens += encode(f"\n{fact.sentence}\n")
    answers = []
    for fact in random.sample(planted, FACTS):
        tokens += encode(f"\n\n{fact.question}")
        answer = encode(f" {fact.answer}")
        answers.append(range(len(tokens), len(tokens) + len(answer)))
        tokens += [*answer, *encode(".")]
    return Generated(Passage(tuple(prompt), tuple(tokens)), answers)


class Study:
    """Measures specs one by one."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self.llm, self.args = llm, args
        windows = setup.passages(llm, setup.real_text(llm, args.text), args.context, args.generate, args.prompts)
        self.prompts = [Passage(window.prompt) for window in windows]
        random = Random(args.seed)
        # The part in front is short, so that what is asked for stands in generated text, far behind the window.
        self.texts = [
            generated_text(llm, window.prompt[: min(64, args.context)], window.prompt[64:], random) for window in windows
        ]
        self._dense: list[list[int]] | None = None

    @property
    def batches(self) -> int:
        return -(-self.args.prompts // self.args.batch)

    def row(self, spec: MethodSpec) -> Row:
        settings = {key: getattr(self.args, key) for key in ("context", "batch", "generate", "prompts", "seed")}
        method = {"method": spec.method, "budget": spec.budget, "options": dict(spec.options)}
        return {**method, **settings, **setup.about(self.llm)}

    def measure(self, spec: MethodSpec, steps: setup.Steps) -> Row:
        """Both measurements of one spec."""
        if self._dense is None:
            self._dense = self._continuations(MethodSpec(DENSE), Cost(), steps)
        cost = Cost()
        outputs = self._continuations(spec, cost, steps)
        same = [first_difference(a, b) for a, b in zip(self._dense, outputs)]
        right = self._recall(spec, steps)
        return {
            **self.row(spec),
            "divergence": float(np.median(same)),
            "divergence_ci": bootstrap(same, statistic=lambda values: float(np.median(values))),
            "identical": sum(length == self.args.generate for length in same) / len(same),
            "recall": sum(right) / len(right),
            "recall_ci": wilson(sum(right), len(right)),
            "facts": len(right),
            **cost.figures(),
        }

    def _continuations(self, spec: MethodSpec, cost: Cost, steps: setup.Steps) -> list[list[int]]:
        outputs: list[list[int]] = []
        for part in self._parts(self.prompts):
            found: Followed = follow(self.llm, part, spec.kv, free=self.args.generate)
            outputs += found.outputs
            cost.add(found.cost)
            steps.done()
        return outputs

    def _recall(self, spec: MethodSpec, steps: setup.Steps) -> list[bool]:
        right: list[bool] = []
        for first in range(0, len(self.texts), self.args.batch):
            part = self.texts[first : first + self.args.batch]
            likeliest: dict[tuple[int, int], int] = {}
            wanted = {(i, index) for i, text in enumerate(part) for answer in text.answers for index in answer}

            def observe(
                number: int,
                index: int,
                logits: Tensor,
                wanted: set[tuple[int, int]] = wanted,
                likeliest: dict[tuple[int, int], int] = likeliest,
            ) -> None:
                if (number, index) in wanted:
                    likeliest[number, index] = int(logits.argmax())

            follow(self.llm, [text.passage for text in part], spec.kv, observe=observe)
            for i, text in enumerate(part):
                right += [all(likeliest[i, j] == text.passage.forced[j] for j in answer) for answer in text.answers]
            steps.done()
        return right

    def _parts(self, passages: Sequence[Passage]) -> Iterator[Sequence[Passage]]:
        for first in range(0, len(passages), self.args.batch):
            yield passages[first : first + self.args.batch]


def run(study: Study, specs: Sequence[MethodSpec], results: Results) -> None:
    """Measure every spec that the results lack."""
    missing = [spec for spec in specs if results.find(study.row(spec)) is None]
    if not missing:
        return
    with setup.Steps(study.args.prompts + study.batches * (1 + 2 * len(missing))) as steps:
        steps.name("computing prompts")
        prefill(study.llm, [passage.prompt for passage in study.prompts], steps.done)
        for spec in missing:
            steps.name(spec.label)
            results.add(study.measure(spec, steps))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = setup.parser("long", __doc__)
    for name, default, text in (
        ("context", 1000, "tokens of prompt, and of generated text before its facts are asked for"),
        ("generate", 128, "tokens of greedy continuation"),
        ("prompts", 8, "texts"),
    ):
        parser.add_argument(f"--{name}", type=setup.count, default=default, help=f"{text} (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    specs = plan(args.methods, args.budgets)
    llm = setup.engine(args, specs)
    note = f"In brackets: 95% intervals, by bootstrap over texts and Wilson's. {setup.described(llm)}"
    results = Results(COLUMNS, IDENTITY, "Long generation", args.json, args.markdown, args.publish, note)
    if args.resume:
        results.resume()
    study = Study(llm, args)
    return setup.finish(results, lambda: run(study, specs, results))


if __name__ == "__main__":
    sys.exit(main())
