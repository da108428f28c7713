"""Tokens that a request may not have next, whatever the model says: those it does not allow, and the ends of bad words.

What a request allows is one mask over the vocabulary, made once; its bad words are looked up by the tokens that were generated
last. So a step costs one operation for all masks, and for each row as many lookups as its bad words have lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.device import upload
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams


class BadWords(NamedTuple):
    """Bad words in tokens, by all of their tokens but the last."""

    ends: Mapping[tuple[int, ...], frozenset[int]]
    """Tokens generated last -> those that may not follow."""
    lengths: tuple[int, ...]
    """Of the keys."""

    def at(self, tokens: Sequence[int], begin: int, end: int) -> set[int]:
        """What may not be tokens[end], where tokens from `begin` on were generated."""
        found = (self.ends.get(tuple(tokens[end - length : end])) for length in self.lengths if length <= end - begin)
        return {token for banned in found if banned for token in banned}


class Restrictions:
    """Of running requests, each with what was made of it until it is dropped."""

    def __init__(self, vocab_size: int, encode: Callable[[str], Sequence[int]]) -> None:
        """encode: a text to token ids, without any that are put around it."""
        self._vocab_size, self._encode = vocab_size, encode
        self._masks: dict[Request, Tensor] = {}  # requests compare by identity
        self._words = functools.lru_cache(maxsize=256)(self._encoded)  # completions of one prompt have the same

    def check(self, sampling: SamplingParams, eos_ids: Collection[int]) -> None:
        """Raises InvalidRequestError if nothing could be generated: whatever is allowed is a bad word, or ends too early."""
        if sampling.allowed_token_ids is None:
            return
        may_end = sampling.min_tokens <= len(sampling.forced_tokens)
        early = () if may_end else (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids))
        if {*sampling.allowed_token_ids} <= {*self.banned(sampling, (), 0, 0), *early}:
            raise InvalidRequestError(
                "allowed_token_ids holds only tokens that bad_words or min_tokens forbid; allow one that can be generated",
                param="allowed_token_ids",
            )

    def banned(self, sampling: SamplingParams, tokens: Sequence[int], begin: int, end: int) -> set[int]:
        """Tokens that would end a bad word as tokens[end], where those from `begin` on were generated."""
        return self._words(sampling.bad_words).at(tokens, begin, end) if sampling.bad_words else set()

    def mask(self, logits: Tensor, rows: Sequence[tuple[int, Request]]) -> None:
        """Set what is not allowed to -inf, in place. logits: [n, vocab]; rows: which, and whose, of those that allow some."""
        if rows:
            which = upload(np.array([at for at, _ in rows]), logits.device)
            forbidden = torch.stack([self._forbidden(request, logits.device) for _, request in rows])
            logits[which] = logits[which].masked_fill(forbidden, -torch.inf)

    def drop(self, request: Request) -> None:
        """Forget a request that has ended. Unknown requests are ignored."""
        self._masks.pop(request, None)

    def _forbidden(self, request: Request, device: torch.device) -> Tensor:
        """[vocab] bool."""
        found = self._masks.get(request)
        if found is None:
            assert request.sampling.allowed_token_ids is not None
            mask = np.ones(self._vocab_size, np.bool_)
            mask[np.array(request.sampling.allowed_token_ids)] = False
            found = self._masks[request] = upload(mask, device)
        return found

    def _encoded(self, words: tuple[str, ...]) -> BadWords:
        """Each word as it stands at the beginning of a text, and behind a space."""
        ends: dict[tuple[int, ...], set[int]] = {}
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                if tokens := tuple(self._encode(text)):
                    ends.setdefault(tokens[:-1], set()).add(tokens[-1])
        frozen = {prefix: frozenset(last) for prefix, last in ends.items()}
        return BadWords(frozen, tuple(sorted({len(prefix) for prefix in frozen})))
