"""What a request may ask for, whatever else runs: checked before it is queued."""

from __future__ import annotations

from typing import NamedTuple

from kvloom.engine.bounds import shown
from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.sampling import TOKEN_LISTS, SamplingParams
from kvloom.engine.reuse import REUSE


class Limits(NamedTuple):
    """What a request may ask for, whatever else runs."""

    max_model_len: int
    trained_len: int
    """Positions that the model was trained for: without a selection that goes beyond, a request has no more."""
    vocab_size: int

    def check(
        self,
        prompt_length: int,
        largest_token: int,
        smallest_token: int,
        sampling: SamplingParams,
        kv: KVOptions,
        *,
        extrapolates: bool = False,
    ) -> int:
        """The request's token limit, prompt + output. Raises InvalidRequestError if it could never be served."""
        if prompt_length == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        if smallest_token < 0 or largest_token >= self.vocab_size:
            bad = smallest_token if smallest_token < 0 else largest_token
            raise InvalidRequestError(f"token id {bad} is outside the vocabulary, 0 to {self.vocab_size - 1}", param="prompt")
        longest = self.max_model_len if extrapolates else min(self.max_model_len, self.trained_len)
        hint = ""
        if longest < self.max_model_len:
            hint = ", or use kv.selection token_select with re-indexed positions and a prefill_budget"
        room = longest - prompt_length
        if room < 1:
            why = f"the prompt has {prompt_length} tokens and leaves no room for an answer; shorten the prompt{hint}"
            raise ContextLengthError.beyond(longest, why, "prompt")
        asked = {"max_tokens": sampling.max_tokens or 0, "min_tokens": sampling.min_tokens,
                 "forced_tokens": len(sampling.forced_tokens)}  # fmt: skip
        for name, count in asked.items():
            if count > room:
                why = f"the prompt has {prompt_length} tokens and {name} is {count}; ask for at most {room}{hint}"
                raise ContextLengthError.beyond(longest, why, name)
        for name in TOKEN_LISTS:
            largest = max(getattr(sampling, name) or (), default=0)
            if largest >= self.vocab_size:
                raise InvalidRequestError(
                    f"token id {largest} is outside the vocabulary, 0 to {self.vocab_size - 1}", param=name
                )
        if kv.reuse is not None and kv.reuse not in REUSE:
            raise InvalidRequestError(f"kv.reuse is {shown(kv.reuse)}; allowed: {', '.join(REUSE)}", param="kv.reuse")
        return prompt_length + sampling.most_tokens(room)
