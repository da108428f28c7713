"""What a model wrote, read as thoughts, content and calls: every format, and whatever the pieces in which it comes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.server.answers.events import CallArguments, CallStart, Content, Reasoning
from kvloom.server.answers.formats import CALL_FORMATS, REASONING_FORMATS
from kvloom.server.answers.reader import AnswerReader, Expected

SCHEMAS = {
    "look": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "any": {}}},
    "list_all": {},
}
THINK = REASONING_FORMATS["think"]
SEP = "<｜tool▁sep｜>"

CASES = [
    (
        "hermes",
        'Sure.\n<tool_call>\n{"name": "look", "arguments": {"city": "Bonn"}}\n</tool_call>\nDone.',
        "Sure.\nDone.",
        [("look", {"city": "Bonn"})],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"days": [1, -2.5e3, true, null]}, "name": "look", "id": 7}</tool_call>'
        '\n<tool_call>\n{"name": "list_all"}\n</tool_call>',
        "",
        [("look", {"days": [1, -2500.0, True, None]}), ("list_all", {})],
    ),
    (
        "hermes",
        '<tool_call>[{"name": "look", "arguments": {}}, {"name": "list_all", "arguments": {}}]</tool_call>',
        "",
        [("look", {}), ("list_all", {})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>',
        "",
        [("look", {"city": "Ulm"})],
    ),
    ("hermes", '{"name": "look", "arguments": {"city": "a\nb\\d\\\'"}}', "", [("look", {"city": "a\nb\\d'"})]),
    ("hermes", '```json\n{"name": "look", "arguments": {"any": True}}\n```', "", [("look", {"any": True})]),
    ("hermes", '{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", {})]),
    ("hermes", '<tool_call>{"nome": "look"}</tool_call>', '<tool_call>{"nome": "look"}</tool_call>', []),
    ("hermes", "<tool_call>{bad}</tool_call> and <tool_call>", "<tool_call>{bad}</tool_call> and <tool_call>", []),
    ("hermes", '<tool_call><tool_call>{"name": "look"}</tool_call>', "<tool_call>", [("look", {})]),
    ("hermes", "A list: [1, 2] \n", "A list: [1, 2] \n", []),
    ("hermes", "  <tool_ca", "  <tool_ca", []),
    (
        "llama3_json",
        '<|python_tag|>{"name": "look", "parameters": {"city": "Bonn"}}; {"name": "list_all", "parameters": {}}',
        "",
        [("look", {"city": "Bonn"}), ("list_all", {})],
    ),
    ("llama3_json", '\n{"name": "look", "parameters": {"city": "Bonn"}}', "", [("look", {"city": "Bonn"})]),
    (
        "llama3_json",
        '{"name": "Bonn", "parameters": {"river": "Rhine"}}',
        '{"name": "Bonn", "parameters": {"river": "Rhine"}}',
        [],
    ),
    (
        "pythonic",
        "[look(city=\"Bo'nn\", days=3, any=[{'a': None}, (1,), -2.5]), list_all()]",
        "",
        [("look", {"city": "Bo'nn", "days": 3, "any": [{"a": None}, [1], -2.5]}), ("list_all", {})],
    ),
    ("pythonic", "<|python_start|>[look(city='a\\n\\u00e9')]<|python_end|>!", "!", [("look", {"city": "a\né"})]),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    *(
        (form, text % "\\ud83e\\udd8a \\uD83E \\udd8a \\ud83e\\u0041", "", [("look", {name: "🦊 \ufffd \ufffd \ufffdA"})])
        for form, name, text in (
            ("hermes", "city", '<tool_call>{"name": "look", "arguments": {"city": "%s"}}</tool_call>'),
            ("hermes", "city", '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"%s\\"}"}</tool_call>'),
            ("qwen_coder", "any", '<tool_call><function=look><parameter=any>"%s"</parameter></function></tool_call>'),
        )
    ),
    ("pythonic", "[look(city=__import__('os'))]", "[look(city=__import__('os'))]", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "x"}}, {"name": "list_all", "arguments": {}}]',
        "",
        [("look", {"city": "x"}), ("list_all", {})],
    ),
    (
        "mistral",
        'Hi[TOOL_CALLS]look[ARGS]{"days": 1}[TOOL_CALLS]list_all[CALL_ID]abcdefghi[ARGS]{}',
        "Hi",
        [("look", {"days": 1}), ("list_all", {})],
    ),
    ("mistral", '[TOOL_CALLS]look{"days": 1}', "", [("look", {"days": 1})]),
    (
        "qwen_coder",
        'Ok\n<tool_call>\n<function=look>\n<parameter=city>\na "b"\nc\n</parameter>\n<parameter=days>\n5\n</parameter>\n'
        "<parameter=any>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
        "Ok",
        [("look", {"city": 'a "b"\nc', "days": 5, "any": [1, 2]})],
    ),
    (
        "qwen_coder",
        "<function=look>\n<parameter=days>many</parameter></function> <function=list_all></function>",
        "",
        [("look", {"days": "many"}), ("list_all", {})],
    ),
    ("qwen_coder", "<function= is a mark", "<function= is a mark", []),
    (
        "deepseek",
        f'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function{SEP}look\n```json\n{{"city": "x"}}\n```<｜tool▁call▁end｜>\n'
        f"<｜tool▁call▁begin｜>list_all{SEP}{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("look", {"city": "x"}), ("list_all", {})],
    ),
]


def read(form, pieces, reasoning=None, thinking=False, **more):
    """(content, thoughts, [(name, arguments as text)], told reason) of a text that comes in pieces."""
    calls = None if form is None else CALL_FORMATS[form]
    reader = AnswerReader(Expected(calls=calls, reasoning=reasoning, thinking=thinking, schemas=SCHEMAS, **more))
    events = [event for piece in pieces for event in reader.push(piece)] + reader.push("", ended=True)
    content = "".join(event.text for event in events if isinstance(event, Content))
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    found = {}
    for event in events:
        if isinstance(event, CallStart):
            assert event.call == len(found)
            found[event.call] = [event.name, ""]
        elif isinstance(event, CallArguments):
            assert event.call == len(found) - 1 and event.text
            found[event.call][1] += event.text
    return content, thoughts, [tuple(call) for call in found.values()], reader.finish_reason("stop")


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_formats(form, text, content, calls):
    told, _, found, reason = read(form, [text])
    assert told == content
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert reason == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_every_format_has_a_case_and_marks(form):
    assert any(case[0] == form and case[3] for case in CASES)
    assert CALL_FORMATS[form].opens


FRAGMENTS = st.sampled_from(
    [
        *(word for form in CALL_FORMATS.values() for word in form.marks),
        "<think>",
        "</think>",
        "look",
        "list_all",
        '"name"',
        '"arguments"',
        ": ",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "=",
        ",",
        ";",
        '"',
        "'",
        "\\",
        "\n",
        " ",
        "1",
        "-2.5",
        "true",
        "None",
        "```json\n",
        "```",
        "<function=look>",
        "<parameter=city>",
        "</parameter>",
        "</function>",
        '{"name": "look", "arguments": {',
        "é",
        "\x00",
        "[look(city=",
        "function",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_change_nothing_and_nothing_is_an_error(data):
    """A text of marks and crumbs, whole and in pieces: the same events, and content of what is no call."""
    form = data.draw(st.sampled_from([None, *CALL_FORMATS]))
    begins = data.draw(st.sampled_from(["", *(case[1] for case in CASES if case[0] == form)]))
    cut = data.draw(st.integers(0, len(begins)))
    text = begins[:cut] + "".join(data.draw(st.lists(FRAGMENTS, max_size=25))) + begins[cut:]
    options = {"reasoning": data.draw(st.sampled_from([None, THINK])), "most_calls": data.draw(st.sampled_from([None, 1]))}
    options["thinking"] = options["reasoning"] is not None and data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    whole = read(form, [text], **options)
    assert read(form, pieces, **options) == whole == read(form, text, **options)
    if form is None and options["reasoning"] is None:
        assert whole[0] == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
def test_arguments_come_out_as_they_went_in(given_arguments):
    text = json.dumps({"name": "look", "arguments": given_arguments})
    for form in ("hermes", "llama3_json"):
        (_, arguments), *_ = read(form, [text])[2]
        assert json.loads(arguments) == given_arguments


@pytest.mark.parametrize(
    ("text", "thinking", "content", "thoughts"),
    [
        ("<think>\nhm\n</think>\n\nHi\n", False, "Hi\n", "hm"),
        ("hm</think>Hi", True, "Hi", "hm"),
        ("<think>hm</think>Hi", True, "Hi", "hm"),
        ("<think>\n\n</think>\n\nHi", False, "Hi", ""),
        ("<think>still", False, "", "still"),
        ("\nHi <think>no</think>", False, "\nHi <think>no</think>", ""),
    ],
)
def test_thoughts(text, thinking, content, thoughts):
    assert read(None, text, THINK, thinking)[:2] == (content, thoughts)
    assert read("hermes", text, THINK, thinking)[1] == thoughts


def test_calls_behind_thoughts():
    text = '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert read("hermes", text, THINK) == ("", "I look.", [("look", "{}")], "tool_calls")
    assert read("hermes", text, THINK, tell_reasoning=False)[1] == ""


def test_arguments_stream_and_a_cut_call_is_told_so():
    """The name comes first, pieces of arguments as they come; a call that is cut stays open."""
    reader = AnswerReader(Expected(calls=CALL_FORMATS["hermes"], schemas=SCHEMAS))
    assert reader.push('<tool_call>{"name": "look", "arguments": {') == []
    start, first = reader.push('"ci')
    assert isinstance(start, CallStart) and start.name == "look" and first.text == '{"ci'
    assert [event.text for event in reader.push('ty": "Bo')] == ['ty": "Bo']
    assert reader.push("", ended=True) == []
    assert reader.finish_reason("length") == "length" and reader.finish_reason("stop") == "stop"


def test_arguments_that_break_off_keep_what_was_right():
    content, _, calls, reason = read("hermes", '<tool_call>{"name": "look", "arguments": {"city": oops}}</tool_call>')
    assert calls == [("look", '{"city": ')] and content == "oops}}</tool_call>" and reason == "tool_calls"


def test_the_cut_mark_behind_a_call_is_no_content():
    call = '<tool_call>{"name": "look"}'
    assert read("hermes", call + "\n</tool_c")[0] == "" and read("hermes", call + "\n</tool_x")[0] == "\n</tool_x"


def test_one_call_where_one_is_allowed():
    text = '<tool_call>{"name": "look"}</tool_call><tool_call>{"name": "list_all"}</tool_call>'
    assert [name for name, _ in read("hermes", text, most_calls=1)[2]] == ["look"]


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_long_texts_take_linear_time(form):
    """Marks that begin nothing, and deep nesting: read on, not again."""
    mark = CALL_FORMATS[form].opens[0]
    for text in (mark * 20_000, mark + "[" * 50_000, mark + '{"a": ' * 20_000, (mark + '{"name": "') * 5_000):
        content, _, calls, _ = read(form, [text])
        assert not calls and content.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")


def test_ids_of_calls():
    ids = set()
    for form in ("hermes", "mistral"):
        reader = AnswerReader(Expected(calls=CALL_FORMATS[form], schemas=SCHEMAS))
        mark = CALL_FORMATS[form].opens[0]
        start = reader.push(mark + '{"name": "look", "arguments": {}}', ended=True)[0]
        assert isinstance(start, CallStart)
        assert start.id.startswith("call_") if form == "hermes" else len(start.id) == 9 and start.id.isalnum()
        ids.add(start.id)
    assert len(ids) == 2
