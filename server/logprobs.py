"""Log-probabilities in the three forms that clients read: chat, completions, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvloom.engine.request import TokenLogprob

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot hold. OpenAI uses the same number."""


def _finite(value: float) -> float:
    return value if value > FLOOR else FLOOR


def chat_logprobs(tokenizer: Any, logprobs: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion, with `top` alternatives per token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": tokenizer.token_text(token), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*pair) for pair in item.top[:top]]} for item in logprobs
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """`choices[].logprobs` of a completion: parallel lists, over as many calls of `take` as a stream has chunks."""

    def __init__(self, tokenizer: Any, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """The lists for the next tokens. A token without log-probabilities, as the first of a prompt, gets nulls.

        The token itself is among its `top_logprobs` even where it is not among the likeliest, as OpenAI documents. Of two
        tokens with the same text (halves of characters) the likelier is shown.
        """
        texts = [self._tokenizer.token_text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if item is None else _finite(item.logprob) for item in logprobs],
            "top_logprobs": [None if item is None else self._alternatives(item) for item in logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, item: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*item.top[: self._top], (item.token, item.logprob)):
            found.setdefault(self._tokenizer.token_text(token), _finite(logprob))
        return found


def prompt_logprobs(tokenizer: Any, logprobs: Iterable[TokenLogprob | None], top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token a map from token id to its log-probability, rank and text."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}

    def position(item: TokenLogprob) -> dict[str, Any]:
        likeliest = {str(token): entry(token, value, rank) for rank, (token, value) in enumerate(item.top[:top], 1)}
        return {str(item.token): entry(item.token, item.logprob, item.rank), **likeliest}

    return [None if item is None else position(item) for item in logprobs]
