"""Incremental detokenizer: deltas add up to the whole decoding, ended at the first stop string, and hold no half character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.text import IncrementalDetokenizer, Tokenizer
from kvloom.engine.text.reader import TokenReader
from kvloom.engine.text.stops import StopMatcher

WORDS = st.text(alphabet="ab", min_size=1, max_size=4)


def first_stop(text: str, stops: list[str], free: int = 0) -> tuple[int, str] | None:
    """Where the first stop string that completes after `free` characters ends, and which (the longest). Plainly."""
    for end in range(free + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8), stops=st.lists(WORDS, max_size=3),
       include=st.booleans(), free=st.integers(0, 4))  # fmt: skip
def test_matcher_equals_plain_search(pieces: list[str], stops: list[str], include: bool, free: int) -> None:
    matcher = StopMatcher(stops, include)
    out, stopped = "", None
    for i, piece in enumerate(pieces):
        text, stopped = matcher.push(piece, armed=i >= free)
        out += text
        if stopped is not None:
            break
    else:
        out += matcher.finish()
    whole = "".join(pieces)
    expected = first_stop(whole, stops, len("".join(pieces[:free])))
    if expected is None:
        assert (out, stopped) == (whole, None)
    else:
        end, stop = expected
        assert (out, stopped) == (whole[: end if include else end - len(stop)], stop)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8), stops=st.lists(WORDS, min_size=1, max_size=3))
def test_matcher_holds_back_no_more_than_needed(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, out = StopMatcher(stops), "", ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        seen, out = seen + piece, out + text
        if stopped is not None:
            return
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        waiting = max((n for n in range(len(seen) + 1) if seen[len(seen) - n :] in beginnings), default=0)
        assert out == seen[: len(seen) - waiting]


def run(tokenizer: Tokenizer, ids: list[int], **options: object) -> tuple[list[str], str | None]:
    """Deltas (the last from finish) and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    deltas: list[str] = []
    for token in ids:
        text, stopped = detokenizer.push(token)
        deltas.append(text)
        if stopped is not None:
            assert detokenizer.push(token) == ("", stopped) and detokenizer.finish() == ""
            return deltas, stopped
    return [*deltas, detokenizer.finish()], None


def check(tokenizer: Tokenizer, ids: list[int], stops: list[str], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip)
    deltas, stopped = run(tokenizer, ids, stop=stops, skip_special_tokens=skip)
    expected = first_stop(whole, stops)
    if expected is None:
        assert ("".join(deltas), stopped) == (whole, None)
    else:
        assert "".join(deltas) == whole[: expected[0] - len(expected[1])]
        at_the_end = whole.endswith("\ufffd") and expected[0] == len(whole)  # half a character that `finish` gives up
        assert stopped == expected[1] or (stopped is None and at_the_end)


NO_TOKEN = "\x04\x06\x13\x14\x16\x1d"  # bytes the built-in vocabulary lacks, as it does F1 and F2 (from U+40000 on)
TRICKY = st.sampled_from(["\ufffd", " ", "\n\n", "</s>", "日", "the", "e"])
STOPS = st.lists(TRICKY | st.text(min_size=1, max_size=3), max_size=3)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=25), stops=STOPS, skip=st.booleans())
def test_random_ids_byte_level(smollm: Tokenizer, ids: list[int], stops: list[str], skip: bool) -> None:
    check(smollm, ids, stops, skip)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), stops=STOPS, skip=st.booleans())
def test_random_ids_sentencepiece(spm: Tokenizer, data: st.DataObject, stops: list[str], skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, spm.vocab_size - 1), max_size=25))
    check(spm, ids, stops, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs",), exclude_characters=NO_TOKEN), max_size=40))
def test_no_delta_holds_half_a_character(smollm: Tokenizer, text: str) -> None:
    """Of valid text, no U+FFFD comes that is not in it, and every delta is certain when it comes."""
    deltas, _ = run(smollm, smollm.encode(text), skip_special_tokens=False)
    assert "".join(deltas) == text
    assert deltas[-1] == ""


def test_a_real_replacement_character_comes_out_at_once(smollm: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(smollm)
    text = "".join(detokenizer.push(token).text for token in smollm.encode("a\ufffd"))
    assert text == "a\ufffd"


def test_half_a_character_is_replaced_at_the_end(smollm: Tokenizer) -> None:
    ids = smollm.encode("🎉")
    assert len(ids) > 1
    deltas, _ = run(smollm, ids[:-1])
    assert "".join(deltas[:-1]) == "" and deltas[-1] == "\ufffd"


def test_a_stop_across_tokens(smollm: Tokenizer) -> None:
    ids = smollm.encode("one two three four")
    deltas, stopped = run(smollm, ids, stop=["wo thr"])
    assert ("".join(deltas), stopped) == ("one t", "wo thr")
    deltas, stopped = run(smollm, ids, stop=["wo thr"], include_stop=True)
    assert ("".join(deltas), stopped) == ("one two thr", "wo thr")
    assert run(smollm, ids, stop=["wo thX"])[1] is None


def test_min_tokens_lets_early_stops_pass(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("xaxbxc")
    assert len(ids) == 6
    assert "".join(run(byte_level, ids, stop=["x"])[0]) == ""
    assert "".join(run(byte_level, ids, stop=["x"], min_tokens=2)[0]) == "xa"
    assert "".join(run(byte_level, ids, stop=["x"], min_tokens=3)[0]) == "xaxb"
    assert "".join(run(byte_level, ids, stop=["x"], min_tokens=6)[0]) == "xaxbxc"


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="a é日 h", min_size=1, max_size=12))
def test_tokens_are_located_in_sentencepiece_text(spm: Tokenizer, text: str) -> None:
    """The space in front of the first word is no character of the text; a byte token stands at its character."""
    ids = spm.encode(text)
    reader = TokenReader(spm)
    places = [reader.locate(reader.bytes_of(token)) for token in ids]
    assert spm.decode(ids) == text
    for i, place in enumerate(places):
        assert place == len(spm.decode(ids[:i], open_end=True))


@pytest.mark.parametrize(("prompt", "expected"), [("", "hello"), ("the", " hello")])
def test_sentencepiece_space_depends_on_the_prompt(spm: Tokenizer, prompt: str, expected: str) -> None:
    """With nothing but bos in front the first word's space is the tokenizer's own; after text it is the model's."""
    ids = spm.encode("hello", add_special_tokens=False)
    assert "".join(run(spm, ids, prompt=spm.encode(prompt))[0]) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé日🎉 h", min_size=1, max_size=12), data=st.data())
def test_output_continues_the_prompt(smollm: Tokenizer, text: str, data: st.DataObject) -> None:
    """Wherever the ids are cut, prompt and output add up; a character that is cut comes with the output."""
    ids = smollm.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before = smollm.decode(ids[:cut]).rstrip("\ufffd")
    assert before + "".join(run(smollm, ids[cut:], prompt=ids[:cut])[0]) == text
