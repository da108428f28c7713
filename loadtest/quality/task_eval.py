"""Long-context tasks in the manner of RULER, by method, length and depth.

    kvloom eval tasks --tasks needle,documents --lengths 1000,2000,4000,7000 --methods sink_window,token_select --budgets 256 \\
        --json FILE --markdown FILE --out FOLDER

Writes a heat map of length x depth per task into --out. The default model does needle and number almost without fault up to
7,000 tokens, and most of multi_key and documents; multi_value and tracking are hard for it (see the dense rows).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import setup
from kvloom.loadtest.quality.answers import ask
from kvloom.loadtest.quality.decoding import prefill
from kvloom.loadtest.quality.heatmap import DEPTHS, Grid, draw
from kvloom.loadtest.quality.spec import MethodSpec, parse_numbers, plan
from kvloom.loadtest.quality.tasks import TASKS, haystacks, trials
from kvloom.loadtest.study.flags import need
from kvloom.loadtest.study.results import Column, Results, Row

COLUMNS = (
    Column("task", "task"),
    Column("context", "context"),
    Column("method", "method"),
    Column("budget", "budget"),
    Column("options", "options"),
    Column("accuracy", "accuracy", ".1%"),
    Column("trials", "trials"),
    Column("step ms", "step_ms", ".1f"),
    Column("MB read", "bytes_read", ".1f", 1e-6),
    Column("positions read", "attended_share", ".1%"),
    Column("KV MB", "kv_bytes", ".1f", 1e-6),
)
IDENTITY = ("model", "dtype", "weights", "task", "method", "budget", "options", "context", "batch", "haystacks", "seed")


def measure(llm: LLM, args: argparse.Namespace, specs: Sequence[MethodSpec], results: Results) -> None:
    """Measure every task, length and spec that the results lack."""
    text = setup.real_text(llm, args.text)
    lengths = parse_numbers(args.lengths, "--lengths")
    with setup.Steps(len(args.tasks) * len(lengths) * len(specs)) as steps:
        for task in args.tasks:
            for length in lengths:
                questions = trials(task, llm.tokenizer, text, length, args.haystacks, args.seed)
                missing = [spec for spec in specs if results.find(_row(llm, args, spec, task, length)) is None]
                steps.skip(len(specs) - len(missing))
                if missing:
                    steps.name(f"{task} {length}: computing prompts")
                    prefill(llm, haystacks(questions))
                for spec in missing:
                    steps.name(f"{task} {length}: {spec.label}")
                    found = ask(llm, questions, spec.kv, args.batch)
                    depths = [[answer.trial.depth, answer.score] for answer in found.answers]
                    row = _row(llm, args, spec, task, length) | found.figures() | found.cost.figures()
                    results.add({**row, "label": spec.label, "scores": depths})
                    steps.done()


def _row(llm: LLM, args: argparse.Namespace, spec: MethodSpec, task: str, length: int) -> Row:
    settings = {"context": length, "batch": args.batch, "haystacks": args.haystacks, "seed": args.seed}
    method = {"method": spec.method, "budget": spec.budget, "options": dict(spec.options)}
    return {"task": task, **method, **settings, **setup.about(llm)}


def maps(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A heat map per task, a panel per method. Returns what was written."""
    written = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        lengths = sorted({row["context"] for row in mine})
        grids: dict[str, Grid] = {}
        for row in mine:
            grid = grids.setdefault(row["label"], Grid(lengths, DEPTHS))
            for depth, score in row["scores"]:
                grid.add(row["context"], depth, score)
        written.append(folder / f"{task}.png")
        draw(written[-1], f"{task}: share of right answers", grids)
    return written


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = setup.parser("tasks", __doc__)
    default = "needle,number,multi_key,documents"
    parser.add_argument("--tasks", default=default, help=f"of {', '.join(TASKS)} (default: %(default)s)")
    parser.add_argument("--lengths", default="1000,2000,4000,7000", help="tokens of haystack (default: %(default)s)")
    parser.add_argument("--haystacks", type=setup.count, default=4, help="per task and length (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tasks"), help="folder for heat maps (default: %(default)s)")
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    if unknown := [task for task in args.tasks if task not in TASKS]:
        raise ConfigError(f"--tasks names {', '.join(unknown)}; allowed: {', '.join(TASKS)}")
    need("matplotlib")
    specs = plan(args.methods, args.budgets)
    llm = setup.engine(args, specs)
    note = (
        f"In brackets: 95% intervals (Wilson's; by bootstrap over haystacks where answers are shares). {setup.described(llm)}"
    )
    results = Results(COLUMNS, IDENTITY, "Long-context tasks", args.json, args.markdown, args.publish, note)
    if args.resume:
        results.resume()
    code = setup.finish(results, lambda: measure(llm, args, specs, results))
    for path in maps(args.out, results.rows):
        setup.console.print(f"written: {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
