"""How much one look-up may do, counted in tokens that are compared or hashed.

Donors are made by clients, so how many of them a prompt leads to is for clients to choose. The allowance grows as a look-up
goes through its prompt: what is spent on its beginning is not taken from its end.
"""

from __future__ import annotations

PER_TOKEN = 64
"""Tokens compared per token of the prompt,"""
AT_ONCE = 16384
"""and those that may be compared beyond that anywhere."""
LEAST = 32
"""What any comparison counts for, however short."""


class Work:
    """The allowance of one look-up."""

    __slots__ = ("done", "limit", "refused")

    def __init__(self) -> None:
        self.done, self.limit, self.refused = 0, AT_ONCE, 0
        """Tokens compared; how many may be by now; comparisons that were left out."""

    def reach(self, tokens: int) -> None:
        """The look-up has got so far into its prompt."""
        self.limit = AT_ONCE + PER_TOKEN * tokens

    def allows(self, tokens: int) -> bool:
        """Count a comparison of so many tokens, and say whether it may be made."""
        cost = max(LEAST, tokens)
        if self.done + cost > self.limit:
            self.refused += 1
            return False
        self.done += cost
        return True
