"""Text of a generation, token by token.

Owns the text that is known but not yet certain: bytes that are half a character, and characters that may begin a stop string.
Promises that all deltas together are what decoding the whole output at once gives, ended at the first stop string, and that no
delta holds half a character. A token costs O(its bytes): bytes are decoded as they come, never again.

The output continues the prompt: a SentencePiece word keeps its leading space unless the prompt has no text, and a character
whose first bytes end the prompt comes out with the first output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from kvloom.engine.text.stops import StopMatcher, Stopped
from kvloom.engine.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class Delta(NamedTuple):
    """What one token added. `stopped` is the stop string that ended the text; nothing comes after it."""

    text: str
    stopped: str | None = None


class IncrementalDetokenizer:
    """One generation's text. Owned by one thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`prompt`: its token ids, or enough of their tail to hold some text. Stop strings count from token min_tokens + 1."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopMatcher(stop, include_stop)
        self._unarmed = min_tokens
        self._stopped: str | None = None
        self._strip_space = tokenizer.strips_first_space
        self._read_prompt(prompt)

    def push(self, token: int) -> Delta:
        """Add a generated token. After a stop, tokens add nothing."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        self._unarmed -= 1
        text = self._without_first_space(self._decoder.decode(self._bytes(token)))
        return self._through_stops(text)

    def finish(self) -> str:
        """The rest, when generation ended for another reason: text held back, and U+FFFD for half a character."""
        if self._stopped is not None:
            return ""
        rest = self._through_stops(self._without_first_space(self._decoder.decode(b"", final=True)))
        return rest.text if rest.stopped else rest.text + self._stops.finish()

    def _through_stops(self, text: str) -> Delta:
        passed: Stopped = self._stops.push(text, armed=self._unarmed < 0)
        self._stopped = passed.stop
        return Delta(passed.text, passed.stop)

    def _bytes(self, token: int) -> bytes:
        if self._skip_special and self._tokenizer.is_special(token):
            return b""
        return self._tokenizer.token_bytes(token)

    def _without_first_space(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text[1:] if text.startswith(" ") else text
        return text

    def _read_prompt(self, prompt: Sequence[int]) -> None:
        """Prime the decoder with the prompt's last bytes: as many as can be part of a character that is not complete."""
        tail = b""
        for token in reversed(prompt):
            tail = self._bytes(token) + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        if tail:
            self._decoder.decode(tail)
            self._strip_space = False
