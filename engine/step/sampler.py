"""From logits to the next token: all rows of a step at once, where the logits are.

Owns the order in which a request's parameters act, which is vLLM's:

    structured, allowed_token_ids, bad_words, logit_bias, min_tokens  ->  repetition, frequency, presence penalty
    ->  temperature  ->  min_p  ->  top_k  ->  top_p

Promises that a row's token depends on that row, its request and nothing else: the random number of output i is a function of
(seed, i) alone (Philox with the seed as key and i as counter), so the same seed gives the same text in any batch, and after
preemption. What is drawn for a number is `Kernels.sample`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.device import Download, upload
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.step.masks import NO_MASKS, Mask, Masks
from kvloom.engine.step.restrictions import Restrictions
from kvloom.kernels.interface import Allowed, Kernels

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


class SampleError(Exception):
    """A request cannot go on, and is told why; the others of the batch can. `param`: its field that is to blame, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


Token = int | Exception
"""What a row gives, or why it gives none."""


class Drawn(NamedTuple):
    """A request's next token is to be drawn from a row of logits."""

    request: Request
    known: int
    """Tokens known in front of it: all of them, or fewer for rows before drafts that are verified."""

    @property
    def place(self) -> int:
        """Index of the output that is drawn."""
        return self.known - len(self.request.prompt)

    @property
    def forced(self) -> bool:
        """Whether the request says which token it is."""
        return self.place < len(self.request.sampling.forced_tokens)


class Sampled(NamedTuple):
    """Tokens that have been drawn, perhaps not yet computed."""

    there: Tensor
    """[rows] int64, -1 for rows that no token can be drawn from,"""
    ids: Download
    """and these on their way to the host."""
    errors: Mapping[int, Exception]
    """Rows that could not be prepared, and why."""
    masks: Masks = NO_MASKS
    """What rows might draw."""
    restricted: frozenset[int] = frozenset()
    """Rows whose requests forbid tokens, and may have forbidden all."""

    def read(self) -> list[Token]:
        """Wait for them. A row that holds NaN or inf, or nothing but -inf, gives an error."""
        tokens: list[int] = self.ids.read()
        return [self.errors.get(row, token if token >= 0 else self._unusable(row)) for row, token in enumerate(tokens)]

    def _unusable(self, row: int) -> Exception:
        mask: Mask | None = self.masks.of.get(row)
        if mask is not None:
            return mask.progress.asked.refused("the request's other settings leave no token that it allows; relax them")
        return SampleError(_NO_TOKEN, "bad_words") if row in self.restricted else SampleError(_NOT_FINITE)

    @classmethod
    def nothing(cls) -> Sampled:
        """Of no rows."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(none, Download(none), {})


_NOT_FINITE = "the model's logits for this request are not finite, so no token can be chosen"
_NO_TOKEN = "bad_words and allowed_token_ids leave no token that can be chosen here, or the model's logits are not finite"


class _Seen(NamedTuple):
    """What penalties need to know of one request, kept up token by token."""

    tokens: list[int]
    """Generated so far,"""
    counts: Counter[int]
    """and how often each."""
    repeated: dict[int, None]
    """Those of the prompt and those, each once; nothing while no repetition penalty asks for it."""


class _Edits:
    """Changes of single logits: no token twice in a row."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._tokens: list[npt.NDArray[np.int64]] = []
        self._amounts: list[npt.NDArray[np.float32]] = []

    def add(self, row: int, tokens: Collection[int], amounts: Iterable[float] | float) -> None:
        """Of one row; one amount for each token, or for all."""
        count = len(tokens)
        self._rows.append(np.full(count, row))
        self._tokens.append(np.fromiter(tokens, np.int64, count))
        if isinstance(amounts, float):
            self._amounts.append(np.full(count, amounts, np.float32))
        else:
            self._amounts.append(np.fromiter(amounts, np.float32, count))

    def make(self, logits: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """logits: [n, vocab], in place; change: of the logits concerned and their amounts, [changes] each."""
        if self._rows:
            columns = (self._rows, self._tokens, self._amounts)
            rows, tokens, amounts = (upload(np.concatenate(column), logits.device) for column in columns)
            logits[rows, tokens] = change(logits[rows, tokens], amounts)


class Sampler:
    """Draws one token per row. Remembers what penalties count of a request until it is dropped."""

    def __init__(self, vocab_size: int, kernels: Kernels, encode: Callable[[str], Sequence[int]]) -> None:
        """encode: bad words to token ids, without any that are put around a text."""
        self.vocab_size = vocab_size
        self._kernels = kernels
        self._restrictions = Restrictions(vocab_size, encode)
        self._seen: dict[Request, _Seen] = {}  # requests compare by identity

    def sample(self, logits: Tensor, rows: Sequence[Drawn], eos_ids: Sequence[int], masks: Masks = NO_MASKS) -> Sampled:
        """The next tokens. logits: [n, vocab], any float type, not changed; row i is that of rows[i]. Reads no value of a
        tensor."""
        logits, errors = logits.float(), dict[int, Exception]()
        changing = [i for i, row in enumerate(rows) if _changes_logits(row) and not row.forced]
        hows, looks = [_how(row) for row in rows], {*changing, *(i for i, row in enumerate(rows) if row.forced)}
        if len(looks) < len(rows):
            at_first = [_GREEDY if i in looks else how for i, how in enumerate(hows)]
            ids = self._draw(logits, at_first, range(len(rows)), masks)
        else:
            ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        if changing:  # whose first draw, like that of forced ones, was no more than a look
            which = upload(np.array(changing), logits.device)
            changed = logits[which]
            errors = self._change(changed, [(i, rows[i]) for i in changing], eos_ids, masks)
            ids[which] = self._draw(changed, [hows[i] for i in changing], changing, masks)
        for i, row in enumerate(rows):
            if row.forced:
                ids[i] = row.request.sampling.forced_tokens[row.place]
        restricted = frozenset(i for i in changing if _restricts(rows[i].request.sampling))
        return Sampled(ids, Download(ids), {**errors, **masks.errors}, masks, restricted)

    def open(self, request: Request, eos_ids: Sequence[int]) -> None:
        """A request begins. Raises InvalidRequestError if it leaves itself no token to generate."""
        self._restrictions.check(request.sampling, eos_ids)

    def check(self, sampling: SamplingParams) -> None:
        """Raises InvalidRequestError if what changes logits names tokens outside the vocabulary."""
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(token >= self.vocab_size for token in ids):
                raise InvalidRequestError(
                    f"{name} names token {max(ids)}; allowed: 0 to {self.vocab_size - 1}, the vocabulary of this model",
                    param=name,
                )

    def drop(self, request: Request) -> None:
        """Forget a request that has ended. Unknown requests are ignored."""
        self._seen.pop(request, None)
        self._restrictions.drop(request)

    def _draw(self, logits: Tensor, hows: Sequence[tuple[float, ...]], numbers: Sequence[int], masks: Masks) -> Tensor:
        """Among what masks allow. numbers: by which rows are called among all."""
        how = upload(np.array(hows, np.float64).reshape(-1, 5), logits.device)
        out = torch.empty(len(hows), dtype=torch.int64, device=logits.device)
        allowed: Allowed | None = None
        if masks.bits is not None:
            of = [masks.of[number].row if number in masks.of else -1 for number in numbers]
            allowed = Allowed(masks.bits, upload(np.array(of, np.int32), logits.device))
        return self._kernels.sample(logits, how, out, allowed)

    def _change(
        self, logits: Tensor, rows: Sequence[tuple[int, Drawn]], eos_ids: Sequence[int], masks: Masks
    ) -> dict[int, Exception]:
        """Make what requests forbid -inf, and add bias, bans and penalties to logits, in place. rows: theirs, with the numbers
        by which they are called among all. Returns those for which that failed."""
        added, repeated, counted, errors = _Edits(), _Edits(), _Edits(), dict[int, Exception]()
        self._restrictions.mask(
            logits,
            [(at, row.request) for at, (_, row) in enumerate(rows) if row.request.sampling.allowed_token_ids is not None],
        )
        for at, (i, row) in enumerate(rows):
            try:
                self._edit(at, row, eos_ids, i in masks.of, added, repeated, counted)
            except InvalidRequestError as error:
                errors[i] = SampleError(str(error))
            except Exception as error:  # its request ends, no other is concerned
                errors[i] = error
        added.make(logits, torch.add)
        repeated.make(logits, lambda found, penalty: torch.where(found > 0, found / penalty, found * penalty))
        counted.make(logits, torch.sub)
        return errors

    def _edit(
        self, at: int, row: Drawn, eos_ids: Sequence[int], masked: bool, added: _Edits, repeated: _Edits, counted: _Edits
    ) -> None:
        """The changes of one row, which is row `at` of the logits that change. Raises InvalidRequestError."""
        params = row.request.sampling
        self.check(params)
        bias = dict(params.logit_bias)
        early = row.place < params.min_tokens
        if early:
            bias |= dict.fromkeys(params.stop_token_ids, -np.inf)
        if early and not params.ignore_eos and not masked:  # a mask has seen to it
            bias |= dict.fromkeys(eos_ids, -np.inf)
        banned = self._restrictions.banned(params, row.request.tokens, len(row.request.prompt), row.known)
        bias |= dict.fromkeys(banned, -np.inf)
        seen = self._seen_before(row) if params.penalises else _Seen([], Counter(), {})
        often, once = params.frequency_penalty, params.presence_penalty
        added.add(at, bias, bias.values())
        repeated.add(at, seen.repeated, float(params.repetition_penalty))
        counted.add(at, seen.counts, (often * count + once for count in seen.counts.values()))

    def _seen_before(self, row: Drawn) -> _Seen:
        """What was known of a request before one of its rows."""
        request, begin, repeats = row.request, len(row.request.prompt), row.request.sampling.repetition_penalty != 1.0
        seen = self._seen.get(request)
        if seen is None or seen.tokens != request.tokens[begin : min(begin + len(seen.tokens), row.known)]:
            # new, or tokens were taken back
            seen = self._seen[request] = _Seen([], Counter(), dict.fromkeys(request.prompt if repeats else ()))
        new = request.tokens[begin + len(seen.tokens) : row.known]
        seen.tokens.extend(new)
        seen.counts.update(new)
        seen.repeated.update(dict.fromkeys(new if repeats else ()))
        return seen


_GREEDY = (0.0, 0, 1.0, 0.0, 0.0)


def _how(row: Drawn) -> tuple[float, ...]:
    """See `Kernels.sample`."""
    params = row.request.sampling
    if params.temperature < GREEDY_BELOW or params.top_p == 0:
        return _GREEDY
    number = uniform(row.request.seed, row.place)
    return params.temperature, max(0, params.top_k), params.top_p, params.min_p, number


def _changes_logits(row: Drawn) -> bool:
    params = row.request.sampling
    return params.penalises or _restricts(params) or bool(params.logit_bias) or row.place < params.min_tokens


def _restricts(params: SamplingParams) -> bool:
    return params.allowed_token_ids is not None or bool(params.bad_words)


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of output `index`: a function of its arguments, and of nothing else."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=index)).random())
