"""Facts that are hidden in long texts: sentences with a gap, and what may fill it.

A 135M model reads a planted sentence back almost without fault if the question is the sentence's own beginning and no other
sentence of the text begins like it; it fails at instructions, and mixes up facts that differ in one word. So the facts of one
text are of different kinds, and each question is the sentence up to its gap.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

WORDS: dict[str, tuple[str, ...]] = {
    "The name of Martin's dog is {}.": ("Biscuit", "Shadow", "Rocket", "Pepper", "Ginger", "Bandit", "Rusty", "Daisy"),
    "The captain's ship is called the {}.": ("Albatross", "Victoria", "Neptune", "Meridian", "Phoenix", "Aurora", "Swallow"),
    "Laura's favourite fruit is the {}.": ("mango", "cherry", "papaya", "banana", "grape", "peach", "apricot", "melon"),
    "The treasure was buried under the {}.": ("bridge", "lighthouse", "chapel", "fountain", "windmill", "stable", "tower"),
    "The professor was born in {}.": ("Lisbon", "Vienna", "Toronto", "Cairo", "Prague", "Sydney", "Dublin", "Athens"),
    "The password of the old library is {}.": ("falcon", "marble", "thunder", "velvet", "copper", "lantern", "saffron"),
    "The train to the coast leaves at {}.": ("noon", "dawn", "midnight", "seven", "nine", "eleven", "four", "three"),
    "The violin was made by {}.": ("Rossi", "Keller", "Dubois", "Novak", "Silva", "Jensen", "Moreau", "Tanaka"),
    "My grandmother used to work as a {}.": ("nurse", "baker", "pilot", "tailor", "teacher", "gardener", "lawyer", "singer"),
    "The winner of the chess game was {}.": ("Oscar", "Helen", "Victor", "Irene", "Simon", "Clara", "Hugo", "Nadia"),
    "The secret sauce contains a pinch of {}.": ("cinnamon", "pepper", "ginger", "paprika", "vanilla", "mustard", "basil"),
    "All the doors of the hotel are painted {}.": ("green", "yellow", "purple", "orange", "blue", "red", "white", "black"),
    "Every Tuesday the twins practise {}.": ("judo", "tennis", "fencing", "ballet", "rowing", "archery", "chess", "hockey"),
    "For his birthday Peter wants a {}.": ("telescope", "guitar", "bicycle", "kite", "drum", "camera", "puppy", "compass"),
    "Inside the wooden box there was a {}.": ("necklace", "letter", "key", "map", "diamond", "coin", "feather", "clock"),
    "The king's horse died in the month of {}.": ("January", "March", "April", "June", "August", "October", "November"),
}
NUMBERS = (
    "The secret passkey of the vault is {}.",
    "The serial number of the telescope is {}.",
    "The phone extension of Doctor Miller is {}.",
    "The licence plate of the blue van ends in {}.",
    "The population of the village of Elmwood is {}.",
    "The height of the volcano in feet is {}.",
    "The number of books in the monastery is {}.",
    "The locker of the goalkeeper opens with {}.",
)
NAMES = ("Martin", "Laura", "Oscar", "Helen", "Victor", "Irene", "Simon", "Clara", "Hugo", "Nadia", "Peter", "Alice")
SPELLS = ("thunder", "velvet", "saffron", "lantern", "mercury", "compass", "granite", "orchid", "falcon", "marble")
DOGS = WORDS["The name of Martin's dog is {}."]


class Fact(NamedTuple):
    """A sentence that is planted, and the question that asks for its end."""

    sentence: str
    question: str
    answer: str


def _fact(template: str, value: str) -> Fact:
    return Fact(template.format(value), template[: template.index(" {}")], value)


def words(random: Random, count: int) -> list[Fact]:
    """Facts of different kinds, each with a word for an answer. Raises ValueError if there are not so many kinds."""
    return [_fact(template, random.choice(WORDS[template])) for template in random.sample(sorted(WORDS), count)]


def numbers(random: Random, count: int) -> list[Fact]:
    """Facts of different kinds, each with a number of five digits."""
    return [_fact(template, str(random.randrange(10_000, 100_000))) for template in random.sample(NUMBERS, count)]


def keys(random: Random, count: int) -> list[Fact]:
    """Facts of one kind that differ in a name and in the answer: the wrong ones are distractors."""
    chosen = zip(random.sample(NAMES, count), random.sample(DOGS, count))
    return [_fact(f"The name of {name}'s dog is {{}}.", dog) for name, dog in chosen]
