"""Prompts for approximate reuse: the same documents in another order, a new one among them, another question.

    donor     HEADER, the documents in one order, a question
    use       HEADER, the same documents in another order with one new document, a question about one of the old ones

A document is real text with a sentence planted in it, and ends in a blank line. Prompts are put together from tokens, so that a
document has the same tokens wherever it stands. Facts of one prompt are of different kinds (`facts`), as a small model mixes up
facts of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import facts
from kvloom.loadtest.quality.facts import Fact
from kvloom.loadtest.quality.text import read
from kvloom.loadtest.workloads.corpus import Reader, TextSource

HEADER = "Here are some documents, and the beginning of a sentence from one of them.\n\n"
"""What every prompt begins with: the first tokens of a sequence draw attention whatever they say, and are nobody's document."""

Tokens = tuple[int, ...]


class Use(NamedTuple):
    """A prompt that others' KV is reused for."""

    prompt: Tokens
    answer: str
    """What a right answer contains."""


class Case(NamedTuple):
    """Documents, the prompt that had them first, and prompts that have them again."""

    donor: Tokens
    documents: tuple[Tokens, ...]
    uses: tuple[Use, ...]


class Maker:
    """Cases of one size; the same seed and number give the same one."""

    def __init__(self, llm: LLM, documents: int, length: int, *, text: Path | None = None, seed: int = 0) -> None:
        """documents: in a donor; length: tokens of each; text: a file to take them from instead of the Python reference.

        Raises ConfigError if there are not so many kinds of facts, or a document has no room for one.
        """
        if not 1 <= documents <= len(facts.WORDS):
            raise ConfigError(
                f"--documents is {documents}; allowed: 1 to {len(facts.WORDS)}, as each has a fact of another kind"
            )
        self._documents, self._length, self._seed = documents, length, seed
        self._source = TextSource(llm.tokenizer, None if text is None else [read(text)])
        self.fingerprint = self._source.fingerprint
        longest = max(len(self._source.encode(f"\n{template} {{}}\n\n")) for template in (*facts.WORDS, *facts.NUMBERS))
        if length < 2 * longest:
            raise ConfigError(f"--document-len is {length}; allowed: {2 * longest} or more, to hold a fact and text around it")

    def case(self, number: int, uses: int = 1) -> Case:
        """uses: at most `len(facts.NUMBERS)`, one per new document. Raises ConfigError for more."""
        if uses > len(facts.NUMBERS):
            raise ConfigError(f"{uses} uses of the same documents are asked for; allowed: up to {len(facts.NUMBERS)}")
        name = f"kvshare {self._seed} {number}"
        random, reader = Random(name), self._source.reader(name)
        known = facts.words(random, self._documents)
        documents = [self._document(fact, reader, random) for fact in known]
        new = [self._document(fact, reader, random) for fact in facts.numbers(random, uses)]
        donor = self._prompt(documents, random.choice(known))
        return Case(donor, tuple(documents), tuple(self._use(documents, known, one, random) for one in new))

    def _use(self, documents: Sequence[Tokens], known: Sequence[Fact], new: Tokens, random: Random) -> Use:
        order = _another_order(documents, random)
        order.insert(random.randrange(len(order) + 1), new)
        asked = random.choice(known)
        return Use(self._prompt(order, asked), asked.answer)

    def _document(self, fact: Fact, reader: Reader, random: Random) -> Tokens:
        """Exactly `length` tokens."""
        sentence, end = self._source.encode(f"\n{fact.sentence}\n"), self._source.encode("\n\n")
        body = reader.tokens(self._length - len(sentence) - len(end))
        cut = random.randrange(len(body) // 8, len(body) - len(body) // 8)
        return (*body[:cut], *sentence, *body[cut:], *end)

    def _prompt(self, documents: Sequence[Tokens], asked: Fact) -> Tokens:
        middle = [token for document in documents for token in document]
        return (*self._source.encode(HEADER), *middle, *self._source.encode(asked.question))


def _another_order(documents: Sequence[Tokens], random: Random) -> list[Tokens]:
    """Shuffled; a rotation if the shuffle changed nothing."""
    order = random.sample(documents, len(documents))
    return [*order[1:], order[0]] if order == list(documents) else order


def fitting(llm: LLM, length: int, answer: int, most: int = 11) -> int:
    """Documents of that length that a model's context has room for beside a new one: at most `most`. Raises ConfigError."""
    room = llm.core.limits.max_model_len - answer - 128  # header and question
    found = min(most, room // length - 1)
    if found < 1:
        raise ConfigError(f"{llm.model.name} has no room for two documents of {length} tokens; give a smaller --document-len")
    return found


def check_length(llm: LLM, case: Case, answer: int) -> None:
    """Raises ConfigError if prompts and answers exceed what the model takes."""
    longest, needed = llm.core.limits.max_model_len, max(len(use.prompt) for use in case.uses) + answer
    if needed > longest:
        raise ConfigError(
            f"a prompt and its answer have {needed} tokens, {llm.model.name} takes {longest}; give fewer --documents or a "
            "smaller --document-len"
        )
