"""What is sent and what came of it: jobs and records.

A record keeps raw instants of `time.perf_counter()`, in seconds, so that any definition of TTFT or ITL can be computed
afterwards; a figure is defined once, here or in `measures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request to send."""

    prompt: Sequence[int] | str
    """Token ids, or text."""
    messages: Sequence[Mapping[str, Any]] = ()
    """A whole talk to send to the chat endpoint instead of the prompt, which then only tells its text."""
    output_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body, such as `kv` or `cache_salt`."""
    at: float | None = None
    """Seconds after the start at which a trace sends it."""
    tenant: str = ""
    """Sent as X-KVLoom-Tenant and as `user` if not empty, and with that tenant's API key if one is given."""
    label: str = ""
    """Class of the request in reports, such as "turn 3"."""
    follows: int | None = None
    """Index of an earlier job: this one is sent after it ended, with its prompt and its reply in front."""
    cancel_after: float | None = None
    """Seconds after sending at which the client closes the connection."""
    expect: str | None = None
    """Text that the answer should contain, whatever its case."""
    reusable_tokens: int = 0
    """Prompt tokens that an ideal prefix cache would have held."""
    reusable_anywhere: int = 0
    """Prompt tokens that an ideal cache would have held at any offset."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request as the client saw it."""

    index: int
    tenant: str = ""
    label: str = ""
    scheduled: float = 0.0
    """When it should have been sent."""
    sent: float = 0.0
    """When it was sent; with retries, for the first time."""
    first_byte: float | None = None
    """Arrival of the first byte of the answer's body."""
    chunks: list[float] = field(default_factory=list)
    """Arrival of every chunk that carried text."""
    last: float | None = None
    """Arrival of the last chunk that carried text."""
    ended: float | None = None
    """When the request was over, however it ended."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_from: str = "chunks"
    """`usage` if the server told the number of output tokens, `chunks` if chunks with text were counted instead."""
    cached_tokens: int | None = None
    kv: dict[str, Any] | None = None
    """`usage.kv`, as kvloom tells it."""
    finish_reason: str | None = None
    text: str = ""
    status: int | None = None
    """HTTP status of the last answer."""
    error: str | None = None
    error_kind: str | None = None
    """connect, timeout, http_STATUS, stream (broken or wrong answer), empty, or follows (the job before it failed)."""
    retries: int = 0
    cancelled: bool = False
    """Whether the client ended it: as the job asked, or because the run was interrupted."""
    correct: bool | None = None
    """Whether the answer held the expected text; None if none was expected or the request was not completed."""
    reusable_tokens: int = 0
    reusable_anywhere: int = 0

    @classmethod
    def of(cls, index: int, job: Job, scheduled: float = 0.0) -> Record:
        """The empty record of a job."""
        return cls(index=index, tenant=job.tenant, label=job.label, scheduled=scheduled,
                   reusable_tokens=job.reusable_tokens, reusable_anywhere=job.reusable_anywhere)  # fmt: skip

    def fail(self, kind: str, error: str) -> None:
        self.error_kind, self.error = kind, error

    @property
    def ok(self) -> bool:
        """Whether it was completed: neither failed nor cancelled."""
        return self.error is None and not self.cancelled

    @property
    def lag(self) -> float:
        """Seconds by which the client sent it late."""
        return self.sent - self.scheduled

    @property
    def first_text(self) -> float | None:
        return self.chunks[0] if self.chunks else None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first non-empty text."""
        return self.chunks[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last text."""
        assert self.last is not None
        return self.last - self.sent

    @property
    def tpot(self) -> float:
        """(E2E - TTFT) / (output tokens - 1), seconds; 0 for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl(self) -> list[float]:
        """Gaps between chunks that carried text, seconds."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:])]
