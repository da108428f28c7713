"""--chat-template, and several names: from settings to what a client of the engine is told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError
from kvloom.engine.startup.prepare import MAX_TEMPLATE, read_template, tokenizer_of

MakeLLM = Callable[..., LLM]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"


def test_a_template_is_a_file_or_its_own_text(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(TEMPLATE)
    assert read_template(str(file)) == TEMPLATE == read_template(TEMPLATE)
    assert read_template(None) is None


@pytest.mark.parametrize(("given", "said"), [
    ("not-there.jinja", "which cannot be read: No such file"), ("", "cannot be read"), ("{% for %}", "is broken"),
    ("{" * (MAX_TEMPLATE + 1), "has more than"),
])  # fmt: skip
def test_what_is_no_template_is_told(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_template(given)
    assert said in str(error.value) and "chat_template" in str(error.value)


def test_a_binary_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        read_template(str(tmp_path / "t"))


def test_a_given_template_renders_chats_here_and_where_the_engine_is_far(make_llm: MakeLLM, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    llm = make_llm(chat_template=str(tmp_path / "t.jinja"))
    prompt = llm.chat([{"role": "user", "content": "hi"}])[0].prompt_tokens
    assert llm.tokenizer.decode(prompt, skip_special_tokens=False) == "[user] hi<|im_end|>"
    far = tokenizer_of(pickle.loads(pickle.dumps(llm.model)))
    assert far.chat_template == TEMPLATE != make_llm().tokenizer.chat_template


def test_names(make_llm: MakeLLM) -> None:
    model = make_llm(served_model_name=["a", "b", "a"]).model
    assert (model.name, model.names) == ("a", ("a", "b"))
    assert make_llm(served_model_name="only").model.names == ("only",)
    with pytest.raises(ConfigError, match="an empty name"):
        EngineConfig.from_flat({"served_model_name": "a,,b"})
