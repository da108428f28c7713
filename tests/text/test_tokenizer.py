"""Tokenizer: the same ids as transformers, from a GGUF and from a folder; bytes that add up to the text."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.errors import InvalidRequestError, ModelError
from kvloom.engine.text import Tokenizer, load_gguf, spelling

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
        ({"tokenizer.ggml.merges": ["h e", "hello"]}, "merges do not fit .*number 1 is 'hello'; allowed: two tokens"),
        ({"tokenizer.ggml.merges": [""]}, "number 0 is ''"),
        ({"tokenizer.ggml.merges": ["h l"]}, "number 0 is 'h l'.*together are a token"),
        ({"tokenizer.ggml.merges": [1, 2]}, "merges is .*a list of str"),
        ({"tokenizer.ggml.merges": "h e"}, "merges is 'h e'; a list of str"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens 0 and 2 are both 'a'"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a" * 5000]}, "token 0 has 5000 characters; allowed: 4096"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries for 263 tokens"),
        ({"tokenizer.ggml.token_type": [0.5] * 263}, "token_type is .*a list of int"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id is 'two'; a whole number"),
        ({"tokenizer.ggml.bos_token_id": [1]}, r"bos_token_id is \[1\]; a whole number"),
        ({"tokenizer.ggml.add_bos_token": 3}, "add_bos_token is 3; true or false"),
        ({"tokenizer.ggml.pre": 3}, "pre is 3; a string"),
        ({"tokenizer.chat_template": 3}, "chat_template is 3; a string"),
    ],
)
def test_unsupported_gguf_is_named(bytes_metadata: dict[str, Any], change: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (bytes_metadata | change).items() if value is not None}
    with pytest.raises(ModelError, match=f"model.gguf: .*{message}"):
        Tokenizer.from_gguf(metadata, "model.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.scores": None}, "without scores"),
        ({"tokenizer.ggml.scores": [0.0]}, "scores has 1 entries for"),
        ({"tokenizer.ggml.scores": ["x"]}, "a list of float"),
        ({"tokenizer.ggml.unknown_token_id": "x"}, "unknown_token_id is 'x'"),
    ],
)
def test_unsupported_sentencepiece_is_named(spm_metadata: dict[str, Any], change: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (spm_metadata | change).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata)
    nan = [float("nan"), *spm_metadata["tokenizer.ggml.scores"][1:]]
    with pytest.raises(ModelError, match="not finite"):
        Tokenizer.from_gguf(spm_metadata | {"tokenizer.ggml.scores": nan})


def test_what_a_gguf_leaves_out_is_assumed_aloud(bytes_metadata: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    def without(key: str) -> Tokenizer:
        caplog.clear()
        return Tokenizer.from_gguf({k: v for k, v in bytes_metadata.items() if k != f"tokenizer.ggml.{key}"}, "model.gguf")

    without("bos_token_id")
    assert not caplog.text
    default = Tokenizer.from_gguf(bytes_metadata | {"tokenizer.ggml.pre": "default"})
    assert without("pre").encode("1234 hello") == default.encode("1234 hello")
    assert "model.gguf does not say how text is cut" in caplog.text and "'default' is assumed" in caplog.text
    assert without("token_type").special_ids == frozenset()
    assert "model.gguf does not say which tokens are special" in caplog.text


def test_special_ids_outside_the_vocabulary_are_told_and_ignored(
    bytes_metadata: dict[str, Any], spm_metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.eot_token_id": 263, "tokenizer.ggml.add_bos_token": True}
    tokenizer = Tokenizer.from_gguf(bytes_metadata | ids, "model.gguf")
    assert tokenizer.bos_id is None and tokenizer.eos_ids == (261,)
    assert tokenizer.encode("hello") == Tokenizer.from_gguf(bytes_metadata).encode("hello")
    assert "model.gguf: tokenizer.ggml.bos_token_id is 1000000; allowed: 0 to 262; ignored" in caplog.text
    assert Tokenizer.from_gguf(spm_metadata | {"tokenizer.ggml.unknown_token_id": 10**9}).vocab_size > 0
    assert "unknown_token_id is 1000000000" in caplog.text


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


@pytest.mark.parametrize(("file", "content", "message"), [
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5; a string or an object"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'; true or false"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template is 5; a string"),
    ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id is 'x'; a whole number"),
    ("generation_config.json", {"eos_token_id": [2, None]}, "eos_token_id is None; a whole number"),
    ("config.json", {"eos_token_id": 1.5}, "config.json: eos_token_id is 1.5"),
    ("special_tokens_map.json", "[" * 100_000, "special_tokens_map.json cannot be read as JSON"),
    ("chat_template.json", "\udcff", "chat_template.json cannot be read as JSON"),
    ("chat_template.jinja", "\udcff", "chat_template.jinja is not UTF-8"),
])  # fmt: skip
def test_broken_fields_of_folders_are_named(folder: Path, file: str, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError, match=message) as error:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(error.value)


def test_a_named_token_that_is_none_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, eos_token="<|nowhere|>")
    assert Tokenizer.from_folder(folder).eos_ids == ()
    assert "names '<|nowhere|>' as eos_token, which tokenizer.json does not have" in caplog.text


def test_entries_of_named_templates_may_be_nonsense(folder: Path) -> None:
    change(folder, chat_template=[3, {"name": ["default"]}, {"name": "default", "template": "d"}])
    assert Tokenizer.from_folder(folder).chat_template == "d"


def test_other_decoders_are_refused(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("odd", ["", "日" * 20])
def test_the_longest_token_is_found_without_spelling_out_the_vocabulary(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a" * (i % 40) + str(i) for i in range(10_000)] + [odd]
    most, spelled = max(len(spelling.byte_level(text)) for text in texts), 0
    spell = spelling.byte_level

    def counted(text: str) -> bytes:
        nonlocal spelled
        spelled += 1
        return spell(text)

    monkeypatch.setattr(spelling, "byte_level", counted)
    assert spelling.most_bytes(texts) == most == (60 if odd else 43) and spelled < 10_000
    assert spelling.most_bytes([]) == 0


def test_the_longest_token_counts_those_that_were_added(byte_level: Tokenizer) -> None:
    assert byte_level.longest_token == max(len(byte_level.token_bytes(i)) for i in range(byte_level.vocab_size)) == 7


def test_merges_of_sound_files_are_checked_by_the_library_alone(
    bytes_metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_gguf, "_pairs", lambda merges, vocab: pytest.fail("each merge was looked at"))
    Tokenizer.from_gguf(bytes_metadata)
