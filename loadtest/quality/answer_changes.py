"""How often a weight mode changes what a model says: greedy answers to three hundred short questions, token for token.

    kvloom eval answers [MODEL] [--modes bf16,auto] [--tokens 16] [--markdown FILE] [--json FILE]

Every mode is compared with the same weights in bf16 and with fp32. An answer differs if any of its tokens does; where it first
differs is told beside that, because one early difference makes another answer and a late one another wording.

The questions are of the kind that a first user asks, made from templates and lists in this file and the topics of CPython's
language reference: always the same ones in the same order on the same Python. Nobody marks the answers.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality.long import first_difference
from kvloom.loadtest.study.flags import add, add_model, add_outputs, parser
from kvloom.loadtest.study.intervals import Interval, wilson
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, console

_COUNTRIES = (
    "France Germany Italy Spain Portugal Austria Hungary Poland Greece Ireland Norway Sweden Denmark Finland Iceland Turkey "
    "Egypt Kenya Morocco Nigeria Ethiopia Ghana Japan China India Thailand Vietnam Indonesia Malaysia Nepal Pakistan Iran Iraq "
    "Australia Canada Mexico Brazil Argentina Chile Peru Colombia Cuba Jamaica Ukraine Russia Belgium Switzerland Romania "
    "Bulgaria Croatia"
)
_WORDS = (
    "hot big fast early happy strong light open rich young high dry clean hard full thick brave quiet sharp deep long near "
    "old up left begin win buy push remember arrive accept create increase expand attack above inside always friend summer"
)
_THINGS = (
    "a volcano|a planet|a vowel|an atom|gravity|photosynthesis|a prime number|a mammal|an island|a glacier|a sonnet|a budget|"
    "a virus|an orchestra|a desert|an algorithm|a metaphor|evolution|inflation|a republic|a comet|a fossil|a triangle|a verb|"
    "an engine|a magnet|a library|a thermometer|a harbour|an eclipse|a database|a compiler|a browser|a keyboard|a satellite|"
    "a battery|a telescope|a bridge|a peninsula|a proverb"
)
_FACTS = (
    "Who wrote Hamlet?|Who painted the Mona Lisa?|How many days are in a week?|How many legs does a spider have?|"
    "What is the largest ocean?|What is the largest planet in our solar system?|What is the chemical symbol for gold?|"
    "What is the chemical formula of water?|At what temperature does water boil?|What colour is the sky on a clear day?|"
    "Which animal is known as the king of the jungle?|How many continents are there?|What is the longest river in Africa?|"
    "What is the highest mountain in the world?|Who discovered penicillin?|Who was the first man on the Moon?|"
    "In which year did World War II end?|What language is spoken in Brazil?|What is the currency of Japan?|"
    "How many minutes are in an hour?|What do bees make?|What is the freezing point of water in Celsius?|"
    "Which gas do plants absorb?|What is the fastest land animal?|How many sides does a hexagon have?|"
    "What is the plural of mouse?|What is the plural of child?|What is the past tense of go?|What is the past tense of write?|"
    "Which planet is called the Red Planet?|What is the main ingredient of bread?|What is the square root of 81?|"
    "How do you say hello in Spanish?|How do you say thank you in French?|What is the first letter of the alphabet?|"
    "What is the opposite of north?|Which month comes after July?|Which day comes before Friday?|"
    "Name three colours of the rainbow.|Name a fruit that is yellow."
)
_TOPICS = 60


def questions() -> list[str]:
    """All of them: 300."""
    asked = [f"What is the capital of {country}?" for country in _COUNTRIES.split()]
    asked += [f"What is {a} {sign} {b}?" for a, b in _pairs() for sign in ("+", "-", "*")]
    asked += [f"What is the opposite of '{word}'?" for word in _WORDS.split()]
    asked += [f"What is {thing}?" for thing in _THINGS.split("|")]
    asked += _FACTS.split("|")
    asked += [f"In Python, what does '{name}' mean?" for name in sorted(topics.topics)[:_TOPICS]]
    return asked


def _pairs() -> list[tuple[int, int]]:
    """Numbers to add, subtract and multiply: small ones, as a child would."""
    return [(3 * i % 17 + 4, 5 * i % 13 + 2) for i in range(23)]


Tokens = tuple[int, ...]
EXACT, PLAIN = "fp32", "bf16"
MODES = ("bf16", "auto", "int8", "int4")
COLUMNS = (
    Column("weights", "weights"),
    Column("against", "against"),
    Column("answers that differ", "differ", ".1%"),
    Column("95%", "interval", lambda ends: " to ".join(f"{end:.1%}" for end in ends), always=True),
    Column("at the first token", "at_once", ".1%"),
    Column("first difference, median token", "median", always=True),
)


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
    return Changes(len(wanted), tuple(sorted(first_difference(a, b) for a, b in zip(wanted, found) if a != b)))


def ask(llm: LLM, asked: Sequence[str], tokens: int) -> list[Tokens]:
    """Greedy answers of at most `tokens` tokens, each question a conversation of its own."""
    talks = [[{"role": "user", "content": question}] for question in asked]
    return [tuple(done.tokens) for done in llm.chat(talks, SamplingParams(max_tokens=tokens, temperature=0.0))]


def answers_by_mode(model: str, modes: Sequence[str], tokens: int, asked: Sequence[str]) -> Iterator[tuple[str, list[Tokens]]]:
    """Answers in fp32 first, then in every mode; one engine at a time."""
    for mode in (EXACT, *modes):
        console.print(f"asking {len(asked)} questions: {mode}")
        settings: dict[str, Any] = {"dtype": "fp32", "weights": "bf16"} if mode == EXACT else {"weights": mode}
        llm = LLM(model, device="cpu", kv_memory="512MiB", max_num_seqs=64, **settings)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    made = parser("eval answers", __doc__)
    add_model(made)
    add(made, ("modes", "bf16,auto", "weight modes, separated by commas"), kind=str)
    add(made, ("tokens", 16, "most tokens of an answer"), ("every", 1, "ask only every n-th question"))
    add_outputs(made, rows="", table="also write the table into this file")
    made.add_argument("--json", type=Path, help="write figures, questions and answers into this file")
    args = made.parse_args(argv)
    modes = [mode.strip() for mode in args.modes.split(",")]
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"--modes names {unknown[0]!r}; allowed: {', '.join(MODES)}, separated by commas")
    asked = questions()[:: args.every]
    answers = dict(answers_by_mode(args.model, list(dict.fromkeys([PLAIN, *modes])), args.tokens, asked))
    found = rows(answers)
    note = f"{Path(args.model).name}, {len(asked)} questions, {args.tokens} tokens at most. Measured {describe()}."
    if args.json:
        content = {"note": note, "rows": found, "questions": asked, "answers": answers}
        args.json.write_text(json.dumps(content), encoding="utf-8")
    return Results(COLUMNS, (), "", None, args.markdown, args.publish, note, found).conclude()
