"""How far each method's distributions are from dense ones on real text, teacher-forced through the decode path.

    kvloom eval agreement --methods sink_window,recycled --budgets 128,512 --contexts 2000 [--json FILE] [--markdown FILE]

The quick half of `kvloom eval methods`: no needles, and step times as they fell, not in turns with dense ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvloom.engine import LLM
from kvloom.loadtest.quality import setup
from kvloom.loadtest.quality.decoding import prefill
from kvloom.loadtest.quality.divergence import BLOCK, Agreement
from kvloom.loadtest.quality.methods import COLUMNS
from kvloom.loadtest.quality.spec import MethodSpec, parse_numbers, plan
from kvloom.loadtest.study.results import Column, Results, Row

IDENTITY = ("model", "dtype", "weights", "method", "budget", "options", "context", "batch", "windows", "scored")


def measure(llm: LLM, args: argparse.Namespace, specs: Sequence[MethodSpec], results: Results) -> None:
    """Measure every context and spec that the results lack."""
    text = setup.real_text(llm, args.text)
    contexts = parse_numbers(args.contexts, "--contexts")
    batches = -(-args.windows // args.batch)
    with setup.Steps(len(contexts) * (args.windows + batches * (1 + len(specs)))) as steps:
        for context in contexts:
            rows = [_row(llm, args, spec, context) for spec in specs]
            missing = [(spec, row) for spec, row in zip(specs, rows) if results.find(row) is None]
            if not missing:
                steps.skip(args.windows + batches * (1 + len(specs)))
                continue
            passages = setup.passages(llm, text, context, args.scored + 1, args.windows)
            steps.name(f"context {context}: prompts, dense")
            prefill(llm, [passage.prompt for passage in passages], steps.done)
            agreement = Agreement(llm, passages, args.batch)
            agreement.remember_dense(steps.done)
            for spec, row in missing:
                steps.name(f"context {context}: {spec.label}")
                scores = agreement.measure(spec.kv, steps.done)
                dense = {f"{key}_dense": value for key, value in agreement.dense.cost.figures().items()}
                results.add({**row, **scores.figures(agreement.dense), **scores.cost.figures(), **dense})


def _row(llm: LLM, args: argparse.Namespace, spec: MethodSpec, context: int) -> Row:
    settings = {"context": context, "batch": args.batch, "windows": args.windows, "scored": args.scored}
    return {"method": spec.method, "budget": spec.budget, "options": dict(spec.options), **settings, **setup.about(llm)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = setup.parser("agreement", __doc__)
    parser.add_argument("--contexts", default="2000", help="tokens in front of the scored ones (default: %(default)s)")
    parser.add_argument("--windows", type=setup.count, default=8, help="texts (default: %(default)s)")
    parser.add_argument("--scored", type=setup.count, default=128, help="tokens scored in each (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    specs = plan(args.methods, args.budgets)
    llm = setup.engine(args, specs)
    note = f"In brackets: 95% intervals by bootstrap over blocks of {BLOCK} tokens. {setup.described(llm)}"
    columns = (*COLUMNS[:3], Column("context", "context"), Column("tokens", "n"), *COLUMNS[3:])
    results = Results(columns, IDENTITY, "Agreement with dense decoding", args.json, args.markdown, args.publish, note)
    if args.resume:
        results.resume()
    return setup.finish(results, lambda: measure(llm, args, specs, results))


if __name__ == "__main__":
    sys.exit(main())
