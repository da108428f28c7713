"""How often a weight mode changes what a model says: greedy answers to three hundred short questions, token for token.

    kvloom eval answers [MODEL] [--modes bf16,auto] [--tokens 16] [--markdown FILE] [--json FILE]

Every mode is compared with the same weights in bf16 and with fp32. An answer differs if any of its tokens does; where it first
differs is told beside that, because one early difference makes another answer and a late one another wording.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.figures import add_publish, publish
from kvloom.loadtest.quality.questions import questions
from kvloom.loadtest.quality.setup import console, count
from kvloom.loadtest.study.intervals import Interval, wilson
from kvloom.loadtest.study.machine import describe

Tokens = tuple[int, ...]
EXACT, PLAIN = "fp32", "bf16"
MODES = ("bf16", "auto", "int8", "int4")
COLUMNS = ("weights", "against", "answers that differ", "95%", "at the first token", "first difference, median token")


class Changes(NamedTuple):
    """Of answers to the same questions, how many differ and where."""

    answers: int
    places: tuple[int, ...]
    """Of those that differ, the index of the first token that does, ascending."""

    @property
    def share(self) -> float:
        return len(self.places) / self.answers

    @property
    def interval(self) -> Interval | None:
        """95% interval of the share; None for a single answer."""
        return wilson(len(self.places), self.answers)

    @property
    def at_once(self) -> float:
        """Share of answers that differ in their first token."""
        return self.places.count(0) / self.answers


def changes(wanted: Sequence[Tokens], found: Sequence[Tokens]) -> Changes:
    """Compare answers in order. Raises ValueError if there are none, or not as many of one as of the other."""
    if not wanted or len(wanted) != len(found):
        raise ValueError(f"{len(wanted)} answers against {len(found)}; give as many of each, and at least one")
    return Changes(len(wanted), tuple(sorted(_first_difference(a, b) for a, b in zip(wanted, found) if a != b)))


def _first_difference(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def ask(llm: LLM, asked: Sequence[str], tokens: int) -> list[Tokens]:
    """Greedy answers of at most `tokens` tokens, each question a conversation of its own."""
    talks = [[{"role": "user", "content": question}] for question in asked]
    return [tuple(done.tokens) for done in llm.chat(talks, SamplingParams(max_tokens=tokens, temperature=0.0))]


def answers_by_mode(model: str, modes: Sequence[str], tokens: int, asked: Sequence[str]) -> Iterator[tuple[str, list[Tokens]]]:
    """Answers in fp32 first, then in every mode; one engine at a time."""
    for mode in (EXACT, *modes):
        console.print(f"asking {len(asked)} questions: {mode}")
        settings: dict[str, Any] = {"dtype": "fp32", "weights": "bf16"} if mode == EXACT else {"weights": mode}
        llm = LLM(model, kv_memory="512MiB", max_num_seqs=64, **settings)
        yield mode, ask(llm, asked, tokens)
        del llm
        gc.collect()


def rows(answers: dict[str, list[Tokens]]) -> list[dict[str, Any]]:
    """One per mode and reference: bf16 against fp32, the others against both."""
    pairs = [(mode, base) for mode in answers for base in (PLAIN, EXACT) if base in answers and mode not in (base, EXACT)]
    return [{"weights": mode, "against": base, **_figures(changes(answers[base], answers[mode]))} for mode, base in pairs]


def _figures(found: Changes) -> dict[str, Any]:
    middle = statistics.median_low(found.places) + 1 if found.places else None
    interval = None if found.interval is None else list(found.interval)
    return {"differ": found.share, "interval": interval, "at_once": found.at_once, "median": middle}


def cells_of(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's cells as they are shown, a tuple per row."""
    made: list[tuple[str, ...]] = []
    for row in found:
        interval = "-" if row["interval"] is None else " to ".join(f"{end:.1%}" for end in row["interval"])
        cells = (row["weights"], row["against"], f"{row['differ']:.1%}", interval, f"{row['at_once']:.1%}",
                 str(row["median"] or "-"))  # fmt: skip
        made.append(cells)
    return made


def table(found: Sequence[dict[str, Any]], note: str) -> str:
    """Markdown."""
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *cells_of(found))]
    return "\n".join([head, "|" + "---|" * len(COLUMNS), *lines, "", note])


def main(argv: Sequence[str] | None = None, measure: Callable[..., Iterator[Any]] = answers_by_mode) -> int:
    """Measure and print; returns the exit code."""
    args = _parser().parse_args(argv)
    modes = [mode.strip() for mode in args.modes.split(",")]
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"--modes names {unknown[0]!r}; allowed: {', '.join(MODES)}, separated by commas")
    asked = questions()[:: args.every]
    answers = dict(measure(args.model, dict.fromkeys([PLAIN, *modes]), args.tokens, asked))
    found = rows(answers)
    note = f"{Path(args.model).name}, {len(asked)} questions, {args.tokens} tokens at most. Measured {describe()}."
    text = table(found, note)
    console.print(text, soft_wrap=True, markup=False)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.publish:
        publish(args.publish, COLUMNS, cells_of(found), note)
    if args.json:
        args.json.write_text(
            json.dumps({"note": note, "rows": found, "questions": asked, "answers": answers}), encoding="utf-8"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvloom eval answers", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--modes", default="bf16,auto", help="weight modes, separated by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=16, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--every", type=count, default=1, help="ask only every n-th question (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
    add_publish(parser)
    parser.add_argument("--json", type=Path, help="write figures, questions and answers into this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
