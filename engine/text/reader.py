"""Tokens as characters: bytes of a token at a time, read as UTF-8, with the counts that tell where each token stands.

Owns the bytes at the end that are not yet a character. Promises that what all tokens gave is what `Tokenizer.decode` gives for
all of them at once: a space that the tokenizer put before the first word is taken away, skipped special tokens are no text,
and what is no UTF-8 becomes U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvloom.engine.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class TokenReader:
    """Reads one sequence of tokens. Owned by one thread."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, skip_special_tokens: bool = True,
                 shown: Sequence[int] = ()) -> None:  # fmt: skip
        """`before`: tokens that stand in front, or enough of their tail to hold some text: bytes at their end that are no
        character yet come out with what is read. `shown`: special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._shown = frozenset(shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space
        self._stripped = 0
        self._count = 0
        self._read_before(before)

    def push(self, token: int) -> str:
        """The text that a token adds: whole characters."""
        return self._decoded(self.bytes_of(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that did not become whole."""
        return self._decoded(b"", final=True)

    def locate(self, raw: bytes) -> int:
        """Read a token's bytes; returns the index, in the text of everything read, of the character its first byte is part of.

        Characters that `before` left open count from 0, like all that comes out here. A token without bytes stands where the
        next one will.
        """
        if not raw:
            return self._place(self._count)
        self._decoded(raw[:1])
        # Held back is one character that is not whole, or two: Python's decoder waits for the third byte of a surrogate,
        # whose first two are no text however it ends.
        held = len(self._decoder.getstate()[0].decode("utf-8", "replace"))
        found = self._place(self._count + held - 1)  # the character begun last is the one that holds this byte
        self._decoded(raw[1:])
        return found

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes, as far as they are text here."""
        if self._skip_special and self._tokenizer.is_special(token) and token not in self._shown:
            return b""
        return self._tokenizer.token_bytes(token)

    def _place(self, index: int) -> int:
        return max(0, index - self._stripped)

    def _decoded(self, raw: bytes, final: bool = False) -> str:
        text = self._decoder.decode(raw, final)
        self._count += len(text)
        if self._strip_space and text:
            self._strip_space = False
            self._stripped = int(text.startswith(" "))
            return text[self._stripped :]
        return text

    def _read_before(self, tokens: Sequence[int]) -> None:
        """Prime the decoder with the last bytes: as many as can be part of a character that is not complete."""
        tail = b""
        for token in reversed(tokens):
            tail = self.bytes_of(token) + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        if tail:
            self._decoder.decode(tail)
            self._strip_space = False
