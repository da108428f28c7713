"""What a step's last rows make of their requests: tokens are drawn for all of them at once, then each request gets its own.

    launch    `draw`    all rows in one call; nothing waits for what is drawn
    collect   `take`    request by request: known tokens, drafts, text, the end

A token's random number depends on its request's seed and its index alone, and a draft and its verification draw with the same
one. So what comes out with drafts is what dense decoding with that seed gives, and drafts that were sampled from a near
distribution mostly agree: no correction of probabilities is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from kvloom.engine.cache import BlockTable
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.lifecycle import Features
from kvloom.engine.requests.replay import append, correct, replay_next
from kvloom.engine.requests.request import Request, RequestOutput
from kvloom.engine.requests.stats import EngineStats
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.step.logprobs import logprobs
from kvloom.engine.step.masks import Constraints, drawn_rows
from kvloom.engine.step.output import OutputState
from kvloom.engine.step.runner import Fed, Runner, StepResult
from kvloom.engine.step.sampler import Drawn, Sampled, SampleError, Sampler, Token
from kvloom.engine.text import Tokenizer

PROMPT_ROWS = 128
"""Prompt log-probabilities are computed this many rows at a time: a row of logits is as wide as the vocabulary."""


class End(NamedTuple):
    """A chunk whose last rows are drawn from."""

    chunk: Chunk
    rows: range
    """Of the step."""

    @property
    def drawn(self) -> list[Drawn]:
        """Every row's token: the last one's is the next of all that are known."""
        known = self.chunk.stop
        return [Drawn(self.chunk.request, known - later) for later in reversed(range(len(self.rows)))]


class Draw(NamedTuple):
    """Tokens of a step, which may still be on their way."""

    ends: list[End]
    logits: Tensor
    """[rows of all ends, vocab] fp32, in their order."""
    sampled: Sampled

    def fed(self, chunks: Sequence[Chunk]) -> Fed:
        """What is drawn here as tokens of these chunks, each of one row of a request with one token among those drawn."""
        place = {end.chunk.request: i for i, end in enumerate(self.ends)}
        return Fed(self.sampled.there, [place[chunk.request] for chunk in chunks])

    def each(self) -> Iterator[tuple[End, list[Token], range]]:
        """Wait for them. Of every end: its tokens, and their rows of `logits`."""
        tokens, at = self.sampled.read(), 0
        for end in self.ends:
            first, at = at, at + len(end.rows)
            yield end, tokens[first:at], range(first, at)


class Decoding:
    """Text sides of open requests, and the sampler."""

    def __init__(
        self,
        sampler: Sampler,
        runner: Runner,
        tokenizer: Tokenizer,
        eos: frozenset[int],
        features: Features,
        statistics: EngineStats,
        table: Callable[[Request], BlockTable],
        constraints: Constraints,
    ) -> None:
        """table: where an open request's KV is."""
        self._table, self.constraints = table, constraints
        self._sampler, self._runner, self._tokenizer = sampler, runner, tokenizer
        self._eos, self._eos_ids = eos, sorted(eos)
        self._features, self._statistics = features, statistics
        self._states: dict[str, OutputState] = {}
        self.observer: Callable[[Request, Tensor], None] | None = None
        """See `EngineCore.observer`."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def open(self, request: Request) -> None:
        """Its text begins. Raises InvalidRequestError if it leaves itself no token to generate."""
        self._sampler.open(request, self._eos_ids)
        self._states[request.id] = OutputState(request, self._tokenizer, self._eos)

    def close(self, request: Request) -> None:
        """Forget it. Harmless if called again."""
        self._states.pop(request.id, None)
        self._sampler.drop(request)

    def has(self, request: Request) -> bool:
        """Whether it is open, and not another of the same id."""
        state = self._states.get(request.id)
        return state is not None and state.request is request

    def state(self, request_id: str) -> OutputState | None:
        """Of an open request."""
        return self._states.get(request_id)

    # Launch ---------------------------------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> None:
        """Have computed beside the model's run what rows may draw."""
        self.constraints.begin(plan.chunks)

    def draw(self, plan: StepPlan, result: StepResult) -> Draw:
        """Draw from all rows that have a token after them."""
        ends = []
        for chunk, start in zip(plan.chunks, result.starts):
            if count := drawn_rows(chunk):
                stop = start + chunk.count
                ends.append(End(chunk, range(stop - count, stop)))
        rows = [row for end in ends for row in end.rows]
        if not rows:
            return Draw([], result.hidden[:0], Sampled.nothing())
        logits = self._runner.logits(result, rows)
        drawn = [drawn for end in ends for drawn in end.drawn]
        return Draw(ends, logits, self._sampler.sample(logits, drawn, self._eos_ids, self.constraints.masks()))

    # Collect --------------------------------------------------------------------------------------------------------

    def take(self, end: End, tokens: Sequence[Token], logits: Tensor, rows: range) -> Iterator[RequestOutput]:
        """What comes of the last rows of a request's chunk; nothing of one that has ended. tokens: drawn from these rows of
        the logits [all rows, vocab]."""
        request = end.chunk.request
        if not self.has(request):
            return
        if request.verifying:
            yield from self._verify(request, tokens, logits, rows)
        elif request.draft_tokens and end.chunk.decodes and request.sparse:
            self._draft(request, tokens[0])
        else:
            yield self._next(request, tokens[0], logits, rows[0])

    def computed(self, chunk: Chunk, attended: float) -> None:
        """A chunk is computed, and its last row saw so many positions. A token to be replayed behind it is known again."""
        request = chunk.request
        if not chunk.samples:
            return
        if request.replay:
            replay_next(request)
            self._statistics.replayed_tokens += 1
        elif chunk.start >= len(request.prompt):
            self._states[request.id].attended(attended, chunk.stop)

    def score_prompt(self, chunk: Chunk, result: StepResult, first_row: int) -> None:
        """Log-probabilities of prompt tokens, for a request that wants them: row p scores token p + 1."""
        request, found = chunk.request, self._states[chunk.request.id].prompt_logprobs
        if found is None:
            return
        begin, end = len(found) - 1, min(chunk.stop, len(request.prompt) - 1)
        for low in range(begin, end, PROMPT_ROWS):
            high = min(low + PROMPT_ROWS, end)
            rows = [first_row + position - chunk.start for position in range(low, high)]
            targets = list(request.prompt[low + 1 : high + 1])
            top = request.sampling.prompt_logprobs
            assert top is not None
            found.extend(logprobs(self._runner.logits(result, rows), targets, top))

    def _next(self, request: Request, token: Token, logits: Tensor, row: int) -> RequestOutput:
        """Hand out the next token of a request, which was drawn from this row of the logits."""
        state = self._states[request.id]
        if self.observer is not None:
            self.observer(request, logits[row : row + 1])
        for feature in self._features:
            feature.sampled(request, logits, row)
        if isinstance(token, SampleError):
            return state.end("error", str(token), token.param)
        if isinstance(token, InvalidRequestError):
            return state.end("error", str(token), token.param)
        if isinstance(token, Exception):
            raise token
        if not request.first_token:
            request.first_token = time.monotonic()
            self._statistics.prompt_tokens += len(request.prompt)
            for feature in self._features:
                feature.prefilled(request, self._table(request))
        append(request, token)
        self._statistics.generation_tokens += 1
        top = request.sampling.logprobs
        given = request.sampling.logprob_token_ids
        try:
            complete = self.constraints.accept(request, token)
        except InvalidRequestError as error:
            return state.end("error", str(error), error.param)
        told = None if top is None else logprobs(logits[row : row + 1], [token], top, given)[0]
        output = state.push(token, told, complete=complete)
        if output.finish_reason is None:
            correct(request)
        return output

    def _draft(self, request: Request, token: Token) -> None:
        """Keep a draft: known to the engine, handed out only once a dense step agrees."""
        if isinstance(token, int):
            request.tokens.append(token)
            request.drafts += 1
            request.drafted += 1
            self._statistics.drafted_tokens += 1
        if not isinstance(token, int) or request.drafts >= request.draft_limit or token in self._eos:
            request.verifying = True
            request.computed = len(request.tokens) - request.drafts - 1

    def _verify(self, request: Request, tokens: Sequence[Token], logits: Tensor, rows: range) -> Iterator[RequestOutput]:
        """Hand out what the dense logits of every draft, drafts + 1 rows, give, as long as the drafts agree."""
        drafts = request.drop_drafts()
        self._statistics.drafts += 1
        for i, token in enumerate(tokens):
            output = self._next(request, token, logits, rows[i])
            agrees = output.finish_reason != "error" and i < len(drafts) and request.tokens[-1] == drafts[i]
            request.accepted += agrees
            self._statistics.accepted_tokens += agrees
            yield output
            if output.finish_reason is not None:
                return
            if not agrees:
                break
        request.computed = len(request.tokens) - 1
        request.exact = min(request.exact, request.computed)
