"""Long-context tasks in the manner of RULER (Hsieh et al. 2024), in the words that a small model can follow.

    needle       single: facts of different kinds, a question for each                      answer: a word
    number       the same with five digits
    multi_key    facts that differ in a name only: all but one are distractors               RULER: multi-key
    multi_value  one key with three values: all are asked for                                RULER: multi-value
    tracking     VAR A = 12345, VAR B = VAR A, VAR C = VAR B: the value at the end            RULER: variable tracking
    documents    numbered documents in random order, each about one town: a question over all of them

A haystack (the prompt) serves several questions, so its KV is computed once and shared; the question is *forced* through the
decode path token by token and the answer generated after it (the protocol of TidalDecode, section 4.1): a method that
changes only decode rows reads the question with sparse rows, and so the first token of the answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, NamedTuple

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.text import Tokenizer
from kvloom.loadtest.quality import facts
from kvloom.loadtest.quality.decoding import Cost, Passage, follow
from kvloom.loadtest.quality.facts import Fact
from kvloom.loadtest.study.intervals import bootstrap, wilson

NEEDLES = 8
"""Facts in a haystack, and so questions to it: as many depths."""
TOWNS = ("Oakridge", "Silverton", "Marlow", "Fernhill", "Ashford", "Brookside", "Westbury", "Kingsley")
MAYORS = (
    "Elena Rossi",
    "Jonas Keller",
    "Maria Silva",
    "Peter Novak",
    "Anna Jensen",
    "Louis Moreau",
    "Kenji Tanaka",
    "Ruth Adler",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One question to one haystack."""

    task: str
    haystack: int
    """Number of the haystack: trials of one share their prompt."""
    prompt: tuple[int, ...]
    question: tuple[int, ...]
    """Fed through the decode path."""
    answers: tuple[str, ...]
    depth: float
    """Where the answer stands in the prompt: 0 is its beginning, 1 its end (the mean for several)."""
    room: int
    """Tokens to generate."""

    def score(self, text: str) -> float:
        """Share of the answers that the text contains, whatever their case: RULER's string match."""
        return sum(answer.casefold() in text.casefold() for answer in self.answers) / len(self.answers)


class Filler(NamedTuple):
    """Real text to hide facts in."""

    tokens: Sequence[int]
    """Of one haystack, as many as the haystack is long."""
    encode: Callable[[str], list[int]]


def _spread(filler: Filler, length: int, sentences: Sequence[str], random: Random) -> tuple[tuple[int, ...], list[float]]:
    """Plant sentences at evenly spread depths, each somewhere in its own slice. Returns `length` tokens, and the depths."""
    planted = [filler.encode(f"\n{sentence}\n") for sentence in sentences]
    room = length - sum(map(len, planted))
    if room < len(planted):
        raise ConfigError(f"a context of {length} tokens has no room for {len(planted)} facts; make it longer")
    found: list[int] = []
    depths = []
    for i, tokens in enumerate(planted):
        begin, end = room * i // len(planted), room * (i + 1) // len(planted)
        cut = random.randrange(begin + (end - begin) // 8, end - (end - begin) // 8 + 1)
        found += filler.tokens[begin:cut]
        depths.append(len(found) / length)
        found += tokens
        found += filler.tokens[cut:end]
    return tuple(found), depths


def _asked(
    task: str, draw: Callable[[Random], list[Fact]], number: int, filler: Filler, length: int, random: Random
) -> list[Trial]:
    """A haystack with the facts that `draw` gives, and a question for each."""
    planted = draw(random)
    prompt, depths = _spread(filler, length, [fact.sentence for fact in planted], random)
    return [
        Trial(task, number, prompt, tuple(filler.encode(f"\n\n{fact.question}")), (fact.answer,), depth, 8)
        for fact, depth in zip(planted, depths)
    ]


def _multi_value(number: int, filler: Filler, length: int, random: Random) -> list[Trial]:
    values = random.sample(facts.SPELLS, 3)
    sentence = "One of the wizard's magic spells is {}."
    prompt, depths = _spread(filler, length, [sentence.format(value) for value in values], random)
    question = filler.encode("\n\nHere are all the wizard's magic spells.\nOne of the wizard's magic spells is")
    return [Trial("multi_value", number, prompt, tuple(question), tuple(values), sum(depths) / 3, 40)]


def _tracking(number: int, filler: Filler, length: int, random: Random) -> list[Trial]:
    names = random.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 6)
    values = random.sample(range(10_000, 100_000), 2)
    sentences, trials = [], []
    for value, (a, b, c) in zip(values, (names[:3], names[3:])):
        sentences += [f"VAR {a} = {value}", f"VAR {b} = VAR {a}", f"VAR {c} = VAR {b}"]
        trials.append((c, b, a, value))
    prompt, depths = _spread(filler, length, sentences, random)
    return [
        Trial("tracking", number, prompt, tuple(filler.encode(f"\n\nVAR {c} = VAR {b} = VAR {a} =")), (str(value),), depth, 8)
        for (c, b, a, value), depth in zip(trials, (depths[0], depths[3]))
    ]


def _documents(number: int, filler: Filler, length: int, random: Random) -> list[Trial]:
    pairs = list(zip(random.sample(TOWNS, NEEDLES), random.sample(MAYORS, NEEDLES)))
    cut = length // len(pairs)
    prompt: list[int] = []
    trials = []
    for i, (town, mayor) in enumerate(pairs):
        head = filler.encode(f"\n\nDocument {i + 1}. The town of {town}\n")
        fact = filler.encode(f"\nIn {town} the mayor is called {mayor}.\n")
        if cut <= len(head) + len(fact):
            raise ConfigError(f"a context of {length} tokens has no room for {len(pairs)} documents; make it longer")
        body = filler.tokens[i * cut : (i + 1) * cut - len(head) - len(fact)]
        at = random.randrange(len(body) + 1)
        depth = (len(prompt) + len(head) + at) / length
        prompt += [*head, *body[:at], *fact, *body[at:]]
        trials.append((filler.encode(f"\n\nQuestion over all documents.\nIn {town} the mayor is called"), mayor, depth))
    return [Trial("documents", number, tuple(prompt), tuple(q), (mayor,), depth, 8) for q, mayor, depth in trials]


TASKS: dict[str, Callable[[int, Filler, int, Random], list[Trial]]] = {
    "needle": partial(_asked, "needle", lambda random: facts.words(random, NEEDLES)),
    "number": partial(_asked, "number", lambda random: facts.numbers(random, NEEDLES)),
    "multi_key": partial(_asked, "multi_key", lambda random: facts.keys(random, 4)),
    "multi_value": _multi_value,
    "tracking": _tracking,
    "documents": _documents,
}
"""(number of the haystack, filler, tokens, randomness) -> its questions."""


def trials(task: str, tokenizer: Tokenizer, text: Sequence[int], length: int, haystacks: int, seed: int) -> list[Trial]:
    """The questions of `haystacks` haystacks of `length` tokens each, cut out of `text` at different places.

    Raises ConfigError if there is no such task, or too little text.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; allowed: {', '.join(TASKS)}")
    if len(text) < length:
        raise ConfigError(f"a context of {length} tokens needs that much text; there are {len(text)} tokens")
    stride = (len(text) - length) // max(1, haystacks - 1) if haystacks > 1 else 0
    found = []
    for number in range(haystacks):
        filler = Filler(
            text[number * stride : number * stride + length], lambda t: tokenizer.encode(t, add_special_tokens=False)
        )
        found += TASKS[task](number, filler, length, Random(f"{task} {length} {number} {seed}"))
    return found


def in_prompt(found: Iterable[Trial]) -> list[Trial]:
    """The same questions as users ask them: at the end of the prompt, so that only the answer is decoded."""
    return [replace(trial, prompt=trial.prompt + trial.question, question=()) for trial in found]


def haystacks(found: Iterable[Trial]) -> list[tuple[int, ...]]:
    """Their prompts, each once, in order."""
    return list(dict.fromkeys(trial.prompt for trial in found))


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to one question."""

    trial: Trial
    text: str
    score: float


class Answers(NamedTuple):
    """What was said to all of them, and what the decode steps cost."""

    answers: list[Answer]
    cost: Cost

    @property
    def accuracy(self) -> float:
        return sum(answer.score for answer in self.answers) / len(self.answers)

    def figures(self) -> dict[str, Any]:
        """`accuracy` with its 95% interval and number of trials."""
        scores = [answer.score for answer in self.answers]
        whole = all(score in (0.0, 1.0) for score in scores)
        blocks = [answer.trial.haystack for answer in self.answers]
        interval = wilson(sum(scores), len(scores)) if whole else bootstrap(scores, blocks)
        return {"accuracy": self.accuracy, "accuracy_ci": interval, "trials": len(scores)}


def ask(llm: LLM, trials: Sequence[Trial], kv: KVOptions, batch: int, done: Callable[[], None] = lambda: None) -> Answers:
    """Ask `batch` questions at once, in order: those of one haystack share its KV. `done` is called after every batch.

    Raises InvalidRequestError if a question cannot be served so.
    """
    found, cost = [], Cost()
    for first in range(0, len(trials), batch):
        part = trials[first : first + batch]
        passages = [Passage(trial.prompt, trial.question) for trial in part]
        followed = follow(llm, passages, kv, free=max(trial.room for trial in part))
        for trial, tokens in zip(part, followed.outputs):
            begin = len(trial.question)
            text = llm.tokenizer.decode(tokens[begin : begin + trial.room])
            found.append(Answer(trial, text, trial.score(text)))
        cost.add(followed.cost)
        done()
    return Answers(found, cost)
