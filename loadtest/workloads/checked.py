"""Workloads whose answers are checked: a fact in a long text (needle), documents in another order with another question (rag).

Facts that a prompt states and then asks for, so that an answer can be checked.

"The access code of the silver falcon is 48213." is planted in real text, and the prompt ends in the beginning of the answer,
"The access code of the silver falcon is": a small model completes far better than it answers. It also mixes up facts of one
kind ("access code"), so facts that come together are of different kinds. Plain text does as well as the model's chat format
and works with every endpoint.

rag: the same documents come again in another order with another question, so that only non-prefix reuse can win.

Each tenant has a pool of documents, part of it common to all tenants. A pool is divided into sets of as many documents as a
prompt holds; requests go through tenants, then sets, then start again. Every document states a fact of its own and the question
asks for one, so answers are checked: reuse that hurts shows.

With --no-shuffle a set always has the same order and a prefix cache wins all but the question: the control.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from kvloom.engine.bounds import bounded
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Options, require, workload
from kvloom.loadtest.workloads.corpus import Reader, TextSource

_KINDS = (
    "access code", "serial number", "phone extension", "room number", "population", "locker number", "height in feet",
    "invoice number", "weight in grams", "catalogue number", "price in dollars", "page count", "membership number",
    "distance in miles", "ticket number", "seating capacity",
)  # fmt: skip
_ADJECTIVES = (
    "amber bitter brave bright broken calm copper crimson curious distant eager early famous frozen gentle golden green happy "
    "hidden hollow honest humble ivory jolly lonely lucky marble mellow misty narrow noble orange patient polite purple quiet "
    "rapid royal rusty scarlet secret silent silver simple sleepy steady sunny velvet"
)
_NOUNS = (
    "anchor arrow badger beacon bridge candle canyon castle cedar comet compass cottage desert dragon eagle engine falcon "
    "feather forest fountain garden glacier hammer harbor island jacket kettle ladder lantern lemon lion meadow mirror "
    "mountain otter palace pepper piano pirate planet rabbit river rocket saddle tiger tower turtle valley violin whale"
)
_BREAK = re.compile(r"(?<=\. )|(?<=\n)")
_NAMES = tuple(f"{adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split())


class Fact(NamedTuple):
    """A number that belongs to a named thing."""

    kind: str
    name: str
    value: str

    @property
    def sentence(self) -> str:
        return f"{self.opening} {self.value}."

    @property
    def question(self) -> str:
        return f"What is the {self.kind} of the {self.name}?"

    @property
    def opening(self) -> str:
        """How the answer begins."""
        return f"The {self.kind} of the {self.name} is"


def facts(count: int, rng: random.Random) -> list[Fact]:
    """Facts of which no two have a name or a value in common. Raises ConfigError for more than there are names."""
    if count > len(_NAMES):
        raise ConfigError(
            f"{count} different facts are needed; there are names for {len(_NAMES)}; use fewer documents or tenants"
        )
    names = rng.sample(_NAMES, count)
    values = rng.sample(range(10_000, 100_000), count)
    first = rng.randrange(len(_KINDS))
    return [Fact(_KINDS[(first + i) % len(_KINDS)], name, str(value)) for i, (name, value) in enumerate(zip(names, values))]


def plant(fact: Fact, text: str, depth: float) -> str:
    """The text with the fact as a paragraph of its own, at the end of a sentence or line near `depth` (0 start, 1 end)."""
    ends = [0, *(match.start() for match in _BREAK.finditer(text)), len(text)]
    place = min(ends, key=lambda end: abs(end - depth * len(text)))
    return "\n\n".join(part for part in (text[:place].rstrip(), fact.sentence, text[place:].strip("\n")) if part)


def ask(fact: Fact, context: str) -> str:
    """A prompt whose completion begins with the fact's value."""
    return f"{context}\n\nQuestion: {fact.question}\nAnswer: {fact.opening}"


_SHORTEST = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleOptions(Options):
    """Requests go through the grid, lengths first, and start again at its end with other text and another fact."""

    lengths: str = "1024,2048,4096"
    """Tokens of a prompt, about; several lengths with commas between them."""
    depths: int = bounded(5, 1, 101)
    """Depths of the fact, spread evenly from the start of the text to its end."""
    output_len: int = bounded(16, 1, LONGEST)
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if not all(_SHORTEST <= length <= LONGEST for length in self.grid_lengths):
            raise ConfigError(f"lengths is {self.lengths!r}; allowed: each from {_SHORTEST} to {LONGEST}")

    @property
    def grid_lengths(self) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in self.lengths.split(","))
        except ValueError:
            raise ConfigError(
                f"lengths is {self.lengths!r}; allowed: whole numbers with commas between, as 1024,2048"
            ) from None

    @property
    def grid_depths(self) -> tuple[float, ...]:
        """0 to 1; the middle if there is only one."""
        last = self.depths - 1
        return tuple(i / last for i in range(self.depths)) if last else (0.5,)


@workload("needle", NeedleOptions, "a fact in a long text and a question about it; answers are checked")
def needle(options: NeedleOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"needle {seed}")
    grid = [(length, depth) for depth in options.grid_depths for length in options.grid_lengths]
    jobs = []
    for index in range(count):
        length, depth = grid[index % len(grid)]
        fact = facts(1, rng)[0]
        # Another order of the text's sections per request: a needle wants real text all through, new or not.
        haystack = text.reader(f"needle {seed} {index}").text(max(length - _overhead(fact, text), 1))
        prompt = ask(fact, plant(fact, haystack, depth))
        label = f"{length} tokens, depth {depth:.0%}"
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, label=label, expect=fact.value))
    return jobs


def _overhead(fact: Fact, text: TextSource) -> int:
    """Tokens of a prompt that are not haystack."""
    return len(text.encode(ask(fact, fact.sentence))) + 2  # the paragraph breaks around the fact


@dataclass(frozen=True, slots=True, kw_only=True)
class RagOptions(Options):
    """A prompt is about docs_per_prompt * docs_len tokens and a question."""

    tenants: int = bounded(2, 1, 1000)
    """Tenants, named tenant1, tenant2, ..."""
    documents: int = 32
    """Documents of a tenant; what is left after dividing them by docs_per_prompt is not used."""
    docs_per_prompt: int = bounded(4, 1, 64)
    """Documents in a prompt."""
    docs_len: int = bounded(256, 48, LONGEST)
    """Tokens of a document, about."""
    common_share: float = bounded(0.5, 0, 1)
    """Share of each tenant's documents that all tenants have, 0 to 1."""
    output_len: int = bounded(16, 1, LONGEST)
    """Tokens of an answer."""
    shuffle: bool = True
    """Another order of documents each time; switched off, a set of documents always has the same order."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        require(self, self.docs_per_prompt, 2048, "documents")


class Document(NamedTuple):
    """A text that states a fact."""

    text: str
    fact: Fact


@workload(
    "rag",
    RagOptions,
    "the same documents in another order with another question: only non-prefix reuse can win; answers are checked",
)
def rag(options: RagOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"rag {seed}")
    sets = _sets(options, text, seed, rng)
    jobs = []
    for index in range(count):
        tenant, visit = index % options.tenants, index // options.tenants
        round_, number = divmod(visit, len(sets[tenant]))
        documents = sets[tenant][number]
        asked = documents[(round_ + number) % len(documents)].fact
        ordered = _order(documents, round_, rng) if options.shuffle else documents
        prompt = ask(asked, "\n\n".join(d.text for d in ordered))
        jobs.append(
            Job(
                prompt=prompt,
                output_tokens=options.output_len,
                tenant=f"tenant{tenant + 1}",
                label="documents seen before" if round_ else "new documents",
                expect=asked.value,
            )
        )
    return jobs


def _sets(options: RagOptions, text: TextSource, seed: int, rng: random.Random) -> list[list[list[Document]]]:
    """Per tenant, its sets of documents; common documents lie in another set, among others, for each tenant."""
    common = round(options.common_share * options.documents)
    own = options.documents - common
    known = iter(facts(common + own * options.tenants, rng))
    reader = text.reader(f"rag {seed}")
    everyones = [_document(next(known), reader, options, text, rng) for _ in range(common)]
    tenants = []
    for _ in range(options.tenants):
        pool = everyones + [_document(next(known), reader, options, text, rng) for _ in range(own)]
        rng.shuffle(pool)
        size = options.docs_per_prompt
        tenants.append([pool[i : i + size] for i in range(0, len(pool) - size + 1, size)])
    return tenants


def _document(fact: Fact, reader: Reader, options: RagOptions, text: TextSource, rng: random.Random) -> Document:
    body = reader.text(max(options.docs_len - len(text.encode(fact.sentence)) - 2, 1))  # 2: the breaks around the fact
    return Document(plant(fact, body, rng.random()), fact)


def _order(documents: list[Document], round_: int, rng: random.Random) -> list[Document]:
    """Another document first in each round until all have been: what comes first decides what a prefix cache finds."""
    first = round_ % len(documents)
    rest = documents[:first] + documents[first + 1 :]
    rng.shuffle(rest)
    return [documents[first], *rest]
