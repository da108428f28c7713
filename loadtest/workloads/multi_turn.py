"""multi_turn: chats. Every turn is sent after the answer to the one before, with the whole talk in front of it.

Prompts are text, not token ids, as answers come back as text; so lengths are near what is asked for, not exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTurnOptions:
    """Requests come in waves: the first turns of CONVERSATIONS talks, their second turns, ..., then new talks."""

    conversations: int = 8
    """Talks under way at the same time."""
    turns: int = 4
    """Turns of a talk."""
    first_len: int = 256
    """Tokens of what the user says first, about."""
    turn_len: int = 64
    """Tokens of what the user says in a later turn, about."""
    output_len: int = 64
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        require(self, 1, 100_000, "conversations", "turns")
        require(self, 1, LONGEST, "first_len", "turn_len", "output_len")


def build(options: MultiTurnOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    reader = text.reader(f"multi_turn {seed}")
    jobs = []
    for index in range(count):
        turn = index // options.conversations % options.turns
        said = reader.text(options.turn_len if turn else options.first_len)
        gap = "\n\n" if turn else ""
        jobs.append(
            Job(
                prompt=f"{gap}User: {said}\n\nAssistant:",
                output_tokens=options.output_len,
                label=f"turn {turn + 1}",
                follows=index - options.conversations if turn else None,
            )
        )
    return jobs


MULTI_TURN = Workload(
    name="multi_turn",
    help="chats of several turns, each with the whole talk before it in front",
    options=MultiTurnOptions,
    make=build,
)
