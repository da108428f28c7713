"""A tokenizer from a GGUF file's metadata.

A GGUF holds a vocabulary (`tokenizer.ggml.tokens`, `.merges` or `.scores`, `.token_type`), the name of the rule that cuts text
before merging (`.pre`) and the special ids. The rules themselves live in llama.cpp; those of the models served here are in
`presplit`. Checked against the token ids that llama.cpp's own test vocabularies expect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from kvloom.engine.errors import ModelError
from kvloom.engine.text.presplit import presplit
from kvloom.engine.text.settings import TokenizerSettings, unique

_CONTROL, _USER_DEFINED = 3, 4  # token types


def load_gguf(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The backend and its settings. Raises ModelError naming what is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ModelError("this GGUF holds no tokenizer (tokenizer.ggml.tokens); convert the model again with its tokenizer")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, tokens), True
    else:
        raise ModelError(f"tokenizer.ggml.model is {kind!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece)")
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    return backend, _settings(metadata, len(tokens), adds_bos)


def _settings(metadata: Mapping[str, Any], vocab_size: int, adds_bos: bool) -> TokenizerSettings:
    def get(key: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}")

    ends = [get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    add_bos = get("add_bos_token")
    return TokenizerSettings(
        bos_id=get("bos_token_id"),
        eos_ids=unique([None if i is None else int(i) for i in ends]),
        add_bos=adds_bos if add_bos is None else bool(add_bos),
        add_eos=bool(get("add_eos_token")),
        chat_template=template if isinstance(template, str) else None,
        vocab_size=vocab_size,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    rule = presplit(metadata.get("tokenizer.ggml.pre", "default"))
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ModelError("this GGUF has a byte-level vocabulary without merges (tokenizer.ggml.merges); convert it again")
    # A merge is two tokens with a space between; neither holds a space, but the first character may not be a separator.
    pairs = [(merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(_model(vocab, pairs, ignore_merges=rule.whole_words))
    backend.pre_tokenizer = rule.build()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE as llama.cpp runs it: every pair that makes a token may merge, the best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ModelError("this GGUF has a SentencePiece vocabulary without scores (tokenizer.ggml.scores); convert it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    model = _model(vocab, _merges_by_score(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"this GGUF's merges do not fit its vocabulary ({error}); convert the model again") from error


def _merges_by_score(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges a scored vocabulary implies: each way to cut a token into two tokens, best token first."""
    found: list[tuple[float, int, str, str]] = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-float(scores[i]), i, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are special; user-defined ones are matched whole in text, too, but are ordinary text when decoded."""
    kinds = [(token, int(kind)) for token, kind in zip(tokens, types) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in kinds if kind == _USER_DEFINED])
