"""From logits to the next token.

Owns the order in which a request's parameters act, which is vLLM's:

    logit_bias, min_tokens  ->  repetition, frequency, presence penalty  ->  temperature  ->  min_p  ->  top_k  ->  top_p

Promises that a row's token depends on that row, its request and nothing else: the random number of output i is a function of
(seed, i) alone (Philox with the seed as key and i as counter), so the same seed gives the same text in any batch, and after
preemption. The token is found by the inverse of the distribution function over the kept tokens, likeliest first, ties by id.

No row is sorted as a whole: a histogram over values says in which narrow range a place of the order lies, and only that range
is sorted. So a row costs a few passes over the vocabulary, whether its distribution is peaked or flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.request import Request, SamplingParams, Status

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""

_BUCKETS = 2048
_BUCKETS_PER_UNIT = np.float32(32.0)
"""Buckets per unit of logit over temperature: the last begins where weights fall below exp(-64) of the highest."""


class SampleError(NamedTuple):
    """In place of a token: this request cannot go on, the others of the batch can."""

    message: str


@dataclass(slots=True)
class SamplerState:
    """What penalties need to know of one request, kept up to date token by token. Made again from the request if lost."""

    counts: npt.NDArray[np.int32] | None = None
    """[vocab]: how often each token was generated; None while no penalty asks for it."""
    in_prompt: npt.NDArray[np.bool_] | None = None
    """[vocab]: tokens of the prompt; None while no repetition penalty asks for it."""
    counted: int = 0
    """Generated tokens in `counts`."""
    bias_ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    bias: Floats = field(default_factory=lambda: np.empty(0, np.float32))


class Sampler:
    """Samples one token per row. Owned by the engine thread; keeps a `SamplerState` per request until it is dropped."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._states: dict[Request, SamplerState] = {}  # requests compare by identity

    def sample(self, logits: torch.Tensor, requests: Sequence[Request], eos_ids: Sequence[int]) -> list[int | SampleError]:
        """The next token of each request.

        logits: [n, vocab], any float type, not changed; row i belongs to requests[i], whose `tokens` hold all that is known.
        A row that holds NaN or +inf, or nothing but -inf, gives a SampleError; so does a request that `check` would refuse.
        """
        plain = all(_is_greedy(r.sampling) and not r.sampling.forced_tokens and not _changes_logits(r) for r in requests)
        if plain and logits.device.type != "cpu":
            best, index = logits.max(dim=-1)  # NaN wins
            return [i if ok else _unusable() for i, ok in zip(index.tolist(), torch.isfinite(best).tolist())]
        rows: Floats = logits.float().cpu().numpy()
        return [self._one(row, request, eos_ids) for row, request in zip(rows, requests, strict=True)]

    def check(self, sampling: SamplingParams) -> None:
        """Raises InvalidRequestError if parameters name tokens outside the vocabulary."""
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(token >= self.vocab_size for token in ids):
                raise InvalidRequestError(
                    f"{name} names token {max(ids)}; allowed: 0 to {self.vocab_size - 1}, the vocabulary of this model",
                    param=name,
                )

    def drop(self, request: Request) -> None:
        """Forget a request that has ended. Unknown requests are ignored."""
        self._states.pop(request, None)

    def _one(self, row: Floats, request: Request, eos_ids: Sequence[int]) -> int | SampleError:
        if request.generated < len(request.sampling.forced_tokens):
            return request.sampling.forced_tokens[request.generated]
        best = int(row.argmax())  # NaN wins; of equals the first
        if not np.isfinite(row[best]):
            return _unusable()
        if _changes_logits(request):
            try:
                row = self._changed(row.copy(), request, eos_ids)
            except InvalidRequestError as error:
                return SampleError(str(error))
            best = int(row.argmax())
            if not np.isfinite(row[best]):
                return _unusable()
        if _is_greedy(request.sampling):
            return best
        return draw(row, request.sampling, uniform(request.seed, request.generated))

    def _changed(self, logits: Floats, request: Request, eos_ids: Sequence[int]) -> Floats:
        """Bias, banned ends and penalties, in place."""
        params = request.sampling
        state = self._state(request)
        logits[state.bias_ids] += state.bias
        if request.generated < params.min_tokens:
            ends = [*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)]
            logits[np.asarray(ends, np.int64)] = -np.inf
        if state.counts is None:
            return logits
        if state.in_prompt is not None:
            seen = state.in_prompt | (state.counts > 0)
            scaled = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits = np.where(seen, scaled, logits)
        logits -= np.float32(params.frequency_penalty) * state.counts.astype(np.float32)
        logits -= np.float32(params.presence_penalty) * (state.counts > 0)
        return logits

    def _state(self, request: Request) -> SamplerState:
        state = self._states.get(request)
        if state is None or state.counted > request.generated:  # new, or tokens were taken back
            state = self._states[request] = self._new_state(request)
        if state.counts is not None:
            new = request.tokens[len(request.prompt) + state.counted :]
            np.add.at(state.counts, np.asarray(new, np.int64), 1)
            state.counted += len(new)
        return state

    def _new_state(self, request: Request) -> SamplerState:
        self._states = {r: s for r, s in self._states.items() if r.status is not Status.FINISHED}
        params = request.sampling
        self.check(params)
        state = SamplerState()
        if params.logit_bias:
            state.bias_ids = np.asarray(list(params.logit_bias), np.int64)
            state.bias = np.asarray(list(params.logit_bias.values()), np.float32)
        if _penalises(params):
            state.counts = np.zeros(self.vocab_size, np.int32)
        if params.repetition_penalty != 1.0:
            state.in_prompt = np.zeros(self.vocab_size, np.bool_)
            state.in_prompt[np.asarray(request.prompt, np.int64)] = True
        return state


def _unusable() -> SampleError:
    return SampleError("the model's logits for this request are not finite, so no token can be chosen")


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def _penalises(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _changes_logits(request: Request) -> bool:
    params = request.sampling
    return _penalises(params) or bool(params.logit_bias) or request.generated < params.min_tokens


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of output `index`: a function of its arguments, and of nothing else."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=index)).random())


class Cut(NamedTuple):
    """A place in a row's sorted order."""

    bucket: int
    mass: float
    """Weight of the tokens up to and including the place."""


class SortedRow:
    """One row's tokens in sorted order (likeliest first, ties by id), of which only what is looked at is ever sorted.

    Tokens fall into buckets by value; a bucket's weight is known at once, its order when a place in it is asked for.
    """

    def __init__(self, logits: Floats, temperature: float, min_p: float) -> None:
        """logits: [vocab] with a finite highest value; temperature at least GREEDY_BELOW."""
        with np.errstate(over="ignore"):  # -inf is the right result
            self._scaled = (logits - logits.max()) / np.float32(temperature)
        weights = np.exp(self._scaled)
        if min_p > 0.0:
            weights[weights < np.float32(min_p)] = 0.0
        self._weights = weights.astype(np.float64)
        self._bucket = np.minimum(self._scaled * -_BUCKETS_PER_UNIT, _BUCKETS - 1).astype(np.int64)
        self._mass = np.cumsum(np.bincount(self._bucket, weights=self._weights, minlength=_BUCKETS))

    def everything(self) -> Cut:
        """After the last token that has any weight."""
        total = float(self._mass[-1])
        return Cut(int(np.searchsorted(self._mass, total, side="left")), total)

    def first(self, count: int) -> Cut:
        """After the `count` likeliest tokens."""
        counts = np.cumsum(np.bincount(self._bucket, minlength=_BUCKETS))
        bucket = int(np.searchsorted(counts, count, side="left"))
        if bucket >= _BUCKETS:
            return self.everything()
        _, mass = self._sorted(bucket)
        before = int(counts[bucket - 1]) if bucket else 0
        return Cut(bucket, float(mass[count - before - 1]))

    def reaching(self, mass: float, within: Cut) -> Cut:
        """After the first token with which the weight so far reaches `mass`, which is at most that of `within`."""
        bucket = min(int(np.searchsorted(self._mass, mass, side="left")), within.bucket)
        _, inside = self._sorted(bucket)
        at = min(int(np.searchsorted(inside, mass, side="left")), len(inside) - 1)
        return Cut(bucket, min(float(inside[at]), within.mass))

    def at(self, mass: float, kept: Cut) -> int:
        """The token over whose share of [0, kept.mass) `mass` lies. Rounding never leads past the cut or to weight 0."""
        bucket = min(int(np.searchsorted(self._mass, mass, side="right")), kept.bucket)
        ids, inside = self._sorted(bucket)
        last = int(np.searchsorted(inside, min(kept.mass, float(inside[-1])), side="left"))
        return int(ids[min(int(np.searchsorted(inside, mass, side="right")), last)])

    def _sorted(self, bucket: int) -> tuple[Ids, npt.NDArray[np.float64]]:
        """A bucket's token ids in order, and the row's weight up to and including each."""
        ids = np.flatnonzero(self._bucket == bucket)
        ids = ids[np.argsort(-self._scaled[ids], kind="stable")]
        before = float(self._mass[bucket - 1]) if bucket else 0.0
        return ids, before + np.cumsum(self._weights[ids])


def draw(logits: Floats, params: SamplingParams, number: float) -> int:
    """The token at `number` in [0, 1) of the distribution that temperature, min_p, top_k and top_p leave."""
    row = SortedRow(logits, params.temperature, params.min_p)
    kept = row.first(params.top_k) if params.top_k > 0 else row.everything()
    if params.top_p < 1.0:
        kept = row.reaching(params.top_p * kept.mass, kept)
    return row.at(number * kept.mass, kept)
