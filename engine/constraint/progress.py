"""How far one answer has come in its grammar.

    accepted   tokens that are part of the answer
    ahead      drafts behind them that the matcher has been led through; taken back when the answer goes on otherwise

Tokens stay what they are when a request is preempted and computed again, so this is kept meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvloom.engine.constraint.grammar import problem
from kvloom.engine.constraint.options import StructuredOutput

if TYPE_CHECKING:
    import llguidance

TOKEN_SECONDS = 0.05
"""Of a processor, that a token's mask may take before its request ends: thousands of times what it usually takes. Others of the
batch wait for it."""
ALONE_STEPS = 16
"""For which masks are computed one by one once all together took longer than that."""


class Progress:
    """The matcher of one request. Raises InvalidRequestError, here and below, where the grammar cannot be gone on with."""

    def __init__(self, asked: StructuredOutput, matcher: llguidance.LLMatcher) -> None:
        """matcher: at the beginning of its grammar, nobody else's."""
        self.asked = asked
        self._matcher = matcher
        self._ahead: list[int] = []

    def check_forced(self, tokens: Sequence[int]) -> None:
        """Raises InvalidRequestError if an answer cannot begin with these tokens."""
        fit = self._matcher.validate_tokens(list(tokens))
        if fit != len(tokens):
            raise self.asked.refused(f"forced_tokens do not fit it behind the first {fit}; force tokens of such an answer")

    def accept(self, token: int) -> bool:
        """One more token is part of the answer. Whether nothing but the end may follow."""
        began = time.thread_time()
        self._lead(())
        self._matcher.consume_token(token)
        return self._stopped(began)

    def masks(self, drafts: Sequence[int], out: Any) -> list[bool]:
        """What may follow each of the last drafts, or what is accepted. out: [rows, words] int32 of a bit per token, rows at
        most drafts + 1: the last is for the token behind all drafts. Returns of every row whether only the end may follow.

        Behind a draft that does not fit anything may follow: nothing is ever taken from there.
        """
        only_ends, first, began = list[bool](), len(drafts) - len(out) + 1, time.thread_time()
        self._lead(drafts[:first])
        for i, row in enumerate(out):
            if i and not self._fits(drafts[first + i - 1]):
                out[i:] = -1
                only_ends += [False] * (len(out) - i)
                break
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            only_ends.append(self._matcher.is_stopped())
        self._stopped(began)
        return only_ends

    def ready(self) -> llguidance.LLMatcher:
        """The matcher behind what is accepted, for a mask that somebody else computes; then `masked` is to be asked."""
        self._lead(())
        return self._matcher

    def masked(self) -> bool:
        """Such a mask is computed: whether only the end may follow."""
        return self._stopped(time.thread_time())

    def _fits(self, draft: int) -> bool:
        fits = self._matcher.validate_tokens([draft]) == 1 and self._matcher.consume_token(draft)
        if fits:
            self._ahead.append(draft)
        return fits

    def _lead(self, drafts: Sequence[int]) -> None:
        """Bring the matcher behind these drafts."""
        if self._ahead and self._ahead != list(drafts[: len(self._ahead)]):
            self._matcher.rollback(len(self._ahead))
            self._ahead = []
        for draft in drafts[len(self._ahead) :]:
            self._matcher.consume_token(draft)
            self._ahead.append(draft)

    def _stopped(self, began: float) -> bool:
        """Whether nothing but the end may follow. began: as `time.thread_time` was before what has been done. Raises
        InvalidRequestError if that failed, or took too long."""
        took, stopped = time.thread_time() - began, self._matcher.is_stopped()
        if stopped and self._matcher.stop_reason() not in ("NotStopped", "NoExtension", "EndOfSentence"):
            raise self.asked.refused(f"the answer cannot go on: {problem(self._matcher.get_error())}")
        if took > TOKEN_SECONDS:
            raise self.asked.refused(
                f"a token of it takes {took * 1000:.0f} ms; allowed: {TOKEN_SECONDS * 1000:.0f} ms; "
                "make the grammar less ambiguous, or the expression shorter"
            )
        return stopped


class Together:
    """Masks of many answers in one call, in which the interpreter's lock is not held: with a call for each, the thread that
    launches the model's kernels waits for the lock again and again.

    What each of them took is not known then. So once all of them took longer than one may, they are computed one by one for
    some steps, where it shows whose that was.
    """

    def __init__(self) -> None:
        self._alone = 0

    def compute(self, answers: Sequence[tuple[Progress, int]], out: Any) -> bool:
        """What may follow what is accepted of these, each into its row of out: [rows, words] int32. False if they are to be
        computed one by one."""
        if self._alone:
            self._alone -= 1
            return False
        if answers:
            began = time.perf_counter()
            ready = [(progress.ready(), row) for progress, row in answers]
            try:
                self._executor.unsafe_compute_mask_ptr(ready, out.ctypes.data, out.strides[0], len(out))
            except ValueError:  # of one of them: by itself, it shows whose that is
                return False
            if time.perf_counter() - began > TOKEN_SECONDS:
                self._alone = ALONE_STEPS
        return True

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        import llguidance

        return llguidance.LLExecutor(num_threads=1)
