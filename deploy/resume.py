"""A request that another replica takes up where one was lost: what it is sent, and which of its outputs are new.

The seed is drawn in front, so both draw alike. What the client has is sent as `forced_tokens`: each is computed as a decode row
like any other, and sampling goes on behind them. Their outputs come again and are dropped, tokens by number and text by
characters: a token's text may have waited, in the one replica or the other, for what completes a character or a stop string.

With exact reuse and the same kernels the answer is token for token what it would have been. With approximate reuse it may not
be, since the other replica holds other segments: `Usage.resumed` says so.
"""

from __future__ import annotations

from dataclasses import replace

from kvloom.engine.requests.request import RequestOutput
from kvloom.engine.requests.sampling import SamplingParams


class Received:
    """What has come of one request so far, over all tries."""

    def __init__(self, sampling: SamplingParams) -> None:
        """sampling: with a seed, if anything is drawn."""
        self.tokens: list[int] = []
        self.tries = 0
        self._sampling = sampling
        self._characters = 0
        self._prompt_told = False
        self._approximate = False
        self._again = 0  # of the try that runs: tokens
        self._again_characters = 0

    def next_try(self) -> SamplingParams:
        """What the next replica is sent."""
        self.tries += 1
        self._again = self._again_characters = 0
        given = self._sampling.forced_tokens
        return replace(self._sampling, forced_tokens=(*self.tokens, *given[len(self.tokens) :]))

    def new(self, output: RequestOutput) -> RequestOutput | None:
        """What of an output the client does not have yet; None if it has all of it."""
        old = max(0, min(len(output.tokens), len(self.tokens) - self._again))
        old_characters = max(0, min(len(output.text), self._characters - self._again_characters))
        self._again += len(output.tokens)
        self._again_characters += len(output.text)
        tokens, text = output.tokens[old:], output.text[old_characters:]
        self.tokens += tokens
        self._characters += len(text)
        self._approximate |= output.usage.reused_tokens > 0
        told = None if self._prompt_told else output.prompt_logprobs
        self._prompt_told |= told is not None
        if self.tries <= 1:
            return output
        if not tokens and not text and output.finish_reason is None and told is None:
            return None
        return replace(
            output, tokens=tokens, text=text, logprobs=output.logprobs[old:], prompt_logprobs=told,
            usage=replace(output.usage, resumed="approximate" if self._approximate else "exact"),
        )  # fmt: skip
