"""Token counts on the wire: the cache is the subject here, so `prompt_tokens_details` always tells of it.

cached_tokens         of the prompt, found in the cache: an exact prefix
cache_write_tokens    of the rest, computed and kept from now on: what a later request with the same beginning will find
"""

from __future__ import annotations

from typing import Any

from kvloom.engine.requests.request import Usage

_NOTHING = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)


def _explained(usage: Usage) -> dict[str, Any]:
    """The engine's explanation; it has none of a prompt of which only the exact prefix was looked up."""
    return dict(usage.explanation or {"cached_tokens": usage.cached_tokens, "reason": "only an exact prefix was looked for"})


class UsageTotals:
    """Usage of one HTTP request that may hold several prompts with n completions each.

    A prompt counts once however many completions it has, and so do its cached tokens: those of its first completion, since
    the others find the prompt that the first one left.
    """

    def __init__(self, completions: int, n: int, *, with_kv: bool) -> None:
        self._latest = [_NOTHING] * completions
        self._n = n
        self._with_kv = with_kv
        self._reasoning: dict[int, int] = {}

    def update(self, index: int, usage: Usage, reasoning_tokens: int | None = None) -> None:
        """Note the totals so far of one completion; reasoning_tokens: of its thoughts, where they are told apart."""
        self._latest[index] = usage
        if reasoning_tokens is not None:
            self._reasoning[index] = reasoning_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(usage.prompt_tokens for usage in self._latest[:: self._n])

    @property
    def completion_tokens(self) -> int:
        return sum(usage.completion_tokens for usage in self._latest)

    @property
    def cached_tokens(self) -> int:
        return sum(usage.cached_tokens for usage in self._latest[:: self._n])

    @property
    def written_tokens(self) -> int:
        """Prompt tokens that were not cached and now are, by whichever completion."""
        return min(sum(usage.written_tokens for usage in self._latest), self.prompt_tokens - self.cached_tokens)

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        prompt, completion, cached = self.prompt_tokens, self.completion_tokens, self.cached_tokens
        body: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": self.written_tokens},
        }
        if self._reasoning:
            body["completion_tokens_details"] = {"reasoning_tokens": sum(self._reasoning.values())}
        if self._with_kv:
            names = ("attended_tokens", "held_tokens", "drafted_tokens", "accepted_tokens", "preemptions")
            totals = {name: sum(getattr(usage, name) for usage in self._latest) for name in names}
            reused = {
                name: sum(getattr(usage, name) for usage in self._latest[:: self._n])
                for name in ("cached_tokens", "reused_tokens", "recomputed_tokens")
            }
            body["kv"] = {**reused, **totals}
            if resumed := {usage.resumed for usage in self._latest} - {""}:
                body["kv"]["resumed"] = "approximate" if "approximate" in resumed else "exact"
            told = [_explained(usage) for usage in self._latest[:: self._n] if usage.explanation is not None]
            if told:
                body["kv"]["explain"] = told if len(self._latest) > self._n else told[0]
        return body
