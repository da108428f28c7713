"""Grammars of forced calls: whatever a model writes under them is read as calls whose arguments are valid."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from kvloom.engine.constraint.options import StructuredOutput
from kvloom.server.answers.events import CallArguments, CallStart
from kvloom.server.answers.formats import CALL_FORMATS, REASONING_FORMATS
from kvloom.server.answers.grammar import GrammarWriter, Thoughts, content_rule
from kvloom.server.answers.reader import AnswerReader, Expected
from kvloom.server.schema.tools import Tool

LOOK = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer"},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "who": {"$ref": "#/$defs/who"},
    },
    "required": ["city", "who"],
    "additionalProperties": False,
    "$defs": {
        "who": {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"look": LOOK, "list.all": NOTHING}


def tool(name, parameters, strict=True):
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}})


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]
THINK = REASONING_FORMATS["think"]
TEXT_MARKS = {"<function=", "<tool_call>", "</tool_call>"}
"""Not special in the models that write them."""
WORDS = ['"', "}", "\n", "</think>", "\n</parameter>\n", "</function>\n", "]", ")"]
"""What ends something, which chance alone would seldom write."""


@pytest.fixture(scope="module")
def vocabulary(fake):
    marks = dict.fromkeys(mark for form in CALL_FORMATS.values() for mark in form.marks if mark not in TEXT_MARKS)
    tokenizer = fake.make_tokenizer(special=(*fake.SPECIAL, *marks))

    class Vocabulary:
        eos_token_id, bos_token_id, special_token_ids = tokenizer.eos_ids[0], None, sorted(tokenizer.special_ids)
        tokens = [b"\xff" * tokenizer.is_special(i) + tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]  # noqa: RUF012

        def __call__(self, text):
            return tokenizer.encode(text if isinstance(text, str) else text.decode(), add_special_tokens=False)

    return tokenizer, LLTokenizer(TokenizerWrapper(Vocabulary()))


def writing(form, tokenizer, template=""):
    def special(text):
        token = tokenizer.backend.token_to_id(text)
        return token if token is not None and tokenizer.is_special(token) else None

    return GrammarWriter(CALL_FORMATS[form], special, template)


def matcher(grammar, tokens):
    found = LLMatcher(tokens, grammar)
    assert not found.is_error(), found.get_error()
    return found


def wander(grammar, tokenizer, tokens, seed):
    """A text that a model without any sense could write under a grammar, or None if it did not find the end."""
    draw, match, written = random.Random(seed), matcher(grammar, tokens), []
    words = [tokenizer.encode(word, add_special_tokens=False) for word in WORDS]
    while len(written) < 600 and not match.is_stopped():
        bias, word = match.compute_logit_bias(), draw.choice(words)
        if draw.random() < 0.4 and match.validate_tokens(word) == len(word):
            chosen = word
        else:
            chosen = [draw.choice([i for i in range(tokenizer.vocab_size) if bias[i]])]
        if chosen[0] in tokenizer.eos_ids or (match.is_accepting() and draw.random() < 0.2):
            return tokenizer.decode(written, skip_special_tokens=False)
        assert match.consume_tokens(chosen)
        written += chosen
    return tokenizer.decode(written, skip_special_tokens=False) if match.is_stopped() else None


def calls_of(form, text, thinking=False, **options):
    reader = AnswerReader(Expected(calls=CALL_FORMATS[form], reasoning=THINK, thinking=thinking, schemas=SCHEMAS, **options))
    found = {}
    for event in reader.push(text, ended=True):
        if isinstance(event, CallStart):
            found[event.call] = [event.name, ""]
        elif isinstance(event, CallArguments):
            found[event.call][1] += event.text
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


def check(calls):
    for name, arguments in calls:
        assert name in SCHEMAS
        if name == "look":
            assert isinstance(arguments["city"], str) and isinstance(arguments["who"]["n"], bool)
            assert isinstance(arguments.get("days", 1), int) and arguments.get("kind", "a") in ("a", "b")
            assert arguments.keys() <= {"city", "days", "kind", "who"}
        else:
            assert arguments == {}


@pytest.mark.parametrize("form", CALL_FORMATS)
@pytest.mark.parametrize("thinking", [False, True])
def test_whatever_is_written_is_calls(vocabulary, form, thinking):
    tokenizer, tokens = vocabulary
    whole = 0
    for seed in range(24):
        template = "```json" if seed % 2 else ""
        grammar = writing(form, tokenizer, template).forced(TOOLS, most=3, thoughts=Thoughts(THINK, thinking))
        text = wander(grammar, tokenizer, tokens, seed)
        if text is not None:
            calls = calls_of(form, text, thinking)
            assert 1 <= len(calls) <= 3, text
            check(calls)
            whole += 1
    assert whole >= 4


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_text_is_free_and_calls_are_not(vocabulary, form):
    """Strict functions with tool_choice auto."""
    tokenizer, tokens = vocabulary
    grammar = writing(form, tokenizer).guarded(TOOLS, Thoughts(THINK, False))
    for text in ("Hello there.", "", "<think>a</think>\nHello"):
        match = matcher(grammar, tokens)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert match.try_consume_tokens(ids) == len(ids) and match.is_accepting(), text
    bare = CALL_FORMATS[form].mostly_bare
    found = [wander(grammar, tokenizer, tokens, seed) for seed in range(16)]
    for text in filter(None, found):
        check(calls_of(form, text, bare=bare))
    opening = "" if bare else CALL_FORMATS[form].opens[0]
    wrong = (CALL_FORMATS[form].wraps or ("",))[0] + opening + {"pythonic": "[other("}.get(form, '{"name": "other"')
    ids = tokenizer.encode(wrong, add_special_tokens=False)
    assert matcher(grammar, tokens).try_consume_tokens(ids) < len(ids)


@pytest.mark.parametrize("form", sorted(CALL_FORMATS.keys() - {"llama3_json"}))
def test_content_of_a_schema_or_calls(vocabulary, form):
    tokenizer, tokens = vocabulary
    asked = StructuredOutput(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    content = content_rule(asked)
    grammar = writing(form, tokenizer).either(TOOLS, content, most=8, thoughts=Thoughts(THINK, False))
    for text in ('{"a": 1}', '<think>x</think>\n{"a":1}'):
        match = matcher(grammar, tokens)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert match.try_consume_tokens(ids) == len(ids) and match.is_accepting(), text
    assert matcher(grammar, tokens).try_consume_tokens(tokenizer.encode("hello")) == 0
    forced = writing(form, tokenizer).forced(TOOLS, most=1, thoughts=Thoughts(None, False))
    text = next(filter(None, (wander(forced, tokenizer, tokens, seed) for seed in range(24))))
    match = matcher(grammar, tokens)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert match.try_consume_tokens(ids) == len(ids) and match.is_accepting(), text


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_a_constant_is_kept_to(vocabulary, form):
    only = {
        "type": "object",
        "properties": {"a": {"type": "string", "const": "x y"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammar = writing(form, vocabulary[0]).forced([tool("look", only)], most=1, thoughts=Thoughts(None, False))
    texts = [wander(grammar, *vocabulary, seed) for seed in range(6)]
    assert any(texts) and all(calls_of(form, text) == [("look", {"a": "x y"})] for text in texts if text)


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_references_to_other_arguments(vocabulary, form):
    """To an argument, to a part of one, to the whole; where each argument's value is written by itself, too."""
    size = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
    pair = {
        "type": "object",
        "properties": {"a": size, "b": {"$ref": "#/properties/a"}, "c": {"$ref": "#/properties/a/properties/n"}},
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    grammar = writing(form, vocabulary[0]).forced([tool("look", pair)], most=1, thoughts=Thoughts(None, False))
    texts = list(filter(None, (wander(grammar, *vocabulary, seed) for seed in range(12))))
    assert texts
    for text in texts:
        ((name, arguments),) = calls_of(form, text)
        assert name == "look" and arguments.keys() == {"a", "b", "c"}
        assert all(isinstance(arguments[key]["n"], bool) for key in "ab") and isinstance(arguments["c"], bool)


def test_what_cannot_be_joined():
    tight = {"json_object": True, "disable_any_whitespace": True}
    for fields in ({"regex": "a"}, {"grammar": "start: /a/"}, {"json_schema": "true"}, tight):
        assert content_rule(StructuredOutput(**fields)) is None
    assert content_rule(StructuredOutput(choice=("a", 'b"'))) == '("a" | "b\\"")'


def test_keywords_that_no_grammar_knows():
    """They are refused where the function is strict, and left out where it is not."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {"const": "x"}}}}
    for strict in (False, True):
        tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}})
        grammar = GrammarWriter(CALL_FORMATS["hermes"], lambda text: None).forced(
            [tool], most=1, thoughts=Thoughts(None, False)
        )
        problem = LLMatcher.validate_grammar(grammar)
        assert ("not" in problem) is strict and bool(problem) is strict
