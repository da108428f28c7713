"""Real text without a network: the language reference that every CPython carries in `pydoc_data.topics`.

Owns how that text is cleaned (sections by topic, every paragraph once, prose unwrapped) and how prompts are cut from it.
Promises that the same seed gives the same tokens on every machine with the same Python and the same tokenizer. The text is that
of the running Python, and patch releases change it, too (3.11.2 and 3.11.7 differ in a tenth of the lines):
`TextSource.fingerprint` tells texts and tokenizers apart, so runs whose fingerprints agree drew from the same tokens.

A `Reader` never repeats itself before the whole text is used (some 85,000 tokens of `smollm2`'s on Python 3.11), so that two
prompts share only what a workload makes them share.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

from kvloom.engine.errors import ConfigError
from kvloom.engine.model.gguf_file import read_metadata
from kvloom.engine.startup.catalog import resolve
from kvloom.engine.text import Tokenizer

_BLANK = re.compile(r"\n[ \t]*\n")
_UNDERLINE = re.compile(r"[*=~^\-\"]{3,}")
_SHORTEST = 200  # characters; below it a section is a stub that only refers to others
_RUN = (12, 28)  # tokens; see Reader


def reference_text() -> str:
    """Half a million characters of prose, tables and code as Python has them, repetitions and all, in order of topics."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text. Raises ValueError if it is too short."""
    if len(tokens) < length * count:
        raise ValueError(f"{count} windows of {length} tokens need {length * count} tokens; the text has {len(tokens)}")
    stride = len(tokens) // count
    return [tokens[i * stride : i * stride + length] for i in range(count)]


class Section(NamedTuple):
    """A headed piece of the reference."""

    title: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join((self.title, *self.paragraphs))


@functools.cache
def sections() -> tuple[Section, ...]:
    """The reference, cleaned, in order of topics: topics repeat each other, here every paragraph stands once."""
    seen: set[str] = set()
    found: list[Section] = []
    for name in sorted(topics.topics):
        found += (section for section in _split(topics.topics[name], seen) if len(section.text) >= _SHORTEST)
    return tuple(found)


def _split(text: str, seen: set[str]) -> Iterator[Section]:
    """Sections of one topic, without the paragraphs in `seen`, to which theirs are added."""
    title = ""
    paragraphs: list[str] = []
    for raw in _BLANK.split(text):
        lines = raw.strip("\n").split("\n")
        if len(lines) == 2 and _UNDERLINE.fullmatch(lines[1].strip()):
            yield Section(title, tuple(paragraphs))
            title, paragraphs = lines[0], []
        elif (paragraph := _unwrapped(lines)) and paragraph not in seen:
            seen.add(paragraph)
            paragraphs.append(paragraph)
    yield Section(title, tuple(paragraphs))


def _unwrapped(lines: Sequence[str]) -> str:
    """Prose on one line; code, tables and lists (what is indented, or starts with a bullet) as they are."""
    prose = not any(line.startswith((" ", "*", "+", "|")) for line in lines)
    return " ".join(lines).strip() if prose else "\n".join(line.rstrip() for line in lines).rstrip()


class TextSource:
    """A tokenizer and the text to make prompts of. Immutable, and safe to share."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str] | None = None) -> None:
        """`texts`: documents to cut prompts from; the default is Python's reference.

        Raises ConfigError if there is hardly any text.
        """
        self.tokenizer = tokenizer
        kept = [
            text
            for text in (texts if texts is not None else [s.text for s in sections()])
            if tokenizer.special_in(text) is None
        ]
        self._documents = [self.encode(text) for text in kept]
        self.size = sum(map(len, self._documents))
        if self.size < 1000:
            raise ConfigError(f"the corpus has {self.size} tokens; allowed: 1000 or more, without the model's special tokens")
        self.fingerprint = hashlib.sha256(repr(self._documents).encode()).hexdigest()[:12]

    @classmethod
    def load(cls, tokenizer: str = "smollm2") -> TextSource:
        """`tokenizer`: a model by name, folder or .gguf file (no weights are read). Raises ModelError, ModelNotFoundError."""
        path: Path = resolve(tokenizer).path
        return cls(Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(read_metadata(path)))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @functools.cached_property
    def ordinary_ids(self) -> tuple[int, ...]:
        """Token ids that are plain text: no special tokens, no padding of the vocabulary, no parts of a character."""
        tokenizer = self.tokenizer
        return tuple(i for i in range(self.vocab_size) if _is_text(tokenizer.token_bytes(i)) and not tokenizer.is_special(i))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: nothing is added around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def reader(self, seed: str) -> Reader:
        """A reader at a place of the text that depends on the seed."""
        return Reader(self, seed)

    def tokens(self, count: int, seed: str) -> list[int]:
        """Exactly `count` tokens of text from a place that depends on the seed."""
        return self.reader(seed).tokens(count)

    def documents(self, count: int, tokens: int, seed: str) -> list[str]:
        """`count` texts of about `tokens` tokens each; none repeats another while the corpus lasts."""
        reader = self.reader(seed)
        return [reader.text(tokens) for _ in range(count)]


def _is_text(part: bytes) -> bool:
    try:
        return bool(part.decode())
    except UnicodeDecodeError:
        return False


class Reader:
    """Endless text in a seeded order, each token once per round.

    The first round reads whole sections in random order. Later rounds shuffle runs of 12 to 28 tokens: text with the statistics
    of the real one, in which no long stretch of an earlier round comes again to be found by a cache.
    """

    def __init__(self, source: TextSource, seed: str) -> None:
        self._source = source
        self._random = random.Random(f"text {seed}")
        self._documents = list(source._documents)
        self._buffer: list[int] = []
        self._next = 0
        self._refill: Callable[[], list[int]] = self._first_round

    def tokens(self, count: int) -> list[int]:
        """The next `count` tokens."""
        while len(self._buffer) - self._next < count:
            self._buffer = self._buffer[self._next :] + self._refill()
            self._next = 0
        self._next += count
        return self._buffer[self._next - count : self._next]

    def text(self, count: int) -> str:
        """The next `count` tokens as text of whole words, so a token or two less when it is encoded again."""
        text = self._source.decode(self.tokens(count)).strip("\ufffd")
        words = text.split(" ")
        return " ".join(words[1:-1] if len(words) > 8 else words).strip()

    def _first_round(self) -> list[int]:
        self._refill = self._later_round
        self._random.shuffle(self._documents)
        gap = self._source.encode("\n\n")
        return [token for document in self._documents for token in (*document, *gap)]

    def _later_round(self) -> list[int]:
        runs: list[list[int]] = []
        for document in self._documents:
            start = 0
            while start < len(document):
                end = start + self._random.randint(*_RUN)
                runs.append(document[start:end])
                start = end
        self._random.shuffle(runs)
        return [token for run in runs for token in run]
