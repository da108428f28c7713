"""Tokenizers that the text tests share."""

from typing import Any

import pytest
from tokenizers import pre_tokenizers

from kvloom.engine.model.gguf_file import read_metadata
from kvloom.engine.startup.catalog import resolve
from kvloom.engine.text import Tokenizer
from kvloom.engine.text.spelling import byte_alphabet


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    """The built-in model's: byte-level BPE."""
    return Tokenizer.from_gguf(read_metadata(resolve("smollm2").path))


@pytest.fixture(scope="session")
def reference() -> Any:
    """transformers' tokenizer of the same GGUF, with the digits cut out first as in the model's own tokenizer.json: its GGUF
    reader leaves that out (see presplit)."""
    from transformers import AutoTokenizer

    path = resolve("smollm2").path
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


@pytest.fixture(scope="session")
def spm_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary: specials, 256 byte tokens, characters, and words with falling scores."""
    pieces = ["\u2581", *"abcdehlorwt.!", "日", "é"]
    words = "he ll hell hello _h _hello or wor ld _w _wor _world _a the".replace("_", "\u2581").split()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *words]
    first_word = len(tokens) - len(words)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * first_word + [-float(i) for i in range(1, len(words) + 1)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(words)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def spm(spm_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata)


@pytest.fixture(scope="session")
def bytes_metadata() -> dict[str, Any]:
    """A byte-level vocabulary of the 256 bytes, a few merges, one control and one user-defined token."""
    alphabet = list(byte_alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


@pytest.fixture(scope="session")
def byte_level(bytes_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(bytes_metadata)
