"""Chat templates: transformers' text for the built-in model; hostile templates end in errors, not in trouble."""

from typing import Any

import pytest

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text import ChatTemplate, Tokenizer, chat_template, sandbox, template_of

USER = [{"role": "user", "content": "Hi"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS: list[list[dict[str, Any]]] = [
    USER,
    [{"role": "system", "content": "Be <b>brief</b> & kind."}, *USER],
    [*USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "日本 {{ 1 }} {% x %}"}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(smollm: Tokenizer, reference: Any, messages: list[dict[str, Any]], prompt: bool) -> None:
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert template_of(smollm).render(messages, add_generation_prompt=prompt) == expected


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


def test_failures_of_a_template_are_told_in_our_words() -> None:
    """A client reads what the template says, or that it failed: never how Python tells it."""
    with pytest.raises(InvalidRequestError) as error:
        render("{{ messages[0].content.nothing.more }}")
    assert "cannot render" in str(error.value) and "object" not in str(error.value) and error.value.param == "messages"
    with pytest.raises(InvalidRequestError, match=r"messages: 5$"):
        render("{{ raise_exception(5) }}")


LOOP = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "[{{ part['text'] }}]{% endfor %}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DUMPED = "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is string else m.content | tojson }}{% endfor %}"
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
FIRST = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
    "{% endfor %}{% endfor %}"
)
SYSTEM_IS_A_STRING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + LOOP


@pytest.mark.parametrize(
    ("source", "string", "parts"),
    [
        (PLAIN, "<user>hi", "<user>a\nb"),
        (TRIMMED, "<user>hi", "<user>a\nb"),
        (DUMPED, "<user>hi", "<user>a\nb"),
        (LOOP, "<user>hi", "<user>ab"),
        (FIRST, "<user>hi", "<user>ab"),
        (MIXED, "<user>hi", "<user>[a][b]"),
        (SYSTEM_IS_A_STRING, "<user>hi", "<user>ab"),
        (STRICT, "<user>hi", "<user>ab"),
    ],
)
def test_content_comes_in_the_form_that_the_template_reads(source: str, string: str, parts: str) -> None:
    """No text is dropped, and no list is shown as Python would write it, whichever form the client sends."""
    two = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert render(source, [{"role": "user", "content": "hi"}]) == string
    assert render(source, [{"role": "user", "content": two}]) == parts


def test_forms_are_found_for_each_role() -> None:
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [{"role": "system", "content": two}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": two}]
    assert render(SYSTEM_IS_A_STRING, talk) == "<system>a\nb<user>hi<assistant>ab"


def test_a_final_message_of_parts_is_continued() -> None:
    talk = [*USER, {"role": "assistant", "content": "Sure, "}]
    text = render(LOOP + "<end>", talk, add_generation_prompt=False, continue_final_message=True)
    assert text == "<user>Hi<assistant>Sure, "


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in render(CHATML, [{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    "content", [5, {"text": "a"}, ["a"], [{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}]]
)
def test_other_contents_are_refused(content: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.content") as error:
        render(CHATML, [{"role": "user", "content": content}])
    assert error.value.param == "messages[0]"


def test_no_messages_and_no_role_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        render(CHATML, [])
    with pytest.raises(InvalidRequestError, match="no role"):
        render(CHATML, [{"content": "a"}])


def test_template_inputs() -> None:
    assert (
        render("{{ bos_token }}{{ tools[0].function.name }}{{ eos_token }}", tools=[{"function": {"name": "f"}}]) == "<s>f</s>"
    )
    assert render("{% if tools is none %}none{% endif %}") == "none"
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"
    assert render("{{ messages[0].name }}", [{"role": "user", "content": "", "name": "n"}]) == "n"


def test_the_helpers_of_transformers() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}") == "4"
    assert render("{% generation %}a{% endgeneration %}") == "a"
    assert render("  {% if true %}\na{% endif %}\n") == "a"  # lstrip_blocks, trim_blocks


def test_raise_exception_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_continue_final_message() -> None:
    chat = [*USER, {"role": "assistant", "content": "Sure, "}]
    text = render(CHATML, chat, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nSure, ")
    with pytest.raises(InvalidRequestError, match="both true"):
        render(CHATML, chat, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="leaves the final message out"):
        render("x", chat, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "name",
    ["messages", "tokenize", "chat_template", "tools", "kvloom_tick", "a b", "raise_exception", "self", "strftime_now", "range",
     "bos_token", "add_generation_prompt", "continue_final_message", "namespace", "dict", "loop", "\ud800"],
)  # fmt: skip
def test_reserved_variables_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs may not set"):
        render(CHATML, variables={name: 1})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ dict.fromkeys('ab').x.y }}",
        "{{ namespace(_x=1) }}",
        "{{ range(100000) | list }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.at.all }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_end_in_an_error(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x | replace('b', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = '%s%s' | format(n.x, n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
        "{{ 'a'.ljust(1000000000) }}", "{{ 'a'.zfill(1000000000) }}", "{{ 'a'.center(1000000000) }}",
        "{{ ('\t' * 100000).expandtabs(9000) }}", "{{ ('a\n' * 100000) | indent(9000) }}", "{{ 'a' | indent(1000000000) }}",
        "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (1000000000, 1) }}", "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}", "{{ '%1000000000d' | format(1) }}", "{{ 1 | round(-1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}", "{{ ([1] * 10000) | tojson(separators=('a' * 100000, 'b')) }}",
        "{{ [1] | batch(1000000000, 1) | list }}", "{{ messages | map('center', 1000000000) | list }}",
        "{% set tick = dict %}{% set joined = dict %}{% set s = 'a' * 9000000 %}{{ s ~ s }}",
    ],
)  # fmt: skip
def test_what_would_grow_without_bound_is_refused(source: str) -> None:
    """Before the memory is taken: each of these asks for a gigabyte or much more."""
    with pytest.raises((InvalidRequestError, ModelError)):
        render(source)


def test_endless_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(chat_template, "PROBE_SECONDS", 0.05)
    loop = "{% for i in range(10000) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(InvalidRequestError, match="ran too long"):
        render(loop)
    with pytest.raises(InvalidRequestError, match="ran too long"):
        render("{% macro f() %}" + loop + "{% endmacro %}{{ f() }}")
    with pytest.raises(InvalidRequestError, match="ran too long"):  # no loop at all
        render("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}")


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CHARACTERS", 1000)
    with pytest.raises(InvalidRequestError, match="more than 1000 characters"):
        render("{% for i in range(200) %}0123456789{% endfor %}")


def test_broken_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="broken"):
        ChatTemplate("{% if %}")


def test_a_model_without_template_says_what_to_do(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        template_of(byte_level)


def test_templates_are_compiled_once(smollm: Tokenizer) -> None:
    assert template_of(smollm) is template_of(smollm)


def test_methods_of_strings_inside_loops_that_set_names():
    """Jinja hands such a call names of its own; a string's method knows none of them (Qwen3's template ends its turns so)."""
    template = ChatTemplate("{% for m in messages %}{% set x = m.content %}{{ x.strip() }}{{ x.split('b')[0] }}{% endfor %}")
    assert template.render([{"role": "user", "content": " ab "}]) == "ab a"


def test_ids_of_calls_that_a_template_would_refuse():
    """Mistral's allow nine letters and digits; a history of another server has others, and each keeps its own."""
    check = "{% if i | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}{{ i }}"
    template = ChatTemplate(
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set i = c.id %}CHECK"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% if m.tool_call_id %}{% set i = m.tool_call_id %}CHECK{% endif %}{% endfor %}".replace("CHECK", check)
    )
    assert template.tool_form.short_ids and template.tool_form.calls
    for name in ("call_of_another_server", "abcdefgh1"):
        call = {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        result = {"role": "tool", "content": "", "tool_call_id": name}
        text = template.render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
        )
        first, _, second = text.removeprefix("x").partition("f{}")
        assert first == second and len(first) == 9 and (first == name) is (name == "abcdefgh1")
