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
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from torch import Tensor

from kvloom.engine import LLM
from kvloom.loadtest.quality import facts, spec, text
from kvloom.loadtest.quality.decoding import Cost, Passage, follow, prefill
from kvloom.loadtest.quality.spec import COST_COLUMNS, DENSE, METHOD_COLUMNS, MethodSpec
from kvloom.loadtest.study.flags import add
from kvloom.loadtest.study.intervals import bootstrap, wilson
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, described

FACTS = 6
"""Planted in every generated text."""


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


class Long(Study):
    """Measures methods one by one."""

    title = "Long generation"
    columns = (
        *METHOD_COLUMNS,
        Column("same as dense for (median tokens)", "divergence", ".0f"),
        Column("never differed", "identical", ".0%"),
        Column("recall of generated facts", "recall", ".1%"),
        Column("facts", "facts"),
        *COST_COLUMNS,
    )
    identity = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "generate", "prompts", "seed")

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        spec.add_flags(made)
        add(
            made,
            ("context", 1000, "tokens of prompt, and of generated text before its facts are asked for"),
            ("generate", 128, "tokens of greedy continuation"),
            ("prompts", 8, "texts"),
        )

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, specs = args, spec.plan(args.methods, args.budgets)
        self.cases = spec.cases(specs)
        self.llm = llm = spec.engine_for(args, specs)
        windows = text.passages(llm, text.real_text(llm, args.text), args.context, args.generate, args.prompts)
        self.prompts, random = text.cut(windows, 0), Random(args.seed)
        # The part in front is short, so that what is asked for stands in generated text, far behind the window.
        self.texts = [generated_text(llm, w.prompt[: min(64, args.context)], w.prompt[64:], random) for w in windows]
        self.note = f"In brackets: 95% intervals, by bootstrap over texts and Wilson's. {described(llm)}"

    def preparations(self, group: Hashable) -> int:
        return int(self.args.prompts) + self.measurements() // 2

    def measurements(self, case: Case | None = None) -> int:
        return 2 * -(-int(self.args.prompts) // int(self.args.batch))

    def prepare(self, group: Hashable, steps: Steps) -> None:
        steps.name("computing prompts")
        prefill(self.llm, [passage.prompt for passage in self.prompts], steps.done)
        self._dense = self._continuations(MethodSpec(DENSE), Cost(), steps)

    def measure(self, case: Case, steps: Steps) -> Row:
        cost = Cost()
        outputs = self._continuations(case.what, cost, steps)
        same = [first_difference(a, b) for a, b in zip(self._dense, outputs)]
        right = self._recall(case.what, steps)
        return {
            "divergence": float(np.median(same)),
            "divergence_ci": bootstrap(same, statistic=lambda values: float(np.median(values))),
            "identical": sum(length == self.args.generate for length in same) / len(same),
            "recall": sum(right) / len(right),
            "recall_ci": wilson(sum(right), len(right)),
            "facts": len(right),
            **cost.figures(),
        }

    def _continuations(self, method: MethodSpec, cost: Cost, steps: Steps) -> list[list[int]]:
        outputs: list[list[int]] = []
        for first in range(0, len(self.prompts), self.args.batch):
            found = follow(self.llm, self.prompts[first : first + self.args.batch], method.kv, free=self.args.generate)
            outputs += found.outputs
            cost.add(found.cost)
            steps.done()
        return outputs

    def _recall(self, method: MethodSpec, steps: Steps) -> list[bool]:
        right: list[bool] = []
        for first in range(0, len(self.texts), self.args.batch):
            part = self.texts[first : first + self.args.batch]
            likeliest: list[dict[int, int]] = [dict.fromkeys(i for a in one.answers for i in a) for one in part]  # type: ignore[misc]

            def observe(number: int, index: int, logits: Tensor, likeliest: list[dict[int, int]] = likeliest) -> None:
                if index in likeliest[number]:
                    likeliest[number][index] = int(logits.argmax())

            follow(self.llm, [one.passage for one in part], method.kv, observe=observe)
            for one, said in zip(part, likeliest):
                right += [all(said[i] == one.passage.forced[i] for i in answer) for answer in one.answers]
            steps.done()
        return right


main = command("eval long", Long)
