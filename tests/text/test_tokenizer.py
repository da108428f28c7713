"""Tokenizer: the same ids as transformers, from a GGUF and from a folder; bytes that add up to the text."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text import Tokenizer

SAMPLES = [
    "",
    " ",
    "Hello, world! It's DON'T, they'll we've I'm",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 100 % done\n\n\nclass A:\n\tpass\r\n",
    "1234567 3.14159 1,000 0x1F ²³ ½ ١٢٣",
    "Numbered:\n\n1. one\n\n2. two\n   3. three  42",
    "🎉👍🏽👨‍👩‍👧‍👦 ❤️ café cafe\u0301 Ångström",
    "日本語のテキスト。你好，世界！한국어 текст عربى",
    "   leading, trailing   \n \n\t \n  ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|",
    "\u200b\u00a0\ufeff\x00\x7f\u2028",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_gguf_equals_transformers(smollm: Tokenizer, reference: Any, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == reference.encode(text)
    assert smollm.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert smollm.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_gguf_equals_transformers_on_any_text(smollm: Tokenizer, reference: Any, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == reference.encode(text)
    assert smollm.decode(ids, skip_special_tokens=False) == reference.decode(ids)  # not always text: some bytes are no token


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans())
def test_decode_equals_the_library_on_any_ids(smollm: Tokenizer, ids: list[int], skip: bool) -> None:
    """Also where the bytes are no UTF-8."""
    assert smollm.decode(ids, skip) == smollm.backend.decode(ids, skip_special_tokens=skip)


def test_digits_are_cut_before_whitespace(smollm: Tokenizer) -> None:
    """As in training: two newlines before a digit are one token. transformers' GGUF reader makes two."""
    assert [smollm.token_text(i) for i in smollm.encode("a\n\n12")] == ["a", "\n\n", "1", "2"]


def test_special_tokens_and_sizes(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert (smollm.bos_id, smollm.eos_ids) == (1, (2,))
    assert smollm.is_special(0) and smollm.is_special(2) and not smollm.is_special(17)
    assert smollm.token_text(2) == "<|im_end|>"
    assert smollm.special_in("a <|im_end|> b") == "<|im_end|>" and smollm.special_in("a < b") is None
    assert smollm.chat_template is not None and "<|im_start|>" in smollm.chat_template


def test_token_bytes_add_up(smollm: Tokenizer) -> None:
    text = "naïve 日本 🎉"
    ids = smollm.encode(text)
    assert b"".join(map(smollm.token_bytes, ids)) == text.encode()
    half = next(i for i in ids if smollm.token_text(i) == "\ufffd")
    assert len(smollm.token_bytes(half)) >= 1


def test_ids_outside_the_vocabulary_are_no_text(smollm: Tokenizer) -> None:
    assert smollm.token_bytes(10**6) == b"" == smollm.token_bytes(-1)
    assert smollm.decode([10**6, *smollm.encode("hi")]) == "hi"


def test_lone_surrogates_are_refused(smollm: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogates"):
        smollm.encode("a\ud800b")


def test_user_defined_tokens_are_whole_but_ordinary(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<think>hello<|end|>")
    assert [byte_level.token_text(i) for i in ids] == ["<think>", "hello", "<|end|>"]
    assert byte_level.decode(ids) == "<think>hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "klingon.*supported: .*smollm"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'; supported"),
        ({"tokenizer.ggml.merges": None}, "without merges"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.merges": ["x nosuchtoken"]}, "merges do not fit"),
    ],
)
def test_unsupported_gguf_is_named(bytes_metadata: dict[str, Any], change: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (bytes_metadata | change).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata)


# SentencePiece -------------------------------------------------------------------------------------------------------


def spm_encode(metadata: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's algorithm, plainly: merge the neighbours that make the best token, until none do."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list(("\u2581" + text).replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="helowrdat .!日é🎉ß", max_size=30))
def test_sentencepiece_equals_the_plain_algorithm(spm: Tokenizer, spm_metadata: dict[str, Any], text: str) -> None:
    ids = spm.encode(text, add_special_tokens=False)
    assert ids == spm_encode(spm_metadata, text)
    assert spm.decode(ids) == text


def test_sentencepiece_adds_bos_and_recognises_specials(spm: Tokenizer) -> None:
    assert spm.encode("hello world")[0] == spm.bos_id == 1
    ids = spm.encode("hello</s>", add_special_tokens=False)
    assert ids[-1] == 2 and spm.decode(ids) == "hello"
    assert spm.token_text(spm.encode("hello", add_special_tokens=False)[0]) == " hello"


# Folder --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, smollm: Tokenizer) -> Path:
    smollm.backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "from config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("text", SAMPLES)
def test_folder_equals_gguf(folder: Path, smollm: Tokenizer, text: str) -> None:
    loaded = Tokenizer.from_folder(folder)
    assert loaded.encode(text) == smollm.encode(text)
    assert loaded.vocab_size == smollm.vocab_size


def test_folder_names_special_tokens(folder: Path) -> None:
    loaded = Tokenizer.from_folder(folder)
    assert (loaded.bos_id, loaded.eos_ids, loaded.chat_template) == (1, (2,), "from config")


def test_folder_adds_bos_and_eos_when_told(folder: Path) -> None:
    plain = Tokenizer.from_folder(folder).encode("hi")
    change(folder, add_bos_token=True)
    assert Tokenizer.from_folder(folder).encode("hi") == [1, *plain]
    assert Tokenizer.from_folder(folder).encode("hi", add_special_tokens=False) == plain
    change(folder, add_eos_token=True)
    assert Tokenizer.from_folder(folder).encode("hi") == [1, *plain, 2]


def test_folder_collects_end_tokens(folder: Path) -> None:
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer.from_folder(folder).eos_ids == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Tokenizer.from_folder(folder).eos_ids == (2, 0)


def test_folder_prefers_the_template_file(folder: Path) -> None:
    (folder / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert Tokenizer.from_folder(folder).chat_template == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.from_folder(folder).chat_template == "from jinja"


def test_folder_takes_the_default_of_named_templates(folder: Path) -> None:
    change(folder, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer.from_folder(folder).chat_template == "d"


def test_folder_ignores_truncation_and_padding(folder: Path, smollm: Tokenizer) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert Tokenizer.from_folder(folder).encode("one two three four") == smollm.encode("one two three four")


def test_broken_folders_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(folder)


def test_other_decoders_are_refused(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer.from_folder(folder)
