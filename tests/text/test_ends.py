"""End tokens: what files state, what the template ends turns with, and that the model has them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ModelError
from kvloom.engine.text import Tokenizer, check_vocabulary, end_tokens
from kvloom.engine.text.ends import turn_ends

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|user|>", "<|im_end|>x", "\n"]
TYPES = [3, 3, 3, 3, 3, 4, 4]


@pytest.fixture
def metadata(bytes_metadata: dict[str, Any]) -> dict[str, Any]:
    """A GGUF whose end token is not the one its template ends turns with."""
    tokens = bytes_metadata["tokenizer.ggml.tokens"]
    types = bytes_metadata["tokenizer.ggml.token_type"]
    return bytes_metadata | {
        "tokenizer.ggml.tokens": [*tokens, *NAMES],
        "tokenizer.ggml.token_type": [*types, *TYPES],
        "tokenizer.ggml.eos_token_id": len(tokens),
        "tokenizer.chat_template": CHATML,
    }


def named(tokenizer: Tokenizer, ids: Any) -> set[str]:
    return {tokenizer.token_text(token) for token in ids}


def test_what_the_template_ends_turns_with_ends_answers(metadata, caplog) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        ends = end_tokens(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size, "model.gguf")
    assert named(tokenizer, ends) == {"<|endoftext|>", "<|im_end|>"}
    assert "model.gguf: the chat template ends turns with <|im_end|>" in caplog.text


def test_eot_and_eom_end_answers(metadata) -> None:
    first = metadata["tokenizer.ggml.eos_token_id"]
    more = {"tokenizer.ggml.eot_token_id": first + 3, "tokenizer.ggml.eom_token_id": first + 4}
    tokenizer = Tokenizer.from_gguf(metadata | more)
    ends = end_tokens(tokenizer, [], tokenizer.vocab_size, "")
    assert named(tokenizer, ends) == {"<|endoftext|>", "</s>", "<|user|>", "<|im_end|>"}


@pytest.mark.parametrize(("template", "expected"), [
    (CHATML, {"<|im_end|>"}),
    (LLAMA2, {"</s>"}),
    (CHATML.replace("<|im_end|>", "\n<|im_end|>"), {"<|im_end|>"}),  # blanks between
    ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}", {"<|user|>"}),  # the next turn ends the last
    ("{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}", set()),  # plain words
    ("{{ messages[0]['content'] }}<|im_end|>", set()),  # no assistant in it
    ("{{ raise_exception('no') }}", set()),
    ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", {"<|endoftext|>"}),
])  # fmt: skip
def test_turns_of_templates(metadata, template, expected) -> None:
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": template})
    assert named(tokenizer, turn_ends(tokenizer)) == expected


def test_a_turn_end_that_is_only_user_defined(metadata) -> None:
    """Some converters forget to mark it as a control token; a newline that is a token of its own is no turn's end."""
    types = [4 if kind == 3 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.token_type": types})
    assert named(tokenizer, turn_ends(tokenizer)) == {"<|im_end|>"}


def test_a_broken_template_is_told_at_load(metadata, caplog) -> None:
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "{% for %}"})
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        assert turn_ends(tokenizer, "model.gguf") == ()
    assert "model.gguf: the model's chat template is broken" in caplog.text


def test_end_tokens_outside_the_vocabulary_are_told_and_ignored(metadata, caplog) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        ends = end_tokens(tokenizer, [-1, 2, 999_999], tokenizer.vocab_size, "folder")
    assert ends == {2, *tokenizer.eos_ids, *turn_ends(tokenizer)}
    assert "folder: end tokens [-1, 999999] are outside the vocabulary" in caplog.text


def test_a_model_without_an_end_token_is_told(metadata, caplog) -> None:
    drop = ("tokenizer.ggml.eos_token_id", "tokenizer.chat_template")
    tokenizer = Tokenizer.from_gguf({k: v for k, v in metadata.items() if k not in drop})
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        assert end_tokens(tokenizer, [], tokenizer.vocab_size, "m") == frozenset()
    assert "m: the model has no end token" in caplog.text


def test_a_tokenizer_that_is_larger_than_the_model(metadata, caplog) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        check_vocabulary(tokenizer, tokenizer.vocab_size, "m")
        assert not caplog.text
        check_vocabulary(tokenizer, tokenizer.vocab_size - 3, "m")
    assert f"the tokenizer has {tokenizer.vocab_size} tokens, the model {tokenizer.vocab_size - 3}" in caplog.text
    with pytest.raises(ModelError, match="encodes even 'a' with token"):
        check_vocabulary(tokenizer, 20, "m")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    return folder


def make(folder: Path) -> LLM:
    return LLM(str(folder), dtype="fp32", kv_memory="1MiB")


def test_min_tokens_with_an_end_token_outside_the_vocabulary(copy, caplog) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 10**9, -7]}))
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        llm = make(copy)
    assert f"{copy}: end tokens [1000000000, -7]" in caplog.text
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, min_tokens=1))
    assert 1 <= len(output.tokens) <= 4 and output.tokens[0] != 2


def test_a_folder_whose_template_ends_turns_with_another_token(copy) -> None:
    """eos is <|endoftext|> in every file, and the template writes <|im_end|>: an answer ends there."""
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(raw | {"eos_token_id": 0}))
    bias = {2: 100.0}
    (output,) = make(copy).generate([[5, 6, 7]], SamplingParams(max_tokens=4, logit_bias=bias, temperature=0.0))
    assert output.finish_reason == "stop" and len(output.tokens) <= 1
