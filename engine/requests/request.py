"""Requests and their results: data, no behaviour beyond checking their own bounds.

A request has *known* tokens (prompt, then what was sampled) and *computed* tokens (those whose KV is stored). A step moves
the second towards the first; when they meet, the next token is sampled. There are no other phases.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvloom.engine.bounds import Range, bounded, shown, wrong
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from kvloom.engine.constraint.compiler import Grammar
    from kvloom.engine.requests.traits import Looks, Repairing, SelectorTraits

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_INT = 2**31 - 1
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_ALLOWED_TOKENS = 65536
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256
MAX_LOGPROB_TOKENS = 128
MAX_DRAFT_TOKENS = 16
TOKEN_LISTS = ("logit_bias", "stop_token_ids", "forced_tokens", "allowed_token_ids", "logprob_token_ids")
"""Fields of SamplingParams that name tokens, all of which must be the model's."""
PRIORITIES = Range(-MAX_INT, MAX_INT)


class SamplingDefaults(NamedTuple):
    """What a server samples with where a request does not say: a model's own recommendation, or else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    """Tokens of a chat that does not say how many; None for what the context holds."""
    most_tokens: int | None = None
    """No answer has more, whatever a request says; None for no such limit."""

    def said(self) -> dict[str, Any]:
        """Of these by name, those that there are."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def drawing(self) -> dict[str, Any]:
        """Fields of SamplingParams: all but how many tokens."""
        return {name: value for name, value in self._asdict().items() if name not in ("max_tokens", "most_tokens")}

    def limited(self, max_tokens: int | None) -> int | None:
        """The number of tokens that was asked for, or what it may be at most."""
        return min((count for count in (max_tokens, self.most_tokens) if count is not None), default=None)


OPENAI_SAMPLING = SamplingDefaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Field names and defaults are those of the OpenAI API and of vLLM's extensions to it."""

    n: int = bounded(1, 1, MAX_CHOICES)
    """Completions per prompt, 1 to 128. Each is a request of its own to the engine: see `choices`."""
    max_tokens: int | None = bounded(None, 1, MAX_INT)
    """Most tokens to generate; None means `default_tokens`."""
    default_tokens: int | None = bounded(None, 1, MAX_INT)
    """How many where nobody says how many: this, or `min_tokens` if that is more, or what the context has room for if that is
    less; None means up to the model's context."""
    min_tokens: int = bounded(0, 0, MAX_INT)
    """No end-of-sequence, stop token or stop string before this many tokens."""
    temperature: float = bounded(1.0, 0, 100)
    """0 is greedy."""
    top_p: float = bounded(1.0, 0, 1, note="0 is greedy")
    """Keep the smallest set of tokens whose probability reaches this, in [0, 1]; 0 keeps the likeliest alone."""
    top_k: int = bounded(0, -1, MAX_INT, note="0 or -1 for all")
    """Keep this many tokens; 0 or -1 keeps all."""
    min_p: float = bounded(0.0, 0, 1)
    """Keep tokens at least this likely relative to the likeliest, in [0, 1]."""
    presence_penalty: float = bounded(0.0, -2, 2)
    """Subtracted once from the logit of every generated token, in [-2, 2]."""
    frequency_penalty: float = bounded(0.0, -2, 2)
    """Subtracted per occurrence from the logit of every generated token, in [-2, 2]."""
    repetition_penalty: float = bounded(1.0, 0.01, 100)
    """Divides (multiplies, if negative) the logits of tokens seen in prompt or output, 0.01 to 100."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"range": Range(-100, 100)})
    """Added to the logits of the given token ids; each in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | None = bounded(None, 0, MAX_INT)
    """Only these are generated, ends included: without an end among them it goes on to `max_tokens`. None allows all."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated: the last token of each, alone or behind a space, is not drawn where the tokens before it
    were generated. As in vLLM, that is of the text as it is encoded: another way to spell it in tokens is not seen."""
    seed: int | None = bounded(None, -(2**63), 2**64 - 1)
    """Same seed, same prompt, same parameters: same text, whatever else is in the batch. None, or -1 as in other servers,
    draws one for each completion."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; they are not part of the text."""
    stop_token_ids: tuple[int, ...] = bounded((), 0, MAX_INT)
    """Generation ends at these tokens, beside the model's own end-of-sequence."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""
    ignore_eos: bool = False
    """Go on after end-of-sequence."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_special_tokens: tuple[int, ...] = bounded((), 0, MAX_INT)
    """Special tokens that are text even so: marks of tool calls and thoughts, for a server that reads them."""
    logprobs: int | None = bounded(None, 0, MAX_LOGPROBS)
    """Log-probabilities of the sampled token and of this many likeliest ones, per generated token; None for none."""
    logprob_token_ids: tuple[int, ...] = bounded((), 0, MAX_INT)
    """With `logprobs`: the tokens to tell the log-probabilities of, per generated token, in the place of the likeliest."""
    prompt_logprobs: int | None = bounded(None, 0, MAX_LOGPROBS)
    """The same as `logprobs` for every prompt token after the first. Such a prompt is computed in full: no prefix is reused."""
    forced_tokens: tuple[int, ...] = bounded((), 0, MAX_INT)
    """Teacher forcing: the first generated tokens are these, each computed as a decode row like any other; sampling goes on
    after them. With `logprobs`, each comes with its own log-probability. Nothing ends generation before them."""
    structured: StructuredOutput | None = None
    """What the text must look like; None for anything."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{name} is {shown(getattr(self, name))}; allowed: {allowed}", param=name)

        if (found := wrong(self)) is not None:
            raise InvalidRequestError(f"{found.name} is {shown(found.value)}; allowed: {found.allowed}", param=found.name)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        check(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} token ids")
        check(all(0 <= t <= MAX_INT for t in self.logit_bias), "logit_bias", "token ids of 0 or more")
        check(
            len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop),
            "stop",
            f"at most {MAX_STOPS} non-empty strings of at most {MAX_STOP_LENGTH} characters",
        )
        allowed = self.allowed_token_ids
        check(allowed is None or 0 < len(allowed) <= MAX_ALLOWED_TOKENS, "allowed_token_ids",
              f"1 to {MAX_ALLOWED_TOKENS} token ids")  # fmt: skip
        check(
            len(self.bad_words) <= MAX_BAD_WORDS
            and all(word.strip() and len(word) <= MAX_BAD_WORD_LENGTH for word in self.bad_words),
            "bad_words",
            f"at most {MAX_BAD_WORDS} strings of at most {MAX_BAD_WORD_LENGTH} characters, none of them blank",
        )
        check(len(self.logprob_token_ids) <= MAX_LOGPROB_TOKENS, "logprob_token_ids",
              f"at most {MAX_LOGPROB_TOKENS} token ids")  # fmt: skip
        check(not self.logprob_token_ids or self.logprobs is not None, "logprob_token_ids", "only with logprobs")
        check(len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} token ids")
        check(
            self.max_tokens is None or len(self.forced_tokens) <= self.max_tokens, "forced_tokens", "at most max_tokens of them"
        )
        check(self.n == 1 or not self.forced_tokens, "forced_tokens", "only with n = 1")

    @property
    def penalises(self) -> bool:
        """Whether logits change by what is known in front of them."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def remembers(self) -> bool:
        """Whether the host has to know all tokens before the next is drawn."""
        return self.penalises or bool(self.bad_words) or self.structured is not None

    @property
    def least_tokens(self) -> int:
        """Tokens before which nothing may end generation."""
        return max(self.min_tokens, len(self.forced_tokens))

    def most_tokens(self, room: int) -> int:
        """Most tokens to generate where the context has room for so many more."""
        if self.max_tokens is not None:
            return self.max_tokens
        return room if self.default_tokens is None else min(room, max(self.default_tokens, self.least_tokens))

    def choices(self) -> list[SamplingParams]:
        """One SamplingParams with n = 1 per completion; a given seed becomes seed, seed + 1, ..."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else (self.seed + i) % 2**64 for i in range(self.n)]
        return [self._choice(seed) for seed in seeds]

    def _choice(self, seed: int | None) -> SamplingParams:
        """One of several completions. Everything else was checked when this was made."""
        made = copy.copy(self)
        object.__setattr__(made, "n", 1)
        object.__setattr__(made, "seed", seed)
        return made


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
