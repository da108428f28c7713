"""How far one answer has come in its grammar.

    accepted   tokens that are part of the answer
    ahead      drafts behind them that the matcher has been led through; taken back when the answer goes on otherwise

Tokens stay what they are when a request is preempted and computed again, so this is kept meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvloom.engine.constraint.grammar import problem
from kvloom.engine.constraint.options import StructuredOutput

if TYPE_CHECKING:
    import llguidance

TOKEN_SECONDS = 0.05
"""Of a processor, that a token's mask may take before its request ends: thousands of times what it usually takes. Others of the
batch wait for it."""


class Progress:
    """The matcher of one request. Raises InvalidRequestError, here and below, where the grammar cannot be gone on with."""

    def __init__(self, asked: StructuredOutput, matcher: llguidance.LLMatcher) -> None:
        """matcher: at the beginning of its grammar, nobody else's."""
        self.asked = asked
        self._matcher = matcher
        self._ahead: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def check_forced(self, tokens: Sequence[int]) -> None:
        """Raises InvalidRequestError if an answer cannot begin with these tokens."""
        fit = self._matcher.validate_tokens(list(tokens))
        if fit != len(tokens):
            raise self.asked.refused(f"forced_tokens do not fit it behind the first {fit}; force tokens of such an answer")

    def accept(self, token: int) -> None:
        """One more token is part of the answer."""
        with self._timed():
            self._lead(())
            self._matcher.consume_token(token)

    def masks(self, drafts: Sequence[int], out: Any) -> list[bool]:
        """What may follow each of the last drafts, or what is accepted. out: [rows, words] int32 of a bit per token, rows at
        most drafts + 1: the last is for the token behind all drafts. Returns of every row whether only the end may follow.

        Behind a draft that does not fit anything may follow: nothing is ever taken from there.
        """
        only_ends, first = list[bool](), len(drafts) - len(out) + 1
        with self._timed():
            self._lead(drafts[:first])
            for i, row in enumerate(out):
                if i and not self._fits(drafts[first + i - 1]):
                    out[i:] = -1
                    return only_ends + [False] * (len(out) - i)
                self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
                only_ends.append(self._matcher.is_stopped())
        return only_ends

    def _fits(self, draft: int) -> bool:
        fits = self._matcher.validate_tokens([draft]) == 1 and self._matcher.consume_token(draft)
        if fits:
            self._ahead.append(draft)
        return fits

    def _lead(self, drafts: Sequence[int]) -> None:
        """Bring the matcher behind these drafts."""
        if self._ahead != list(drafts[: len(self._ahead)]):
            self._matcher.rollback(len(self._ahead))
            self._ahead = []
        for draft in drafts[len(self._ahead) :]:
            self._matcher.consume_token(draft)
            self._ahead.append(draft)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        took = time.thread_time() - began
        if self._matcher.stop_reason() not in ("NotStopped", "NoExtension", "EndOfSentence"):
            raise self.asked.refused(f"the answer cannot go on: {problem(self._matcher.get_error())}")
        if took > TOKEN_SECONDS:
            raise self.asked.refused(
                f"a token of it takes {took * 1000:.0f} ms; allowed: {TOKEN_SECONDS * 1000:.0f} ms; "
                "make the grammar less ambiguous, or the expression shorter"
            )
