"""The corpus: clean, deterministic, exact in length, and without repetition before it is used up."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.engine.errors import ConfigError
from kvloom.engine.text import Tokenizer
from kvloom.loadtest.quality import text as quality_text
from kvloom.loadtest.workloads.corpus import TextSource, reference_text, sections, windows


@pytest.fixture(scope="module")
def text(tiny: Path) -> TextSource:
    return TextSource(Tokenizer.from_folder(tiny))


def test_sections_hold_every_paragraph_once() -> None:
    paragraphs = [paragraph for section in sections() for paragraph in section.paragraphs]
    assert len(set(paragraphs)) == len(paragraphs) > 500
    assert all(len(section.text) >= 200 for section in sections())
    assert sum(len(section.text) for section in sections()) > 250_000
    assert not any(set(line) == {"*"} for section in sections() for line in section.text.split("\n") if len(line) > 2)


def test_prose_is_unwrapped_and_code_is_not() -> None:
    whole = "\n\n".join(section.text for section in sections())
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in whole
    assert "if __debug__:\n       if not expression: raise AssertionError" in whole


def test_same_seed_same_text(tiny: Path, text: TextSource) -> None:
    again = TextSource(Tokenizer.from_folder(tiny))
    assert again.fingerprint == text.fingerprint
    assert again.tokens(300, "a") == text.tokens(300, "a") != text.tokens(300, "b")


def test_another_text_has_another_fingerprint(text: TextSource) -> None:
    words = ["one two three four five six seven eight nine ten " * 40, "other"]
    first, second = TextSource(text.tokenizer, words), TextSource(text.tokenizer, [*words, "more"])
    assert len({text.fingerprint, first.fingerprint, second.fingerprint}) == 3


@pytest.mark.parametrize("count", [0, 1, 777])
def test_lengths_are_exact(text: TextSource, count: int) -> None:
    assert len(text.tokens(count, "a")) == count


def test_a_reader_goes_on_where_it_stopped(text: TextSource) -> None:
    reader = text.reader("a")
    assert reader.tokens(100) + reader.tokens(57) == text.tokens(157, "a")


def test_text_is_new_until_the_corpus_is_used_up_and_then_in_short_runs(text: TextSource) -> None:
    small = TextSource(text.tokenizer, [section.text for section in sections()[:12]])
    reader = small.reader("a")
    first, later = reader.tokens(small.size), reader.tokens(small.size)
    run = 64  # later rounds shuffle runs of at most 28 tokens
    seen = {tuple(first[i : i + run]) for i in range(len(first) - run)}
    assert not any(tuple(later[i : i + run]) in seen for i in range(len(later) - run))
    assert set(later) <= set(first) | set(small.encode("\n\n"))


def test_documents_are_whole_words_of_about_the_length(text: TextSource) -> None:
    documents = text.documents(6, 200, "a")
    assert len(set(documents)) == 6
    for document in documents:
        assert 150 <= len(text.encode(document)) <= 205
        assert "\ufffd" not in document and document == document.strip()


def test_special_tokens_are_neither_drawn_nor_in_the_text(text: TextSource) -> None:
    assert not any(text.tokenizer.is_special(i) for i in text.ordinary_ids)
    kept = TextSource(text.tokenizer, ["<|im_end|> never " * 20, "ordinary words " * 200])
    assert "never" not in kept.decode(kept.tokens(kept.size * 2, "a"))


def test_hardly_any_text_is_refused(text: TextSource) -> None:
    with pytest.raises(ConfigError, match=r"corpus has .* tokens; allowed: 1000 or more"):
        TextSource(text.tokenizer, ["too short"])


def test_windows_and_reference_text_are_where_quality_looks_for_them() -> None:
    assert quality_text.reference_text is reference_text and quality_text.windows is windows
    assert windows(list(range(100)), 10, 4) == [list(range(i, i + 10)) for i in (0, 25, 50, 75)]
    with pytest.raises(ValueError, match="need 200 tokens"):
        windows(list(range(100)), 50, 4)
    assert len(reference_text()) > 300_000
