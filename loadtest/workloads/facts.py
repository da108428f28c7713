"""Facts that a prompt states and then asks for, so that an answer can be checked.

"The access code of the silver falcon is 48213." is planted in real text, and the prompt ends in the beginning of the answer,
"The access code of the silver falcon is": a small model completes far better than it answers. It also mixes up facts of one
kind ("access code"), so facts that come together are of different kinds. Plain text does as well as the model's chat format
and works with every endpoint.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from kvloom.engine.errors import ConfigError

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
