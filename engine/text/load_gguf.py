"""A tokenizer from a GGUF file's metadata.

A GGUF holds a vocabulary (`tokenizer.ggml.tokens`, `.merges` or `.scores`, `.token_type`), the name of the rule that cuts text
before merging (`.pre`) and the special ids. The rules themselves live in llama.cpp; those of the models served here are in
`presplit`. Checked against the token ids that llama.cpp's own test vocabularies expect.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from kvloom.engine.errors import ModelError
from kvloom.engine.model.files import Fields, shown
from kvloom.engine.text.presplit import presplit
from kvloom.engine.text.settings import TokenizerSettings, unique
from kvloom.engine.text.spelling import most_bytes

log = logging.getLogger("kvloom.model")

_CONTROL, _USER_DEFINED = 3, 4  # token types
_LONGEST = 4096  # characters of a token; models have some hundred


def load_gguf(metadata: Mapping[str, Any], where: object) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The backend and its settings. where: named in warnings. Raises ModelError naming what is not supported."""
    given = Fields(metadata, "", "tokenizer.ggml.")
    kind = given.text("model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model is {shown(kind)}; supported: gpt2 (byte-level BPE), llama (SentencePiece)")
    vocab = _vocabulary(given)
    if kind == "gpt2":
        backend, adds_bos = _byte_level(given, vocab, where)
    else:
        backend, adds_bos = _sentencepiece(given, vocab, where), True
    _add_special(backend, vocab, given, where)
    return backend, _settings(given, Fields(metadata).text("tokenizer.chat_template"), vocab, adds_bos, where)


def _vocabulary(given: Fields) -> dict[str, int]:
    """Ids of all tokens, in order."""
    tokens = given.array("tokens", str)
    if not tokens:
        raise ModelError("this GGUF holds no tokenizer (tokenizer.ggml.tokens); convert the model again with its tokenizer")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) == len(tokens) and max(map(len, vocab)) <= _LONGEST:
        return vocab
    vocab = {}
    for i, token in enumerate(tokens):
        if vocab.setdefault(token, i) != i:
            raise ModelError(f"tokenizer.ggml.tokens: tokens {vocab[token]} and {i} are both {shown(token)}; convert it again")
        if len(token) > _LONGEST:
            raise ModelError(f"tokenizer.ggml.tokens: token {i} has {len(token)} characters; allowed: {_LONGEST}")
    return vocab


def _settings(
    given: Fields, template: str | None, vocab: Mapping[str, int], adds_bos: bool, where: object
) -> TokenizerSettings:
    vocab_size = len(vocab)

    def token(name: str) -> int | None:
        """A special token's id, None if it is not given or no token."""
        found = given.integer_or_none(f"{name}_token_id")
        if found is not None and not 0 <= found < vocab_size:
            log.warning("%s: tokenizer.ggml.%s_token_id is %d; allowed: 0 to %d; ignored", where, name, found, vocab_size - 1)
            return None
        return found

    return TokenizerSettings(
        bos_id=token("bos"),
        eos_ids=unique([token(name) for name in ("eos", "eot", "eom")]),
        add_bos=given.flag("add_bos_token", adds_bos),
        add_eos=given.flag("add_eos_token"),
        chat_template=template,
        vocab_size=vocab_size,
        most_bytes=most_bytes(vocab),
    )


def _byte_level(given: Fields, vocab: dict[str, int], where: object) -> tuple[tokenizers.Tokenizer, bool]:
    name = given.text("pre")
    if name is None:
        log.warning(
            "%s does not say how text is cut before merging (tokenizer.ggml.pre); 'default' is assumed, and answers suffer if "
            "the model was trained with another rule. Convert the model again with a current converter", where)  # fmt: skip
    rule = presplit(name or "default")
    merges = given.array("merges", str)
    if merges is None:
        raise ModelError("this GGUF has a byte-level vocabulary without merges (tokenizer.ggml.merges); convert it again")
    backend = tokenizers.Tokenizer(_merging(vocab, merges, ignore_merges=rule.whole_words))
    backend.pre_tokenizer = rule.build()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_bos


def _merging(vocab: dict[str, int], merges: Sequence[str], **options: Any) -> models.BPE:
    """The model of a vocabulary with its merges. The library checks them faster than `_pairs`, which says what is wrong."""
    with contextlib.suppress(Exception):  # the library raises bare ones
        if "" not in vocab:  # nothing in front of a space is no token
            pairs: Any = [tuple(merge.split(" ")) for merge in merges]  # of two each, or the library raises
            return models.BPE(vocab=vocab, merges=pairs, **options)
    return _model(vocab, _pairs(merges, vocab), **options)


def _pairs(merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges in two parts. Raises ModelError for one that cannot be made."""
    pairs: list[tuple[str, str]] = []
    for i, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # neither token holds a space, but the first character may not be a separator
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(
                f"tokenizer.ggml.merges do not fit the vocabulary: number {i} is {shown(merge)}; allowed: two tokens with a "
                f"space between, which together are a token, too; convert the model again"
            )
        pairs.append((left, right))
    return pairs


def _sentencepiece(given: Fields, vocab: dict[str, int], where: object) -> tokenizers.Tokenizer:
    """SentencePiece BPE as llama.cpp runs it: every pair that makes a token may merge, the best score first."""
    scores = given.array("scores", float, int)
    if scores is None:
        raise ModelError("this GGUF has a SentencePiece vocabulary without scores (tokenizer.ggml.scores); convert it again")
    _check_length("scores", scores, vocab)
    if not all(map(math.isfinite, scores)):
        raise ModelError("tokenizer.ggml.scores holds numbers that are not finite; convert the model again")
    unknown = given.integer("unknown_token_id", 0)
    if not 0 <= unknown < len(vocab):
        log.warning("%s: tokenizer.ggml.unknown_token_id is %d; allowed: 0 to %d; 0 is used", where, unknown, len(vocab) - 1)
        unknown = 0
    options = {"unk_token": list(vocab)[unknown], "fuse_unk": True, "byte_fallback": True}
    backend = tokenizers.Tokenizer(_model(vocab, _merges_by_score(vocab, scores), **options))
    prefix = given.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _check_length(name: str, entries: Sequence[Any], vocab: Mapping[str, int]) -> None:
    if len(entries) != len(vocab):
        raise ModelError(f"tokenizer.ggml.{name} has {len(entries)} entries for {len(vocab)} tokens; convert the model again")


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


def _add_special(backend: tokenizers.Tokenizer, vocab: Mapping[str, int], given: Fields, where: object) -> None:
    """Control tokens are special; user-defined ones are matched whole in text, too, but are ordinary text when decoded."""
    types = given.array("token_type", int)
    if types is None:
        log.warning("%s does not say which tokens are special (tokenizer.ggml.token_type); none is", where)
        return
    _check_length("token_type", types, vocab)
    kinds = [(token, kind) for token, kind in zip(vocab, types) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in kinds if kind == _USER_DEFINED])
