"""Requests and their results: data, no behaviour beyond checking their own bounds.

A request has *known* tokens (prompt, then what was sampled) and *computed* tokens (those whose KV is stored). A step moves
the second towards the first; when they meet, the next token is sampled. There are no other phases.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvloom.engine.bounds import Range
from kvloom.engine.requests.sampling import MAX_DRAFT_TOKENS, MAX_INT, SamplingParams

if TYPE_CHECKING:
    from kvloom.engine.constraint.compiler import Grammar
    from kvloom.engine.requests.traits import Looks, Repairing, SelectorTraits

FinishReason = Literal["stop", "length", "abort", "error"]

PRIORITIES = Range(-MAX_INT, MAX_INT)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOptions:
    """What one request asks of the KV cache; the request's `kv` field on the wire. None means the server's default."""

    selection: str | None = None
    """What a decode step reads: a name registered in `engine.selection`."""
    budget: int | None = None
    """Positions that a sparse decode row reads, sinks and recent tokens included."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The selection method's own options; `kv.<method>` on the wire."""
    draft: bool | None = None
    """Use the method only to draft tokens that a dense step verifies: output as if dense."""
    draft_tokens: int | None = None
    """Tokens per draft, 1 to 16."""
    reuse: str | None = None
    """Where KV may come from: a name registered in `engine.reuse` ("off", "exact", "approx")."""
    reuse_options: Mapping[str, Any] = field(default_factory=dict)
    """What approximate reuse may do: fields of `reuse.kvshare.options.RepairOptions`; `kv.kvshare` on the wire."""
    share: str | None = None
    """How far what this request leaves behind for approximate reuse may go: none, tenant, group or public."""
    segment: str | None = None
    """Not a prompt to answer but a text to compile alone, as a segment of this scope (tenant, group, public)."""
    explain: bool = False
    """Tell in `Usage.explanation` what was reused, from where, and what was computed."""

    def reuse_or(self, default: str) -> str:
        """Where KV may come from on a server with this default. A text to compile reuses what is exactly its own."""
        return "exact" if self.segment is not None else self.reuse or default

    @property
    def everywhere(self) -> bool:
        """Whether a request is for every engine that serves the same: an upload is to be found whichever a prompt goes to."""
        return self.segment is not None


class TokenLogprob(NamedTuple):
    """Natural-log probabilities at one position, of the raw logits (before temperature, penalties and filters)."""

    token: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, likeliest first."""


class Status(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence on its way through the engine. Mutable; owned by the engine thread once submitted."""

    id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    kv: KVOptions = KVOptions()
    priority: int = 0
    """Lower runs first, as in vLLM."""
    tenant: str = ""
    cache_salt: str = ""
    """Prefixes are shared only between requests of the same tenant and salt."""
    arrival: float = 0.0
    """time.monotonic() at submission."""
    sequence: int = 0
    """Order of submission; breaks ties of arrival."""
    grammar: Grammar | None = None
    """That of `sampling.structured`, if it has been compiled."""

    tokens: list[int] = field(default_factory=list)
    """Known tokens: prompt, then output."""
    prefill: int = 0
    """Known tokens in front that are computed like a prompt, if that is more than the prompt (`engine.requests.replay`)."""
    replay: list[int] = field(default_factory=list)
    """Output that was known before a preemption and is not in `tokens` yet (`engine.requests.replay`)."""
    computed: int = 0
    """Tokens whose KV is stored: always a prefix of `tokens`."""
    cached: int = 0
    """Prompt tokens that came from the prefix cache at the first admission."""
    written: int = 0
    """Tokens of its prompt in blocks that it made findable; twice if they were evicted and computed again."""
    status: Status = Status.WAITING
    preemptions: int = 0
    left_out: int = 0
    """Steps in a row that had no row for it while it ran."""
    passed: int = 0
    """How often others began while this one waited for memory and was first."""
    first_scheduled: float = 0.0
    first_token: float = 0.0
    seed: int = 0
    """Resolved sampling seed: the request's own, or one drawn for it."""
    token_limit: int = 0
    """Known tokens may not grow beyond this: min(prompt + max_tokens, model length)."""
    selector: SelectorTraits | None = None
    """What decides which positions its decode rows read; None reads all."""
    exact: int = 0
    """Tokens in front whose stored KV is what the prompt's own rule gives (dense, unless prompts are computed sparsely):
    only these may be published. At most `computed`."""
    draft_tokens: int = 0
    """Tokens per draft; 0: no drafting."""
    drafts: int = 0
    """Tokens at the end of `tokens` that are drafts, not yet verified."""
    draft_room: int = MAX_DRAFT_TOKENS
    """Most drafts that a step of this engine can verify at once, beside the row they stand on."""
    draft_until: int = MAX_INT
    """Known tokens that drafts may reach: what is verified together sees what each row would see alone (`engine.retention`)."""
    drafted: int = 0
    """Drafts made so far."""
    accepted: int = 0
    """Drafts that verification kept."""

    verifying: bool = False
    """Whether the next rows are a dense pass over the drafts."""
    correct_every: int = 0
    """Once so many tokens have approximate KV, they are computed again, densely; 0 for never."""
    correcting: bool = False
    """Whether the next rows are that pass."""
    corrected: int = 0
    """Tokens in front that the last such pass left computed densely."""
    internal: bool = False
    """The engine's own: gives way to others, and nobody gets its output."""
    approximate: bool = False
    """Whether KV may come from other places than an exact prefix, and be repaired (`engine.reuse.kvshare`)."""
    reused: int = 0
    """Tokens whose KV was copied from a donor and kept so in the prompt pass."""
    recomputed: int = 0
    """Tokens whose KV was copied, or could have been, and was computed in the prompt pass."""
    unprepared: bool = False
    """Admitted, but such KV has not been looked for yet."""
    looks: Looks | None = None
    """Rows that are looked at before it is decided what is computed."""
    repair: Repairing | None = None
    """Which of its rows hold such KV, and which are computed."""

    @property
    def taint(self) -> int:
        """The first position whose stored KV is reused and not repaired: what comes after it is approximate."""
        return len(self.tokens) if self.repair is None else self.repair.taint

    @property
    def pending(self) -> int:
        """Rows to compute before the next token is sampled, as far as is known."""
        if self.looks is not None:
            return self.looks.left
        left = 0 if self.repair is None else self.repair.left
        return left or len(self.tokens) - self.computed

    @property
    def draft_limit(self) -> int:
        """Drafts that make sense now: the token after the last one must be allowed too, and a step must have room for all."""
        known = len(self.tokens) - self.drafts
        return min(self.draft_tokens, self.draft_room, self.token_limit - known - 1, self.draft_until - known)

    @property
    def sparse(self) -> bool:
        """Whether its next decode row is the selector's business: always, or with drafting while it drafts."""
        if self.selector is None or not self.draft_tokens:
            return self.selector is not None and not self.correcting
        drafting = not self.verifying and not self.replay and self.draft_limit > 0
        return drafting and len(self.tokens) - self.drafts > self.selector.budget

    def drop_drafts(self) -> list[int]:
        """Take the drafts off the known tokens and return them."""
        drafts = self.tokens[len(self.tokens) - self.drafts :]
        del self.tokens[len(self.tokens) - self.drafts :]
        self.drafts, self.verifying = 0, False
        return drafts

    @property
    def output(self) -> list[int]:
        """Generated tokens so far (a copy)."""
        return [*self.tokens[len(self.prompt) :], *self.replay]

    @property
    def known(self) -> int:
        """Number of tokens of prompt and output so far, those to be replayed among them."""
        return len(self.tokens) + len(self.replay)

    @property
    def generated(self) -> int:
        """Number of generated tokens so far."""
        return self.known - len(self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a request so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was reused exactly."""
    written_tokens: int = 0
    """Prompt tokens whose KV was computed, and is kept from now on for others to find; at most the rest of the prompt."""
    reused_tokens: int = 0
    """Prompt tokens whose KV was reused approximately, as it was copied."""
    recomputed_tokens: int = 0
    """Prompt tokens whose KV could have been reused approximately, but was computed."""
    explanation: Mapping[str, Any] | None = None
    """With `KVOptions.explain`, in the last output: what was reused and why no more."""
    attended_tokens: int = 0
    """Key positions read per query row, summed over decode steps (mean over layers and KV heads)."""
    held_tokens: int = 0
    """Key positions there were to read in those steps."""
    drafted_tokens: int = 0
    """Tokens drafted by sparse steps, and how many of them the dense verification kept."""
    accepted_tokens: int = 0
    preemptions: int = 0
    queue_seconds: float = 0.0
    """From submission to the first step that computed something of it."""
    resumed: Literal["", "exact", "approximate"] = ""
    """Whether another engine took it up where one was lost, and how the rest of it compares with what would have followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a step added to a request. Fields are deltas unless said otherwise.

    A delta may carry tokens without text (half a character, or text held back because it may begin a stop string).
    """

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token in `tokens` when asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Whole prompt at once, with the first output; the first entry is None."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or string that ended it, if one did."""
    error: str | None = None
    """With finish_reason "error": what happened,"""
    param: str | None = None
    """and the field of the request that is to blame; None if none is."""
    usage: Usage
    """Totals so far."""
