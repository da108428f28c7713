"""From sampled tokens to outputs: detokenize, find the end, count.

One `OutputState` per request turns each new token into a `RequestOutput` delta, and decides whether generation is over.
"""

from __future__ import annotations

from kvloom.engine.requests.request import FinishReason, Request, RequestOutput, TokenLogprob, Usage
from kvloom.engine.text import IncrementalDetokenizer, Tokenizer


class OutputState:
    """The text side of one request."""

    def __init__(self, request: Request, tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        sampling = request.sampling
        self.request = request
        self._ends = frozenset() if sampling.ignore_eos else eos
        self._stops = frozenset(sampling.stop_token_ids)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            request.prompt,
            skip_special_tokens=sampling.skip_special_tokens,
            shown=sampling.shown_special_tokens,
            stop=sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.least_tokens,
        )
        self._attended, self._held = 0.0, 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if sampling.prompt_logprobs is None else [None]

    def attended(self, positions: float, held: int) -> None:
        """A decode row read this many of the positions there were."""
        self._attended += positions
        self._held += held

    def push(self, token: int, logprob: TokenLogprob | None, *, complete: bool = False) -> RequestOutput:
        """The output for one sampled token, which is the last of `request.tokens` already. complete: whether nothing may follow
        it (`SamplingParams.structured`)."""
        request = self.request
        finish: FinishReason | None = None
        reason: int | str | None = None
        text = ""
        enough = request.generated >= request.sampling.least_tokens
        if enough and (token in self._ends or token in self._stops):
            finish, reason = "stop", (None if token in self._ends else token)
            if request.sampling.include_stop_str_in_output and token in self._stops:
                text = self._detokenizer.push(token).text
        else:
            text, stopped = self._detokenizer.push(token)
            if stopped is not None:
                finish, reason = "stop", stopped
            elif complete:
                finish = "stop"
            elif len(request.tokens) >= request.token_limit:
                finish = "length"
        if finish is not None and not isinstance(reason, str):
            text += self._detokenizer.finish()
        return self._output(
            text=text,
            tokens=(token,),
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=finish,
            stop_reason=reason,
        )

    def end(self, finish: FinishReason, error: str | None = None, param: str | None = None) -> RequestOutput:
        """The last output of a request that ends without a token: aborted, failed, or nothing to generate. param: the field of
        the request that is to blame for an error."""
        return self._output(
            text=self._detokenizer.finish() if error is None else "",
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=finish,
            error=error,
            param=param,
        )

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)

    def _output(
        self,
        *,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        error: str | None = None,
        param: str | None = None,
    ) -> RequestOutput:
        request = self.request
        usage = Usage(
            prompt_tokens=len(request.prompt),
            completion_tokens=request.generated,
            cached_tokens=request.cached,
            written_tokens=min(request.written, len(request.prompt) - request.cached),
            reused_tokens=request.reused,
            recomputed_tokens=request.recomputed,
            attended_tokens=round(self._attended),
            held_tokens=self._held,
            drafted_tokens=request.drafted,
            accepted_tokens=request.accepted,
            preemptions=request.preemptions,
            queue_seconds=max(0.0, request.first_scheduled - request.arrival),
        )
        return RequestOutput(
            id=request.id,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=error,
            param=param,
            usage=usage,
        )
