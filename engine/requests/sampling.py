"""How tokens are chosen: what a request may ask for, within its bounds, and what holds where it does not say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kvloom.engine.bounds import Range, bounded, shown, wrong
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    pass

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
