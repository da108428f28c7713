"""Text of a generation, token by token.

Owns the text that is known but not yet certain: bytes that are half a character, and characters that may begin a stop string.
Promises that all deltas together are what decoding the whole output at once gives, ended at the first stop string, and that no
delta holds half a character. A token costs O(its bytes): bytes are decoded as they come, never again.

The output continues the prompt: a SentencePiece word keeps its leading space unless the prompt has no text, and a character
whose first bytes end the prompt comes out with the first output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvloom.engine.text.reader import TokenReader
from kvloom.engine.text.stops import StopMatcher, Stopped
from kvloom.engine.text.tokenizer import Tokenizer


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
        shown: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`prompt`: its token ids, or enough of their tail to hold some text. `shown`: special tokens that are not skipped.
        Stop strings count from token min_tokens + 1."""
        self._reader = TokenReader(tokenizer, prompt, skip_special_tokens=skip_special_tokens, shown=shown)
        self._stops = StopMatcher(stop, include_stop)
        self._unarmed = min_tokens
        self._stopped: str | None = None

    def push(self, token: int) -> Delta:
        """Add a generated token. After a stop, tokens add nothing."""
        if self._stopped is not None:
            return Delta("", self._stopped)
        self._unarmed -= 1
        return self._through_stops(self._reader.push(token))

    def finish(self) -> str:
        """The rest, when generation ended for another reason: text held back, and U+FFFD for half a character."""
        if self._stopped is not None:
            return ""
        rest = self._through_stops(self._reader.finish())
        return rest.text if rest.stopped else rest.text + self._stops.finish()

    def _through_stops(self, text: str) -> Delta:
        passed: Stopped = self._stops.push(text, armed=self._unarmed < 0)
        self._stopped = passed.stop
        return Delta(passed.text, passed.stop)
