"""Grammars: what is refused and how it is told, what is kept, and who waits for what."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from kvloom.engine.config import StructuredOptions
from kvloom.engine.constraint.compiler import LARGE, WAITING_OF_TENANT, Compiler, Grammar
from kvloom.engine.constraint.lanes import Lanes
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import ConfigError, InvalidRequestError, OverloadedError
from tests.server.fakes import make_tokenizer

TOKENIZER = make_tokenizer()
ENDS = TOKENIZER.eos_ids


def make(**options: Any) -> Compiler:
    return Compiler(StructuredOptions(**options), TOKENIZER, TOKENIZER.vocab_size + 5, ENDS)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return make()


def schema(text: Any) -> StructuredOutput:
    return StructuredOutput(json_schema=text, param="response_format")


@pytest.mark.parametrize(
    "asked, named",
    [
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "object", "properties": {"a": {"type": "string", "format": "colour"}}}), "format: colour"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (schema({"$ref": "http://example.org/x"}), "http://example.org/x"),
        (schema({"type": "string", "minLength": 5, "maxLength": 3}), "minLength"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-ahead"),
        (schema({"$ref": "#"}), "nothing satisfies it"),
        (schema(False), "schema is false"),
        (schema("{nope"), "line 1"),
        (schema('{"items":' * 10_000 + "{}" + "}" * 10_000), "nested too deeply"),
        (schema({"type": "array", "maxItems": 10**7}), "maxItems add up to 1e+07; allowed: 20000"),
        (schema('{"type": "array", "max\\u0049tems": 10000000}'), "allowed: 20000"),
        (schema({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 999_983}}}), "multipleOf 999983"),
        (schema('{"type": "number", "multiple\\u004ff": 99.9983e6}'), "multipleOf 99.9983e6"),
        (schema({"allOf": [{"type": "integer", "multipleOf": 397}, {"multipleOf": 211}]}), "allowed: 10000"),
        (StructuredOutput(grammar='start: %json {"type": "integer", "multipleOf": 4294967291}'), "multipleOf 4294967291"),
        (schema({"type": "string", "description": "x" * 600_000}), "allowed: 524288"),
        (StructuredOutput(regex="(?<=a)b"), "look-behind"),
        (StructuredOutput(regex="(" * 100_000), "regex"),
        (StructuredOutput(grammar='start: "a" x'), 'unknown name: "x"'),
        (StructuredOutput(grammar='start: <nope> "a"'), "special token"),
        (StructuredOutput(grammar="root ::= ("), "GBNF"),
        (StructuredOutput(grammar="root ::= " + "(" * 5000), "nested too deeply"),
        (StructuredOutput(grammar="root ::= " + '"a" ' * 50_000), "allowed: 32768"),
        (StructuredOutput(structural_tag={"format": {}}), "format"),
        (StructuredOutput(structural_tag={"structures": [], "triggers": []}), "structures is empty"),
        (StructuredOutput(structural_tag="[]"), "structural_tag cannot be read"),
        (StructuredOutput(json_schema={}, whitespace_pattern="("), "regex"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_wrong(compiler: Compiler, asked: StructuredOutput, named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        compiler.compile(asked)
    assert refused.value.param == asked.param and str(refused.value).startswith(f"{asked.param}: ")
    assert named in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("multiple", [0.01, 2.5, 7, 86_400, 3_000_000, 10**9, 1e9])
def test_usual_multiples_are_served(compiler: Compiler, multiple: float) -> None:
    compiler.compile(schema({"type": "number", "multipleOf": multiple}))


def test_exactly_one_constraint() -> None:
    with pytest.raises(InvalidRequestError, match="regex and choice given"):
        StructuredOutput(regex="a", choice=("b",))
    with pytest.raises(InvalidRequestError, match="no constraint"):
        StructuredOutput()
    asked = schema({"type": "object"})
    assert pickle.loads(pickle.dumps(asked)) == asked == schema('{"type":"object"}')


def test_a_mask_allows_what_the_expression_does(compiler: Compiler) -> None:
    """Bit by bit, for an expression whose beginnings are easily told."""
    mask = np.zeros((1, -(-(TOKENIZER.vocab_size + 5) // 32)), np.int32)
    compiler.compile(StructuredOutput(regex="[a-m]{1,3}")).begin(StructuredOutput(regex="[a-m]{1,3}")).masks((), mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    fits = [
        token for token in range(TOKENIZER.vocab_size)
        if 1 <= len(raw := TOKENIZER.token_bytes(token)) <= 3 and set(raw) <= set(b"abcdefghijklm")
    ]  # fmt: skip
    assert allowed == fits


def test_free_text_between_tags(compiler: Compiler) -> None:
    tags = {"structures": [{"begin": "<f>", "schema": {"type": "array", "maxItems": 0}, "end": "</f>"}], "triggers": ["<f"]}
    asked = StructuredOutput(structural_tag=tags)
    progress = compiler.compile(asked).begin(asked)
    progress.check_forced(TOKENIZER.encode("hello <f>[]</f> dog"))
    with pytest.raises(InvalidRequestError):
        progress.check_forced(TOKENIZER.encode("hello <f>nope"))


def test_the_cache_is_bounded_in_entries_and_size() -> None:
    compiler = make(grammar_cache_entries=3, grammar_cache_size=25)
    asked = [StructuredOutput(regex=letter * 10) for letter in "abcd"]
    for expression in asked:
        compiler.compile(expression)
    assert compiler.kept == (2, 20)
    kept = compiler.compile(asked[3])
    compiler.compile(asked[0])
    assert compiler.compile(asked[3]) is kept and compiler.kept == (2, 20)
    many = make(grammar_cache_entries=3)
    for expression in asked:
        many.compile(expression)
    assert many.kept == (3, 30)


def test_who_asks_for_the_same_waits_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, go, made = make(), threading.Event(), list[StructuredOutput]()
    real = compiler._make

    def slow(asked: StructuredOutput) -> Any:
        made.append(asked)
        go.wait(30)
        return real(asked)

    monkeypatch.setattr(compiler, "_make", slow)

    async def run() -> list[Any]:
        asked = [asyncio.create_task(compiler.ready(schema({"type": "integer"}), "")) for _ in range(5)]
        await asyncio.sleep(0)
        asked[0].cancel()  # whoever leaves does not take it with them
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*asked[1:])

    assert len({id(grammar) for grammar in asyncio.run(run())}) == 1 and len(made) == 1
    compiler.close()


def test_waiting_is_bounded_in_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, go = make(grammar_compile_seconds=0.1), threading.Event()
    monkeypatch.setattr(compiler, "_make", lambda asked: go.wait(30))

    async def run() -> list[Any]:
        asked = [compiler.ready(StructuredOutput(regex=f"a{i}"), "t") for i in range(WAITING_OF_TENANT + 1)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(run())
    go.set()
    assert [type(error) for error in found] == [InvalidRequestError] * WAITING_OF_TENANT + [OverloadedError]
    assert "not compiled after 0.1 s" in str(found[0])
    compiler.close()


def test_what_nobody_waits_for_any_more_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else abandoned grammars would go before everybody's; and the error of one that had begun is no news."""
    compiler, go, made = make(grammar_compile_seconds=0.1), threading.Event(), list[str]()

    def slow(asked: StructuredOutput) -> Any:
        made.append(str(asked.regex))
        go.wait(30)
        raise asked.refused("it is none")

    monkeypatch.setattr(compiler, "_make", slow)

    async def run() -> Any:
        asked = [compiler.ready(StructuredOutput(regex=f"a{i}"), "t") for i in range(8)]
        await asyncio.gather(*asked, return_exceptions=True)
        go.set()
        return await asyncio.gather(compiler.ready(StructuredOutput(regex="b"), "u"), return_exceptions=True)

    found = asyncio.run(run())
    gc.collect()
    assert "it is none" in str(found[0]) and made == ["a0", "b"]
    assert not caplog.records
    compiler.close()


def test_one_that_leaves_ends_it_for_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, go = make(), threading.Event()
    real = compiler._make
    monkeypatch.setattr(compiler, "_make", lambda asked: go.wait(30) and real(asked))

    async def run() -> Any:
        asked = ["a", "b", "b"]
        *busy, first, second = (asyncio.ensure_future(compiler.ready(StructuredOutput(regex=text), "t")) for text in asked)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*busy)
        return await second

    assert asyncio.run(run()).asked.regex == "b"
    compiler.close()


def held_up(monkeypatch: pytest.MonkeyPatch, go: threading.Event, made: list[str]) -> Compiler:
    """One that notes which expressions it compiles, in `made`; those that begin with "loud" not before `go`."""
    compiler = make()
    real = compiler._make

    def slow(asked: StructuredOutput) -> Grammar:
        made.append(str(asked.regex))
        assert not str(asked.regex).startswith("loud") or go.wait(30)
        return real(asked)

    monkeypatch.setattr(compiler, "_make", slow)
    return compiler


def test_a_tenant_that_floods_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    go, made = threading.Event(), list[str]()
    compiler = held_up(monkeypatch, go, made)

    async def run() -> None:
        loud = [asyncio.ensure_future(compiler.ready(StructuredOutput(regex=f"loud{i}"), "loud")) for i in range(9)]
        await asyncio.sleep(0)
        for i in range(3):  # one after the other, while the flood waits
            assert (await compiler.ready(StructuredOutput(regex=f"b{i}"), "quiet")).asked.regex == f"b{i}"
        assert compiler.figures()["grammars_waiting"] == 9
        go.set()
        await asyncio.gather(*loud)

    asyncio.run(run())
    quiet, flood = [f"b{i}" for i in range(3)], [f"loud{i}" for i in range(9)]
    assert [text for text in made if text in quiet] == quiet and [text for text in made if text in flood] == flood
    assert made.index("b2") < made.index("loud1"), "one thread is another's, whenever the flood's own begins"
    figures = compiler.figures()
    assert figures["grammars_waiting"] == 0 and sum(figures["grammar_times"]) == 12 and figures["grammar_times_sum"] > 0
    compiler.close()


def test_tenants_take_turns() -> None:
    lanes, go, done = Lanes(1, "test", lambda: None), threading.Event(), list[str]()
    first = lanes.submit("a", lambda: go.wait(30))
    others = [lanes.submit(name[0], lambda name=name: done.append(name)) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    others[1].cancel()
    go.set()
    for future in (first, *others[:1], *others[2:]):
        future.result(30)
    assert done == ["a1", "b1", "c1", "a3", "b2"], "one that was cancelled costs no turn"
    broken = lanes.submit("a", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result(30)
    lanes.close()


def test_what_was_given_up_is_forgotten() -> None:
    class Work:
        """What a closure holds on to."""

    lanes, go, held = Lanes(1, "test", lambda: None), threading.Event(), list[weakref.ref[Work]]()
    first = lanes.submit("a", lambda: go.wait(30))
    for _ in range(50):
        work = Work()
        held.append(weakref.ref(work))
        lanes.submit("b", lambda work=work: work).cancel()
    del work
    last = lanes.submit("b", lambda: 7)
    gc.collect()
    assert not any(one() for one in held)
    go.set()
    assert first.result(30) and last.result(30) == 7
    lanes.close()
    assert lanes.submit("a", lambda: 1).cancelled(), "what comes too late is not begun"


def test_another_tenants_flood_does_not_hold_up_the_same_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    go, made = threading.Event(), list[str]()
    compiler = held_up(monkeypatch, go, made)

    async def run() -> None:
        texts = [*(f"loud{i}" for i in range(9)), "same"]
        loud = [asyncio.ensure_future(compiler.ready(StructuredOutput(regex=text), "loud")) for text in texts]
        await asyncio.sleep(0)
        quiet = await compiler.ready(StructuredOutput(regex="same"), "quiet")
        go.set()
        assert (await asyncio.gather(*loud))[-1] is quiet

    asyncio.run(run())
    assert made.count("same") == 1 and "loud1" not in made[: made.index("same")]
    compiler.close()


def test_what_is_large_has_a_thread_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, names = make(), list[str]()
    real = compiler._make

    def seen(asked: StructuredOutput) -> Grammar:
        names.append(threading.current_thread().name.rpartition("_")[0])
        return real(asked)

    monkeypatch.setattr(compiler, "_make", seen)
    large = schema({"enum": [f"value {i}" for i in range(2000)]})
    assert large.size >= LARGE

    async def run() -> None:
        await asyncio.gather(compiler.ready(large, "t"), compiler.ready(schema({"type": "integer"}), "t"))

    asyncio.run(run())
    assert sorted(names) == ["kvloom-grammar", "kvloom-large"]
    compiler.close()


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no token that ends a text"):
        Compiler(StructuredOptions(), TOKENIZER, TOKENIZER.vocab_size, ()).compile(StructuredOutput(regex="a"))


def test_settings_have_ranges() -> None:
    with pytest.raises(ConfigError, match="grammar_compile_seconds is 0; allowed"):
        StructuredOptions(grammar_compile_seconds=0)


def test_an_object_may_have_many_properties(compiler: Compiler) -> None:
    """Any of which may come next: that many ways are followed at once."""
    asked = schema({"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(1500)}})
    answer = compiler.compile(asked).begin(asked)
    mask = np.zeros((1, -(-(TOKENIZER.vocab_size + 5) // 32)), np.int32)
    for token in TOKENIZER.encode('{"p12": true, "p1499'):
        assert not answer.masks((), mask)[0] and mask[0, token // 32] >> token % 32 & 1
        answer.accept(token)
