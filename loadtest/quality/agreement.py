"""How far each method's distributions are from dense ones on real text, teacher-forced through the decode path.

    kvloom eval agreement --methods sink_window,recycled --budgets 128,512 --contexts 2000 [--json FILE] [--markdown FILE]

The quick half of `kvloom eval methods`: no needles, and step times as they fell, not in turns with dense ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable

from kvloom.loadtest.quality import spec, text
from kvloom.loadtest.quality.decoding import prefill
from kvloom.loadtest.quality.divergence import BLOCK, Agreement
from kvloom.loadtest.quality.methods import Methods
from kvloom.loadtest.study.flags import add, numbers
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, described


class MethodAgreement(Study):
    """Measures methods at every context."""

    title = "Agreement with dense decoding"
    columns = (*Methods.columns[:3], Column("context", "context"), Column("tokens", "n"), *Methods.columns[3:])
    identity = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "windows", "scored")

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        spec.add_flags(made)
        add(made, ("contexts", "2000", "tokens in front of the scored ones"), kind=str)
        add(made, ("windows", 8, "texts"), ("scored", 128, "tokens scored in each"))

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, specs, contexts = args, spec.plan(args.methods, args.budgets), numbers(args.contexts, "--contexts")
        self.cases = [
            Case(one, f"context {context}: {one.label}", {**one.row, "context": context}, context)
            for context in contexts
            for one in specs
        ]
        self.llm = spec.engine_for(args, specs)
        self.text = text.real_text(self.llm, args.text)
        self.note = f"In brackets: 95% intervals by bootstrap over blocks of {BLOCK} tokens. {described(self.llm)}"

    def preparations(self, group: Hashable) -> int:
        return int(self.args.windows) + self.measurements()

    def measurements(self, case: Case | None = None) -> int:
        return -(-int(self.args.windows) // int(self.args.batch))

    def prepare(self, group: Hashable, steps: Steps) -> None:
        assert isinstance(group, int)
        steps.name(f"context {group}: prompts, dense")
        passages = text.passages(self.llm, self.text, group, self.args.scored + 1, self.args.windows)
        prefill(self.llm, [passage.prompt for passage in passages], steps.done)
        self.agreement = Agreement(self.llm, passages, self.args.batch)
        self.agreement.remember_dense(steps.done)

    def measure(self, case: Case, steps: Steps) -> Row:
        scores, dense = self.agreement.measure(case.what.kv, steps.done), self.agreement.dense
        exact = {f"{key}_dense": value for key, value in dense.cost.figures().items()}
        return {**scores.figures(dense), **scores.cost.figures(), **exact}


main = command("eval agreement", MethodAgreement)
