"""Three hundred short questions, of the kind that a first user asks: facts, sums, opposites, terms of Python.

Made from templates and lists in this file and the topics of CPython's language reference, always the same ones in the same
order on the same Python. Nobody marks the answers: they serve to see whether two ways to hold the weights say the same.
"""

from __future__ import annotations

from pydoc_data import topics

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
