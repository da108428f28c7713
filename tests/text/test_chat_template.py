"""Chat templates: transformers' text for the built-in model; hostile templates end in errors, not in trouble."""

from typing import Any

import pytest

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text import ChatTemplate, Tokenizer, chat_template, template_of

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
    assert render("{{ bos_token }}{{ tools[0].name }}{{ eos_token }}", tools=[{"name": "f"}]) == "<s>f</s>"
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


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "tools", "kvloom_tick", "a b", "raise_exception"])
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


def test_endless_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    loop = "{% for i in range(10000) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(InvalidRequestError, match="longer than"):
        render(loop)
    with pytest.raises(InvalidRequestError, match="longer than"):
        render("{% macro f() %}" + loop + "{% endmacro %}{{ f() }}")


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
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
