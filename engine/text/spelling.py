"""How a vocabulary spells bytes.

Two spellings cover the models served here. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) writes each byte as one printable
character. SentencePiece (Llama 2, Mistral, TinyLlama) writes text, with U+2581 for a space and <0xE4> for a single byte.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from kvloom.engine.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

_UTF8_BYTES = 4
"""Most bytes of a character."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(NamedTuple):
    """How to read a token's text."""

    to_bytes: Callable[[str], bytes]
    strips_first_space: bool


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest is moved to U+0100 and above."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def byte_level(text: str) -> bytes:
    """Bytes of a byte-level token. Added tokens may hold other characters; they stand for themselves."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in text])
    except KeyError:
        return text.encode("utf-8")


def most_bytes(texts: Iterable[str]) -> int:
    """Bytes of the longest of some byte-level tokens. Spells out only those whose characters, at most four bytes each, could be
    more than what was found: a vocabulary has 10^5 tokens."""
    texts = list(texts)
    found = max(map(len, texts), default=0)
    for text in sorted((text for text in texts if _UTF8_BYTES * len(text) > found), key=len, reverse=True):
        if _UTF8_BYTES * len(text) <= found:
            break
        found = max(found, len(byte_level(text)))
    return found


def sentencepiece(text: str) -> bytes:
    """Bytes of a SentencePiece token."""
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace("\u2581", " ").encode("utf-8")


def spelling_of(backend: tokenizers.Tokenizer) -> Spelling:
    """The spelling that a tokenizer's decoder undoes. Raises ModelError for others."""
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    by_type = {step["type"]: step for step in steps}
    if "ByteLevel" in by_type:
        return Spelling(byte_level, strips_first_space=False)
    if by_type.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and by_type.keys() & {
        "Replace",
        "Metaspace",
    }:
        strip = by_type.get("Strip", {})
        metaspace = by_type.get("Metaspace", {"prepend_scheme": "never"})
        strips = bool(strip.get("content") == " " and strip.get("start")) or metaspace["prepend_scheme"] != "never"
        return Spelling(sentencepiece, strips_first_space=strips)
    raise ModelError(
        f"the tokenizer decodes with {', '.join(by_type)}; supported are byte-level BPE (ByteLevel) and SentencePiece "
        f"(Replace, ByteFallback, Fuse, Strip, Metaspace)"
    )
