"""Log-probabilities in the three forms that clients read: chat, completions, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from kvloom.engine.requests.request import TokenLogprob
from kvloom.engine.text.reader import TokenReader

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot hold. OpenAI uses the same number."""


def _finite(value: float) -> float:
    return value if value > FLOOR else FLOOR


def token_names(tokenizer: Any, as_ids: bool) -> Callable[[int], str]:
    """What tokens are called: by their text, or `token_id:N` (`return_tokens_as_token_ids`)."""
    name: Callable[[int], str] = "token_id:{}".format if as_ids else tokenizer.token_name
    return name


def chat_logprobs(tokenizer: Any, logprobs: Iterable[TokenLogprob], top: int, *, as_ids: bool = False) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion, with `top` alternatives per token."""
    name = token_names(tokenizer, as_ids)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": name(token), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*pair) for pair in item.top[:top]]} for item in logprobs
    ]
    return {"content": content, "refusal": None}


class Echoed(NamedTuple):
    """A prompt that is echoed in front of its completion."""

    text: str
    tokens: Sequence[int]
    given: bool
    """Whether the text is what the client wrote, rather than what the tokens decode to."""


class LegacyLogprobs:
    """`choices[].logprobs` of a completion: parallel lists, over as many calls of `take` as a stream has chunks."""

    def __init__(
        self,
        tokenizer: Any,
        top: int,
        *,
        prompt: Sequence[int] = (),
        echoed: Echoed | None = None,
        skip_special_tokens: bool = True,
        as_ids: bool = False,
    ) -> None:
        """`prompt`: what the completion continues; `echoed`: the same, where the text begins with it."""
        self._tokenizer = tokenizer
        self._name = token_names(tokenizer, as_ids)
        self._top = top
        self._reader = TokenReader(tokenizer, prompt if echoed is None else (), skip_special_tokens=skip_special_tokens)
        self._given = echoed.text if echoed is not None and echoed.given else ""
        self._left = len(echoed.tokens) if self._given and echoed is not None else 0

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """The lists for the next tokens. A token without log-probabilities, as the first of a prompt, gets nulls.

        The token itself is among its `top_logprobs` even where it is not among the likeliest, as OpenAI documents. A token that
        begins inside a character has the offset of that character.
        """
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if item is None else _finite(item.logprob) for item in logprobs],
            "top_logprobs": [None if item is None else self._alternatives(item) for item in logprobs],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def _offset(self, token: int) -> int:
        raw = self._reader.bytes_of(token)
        if self._left:
            self._left -= 1
            if self._tokenizer.is_special(token):  # the client may have written it, or the tokenizer put it there
                written = self._given.startswith(self._tokenizer.token_name(token), self._reader.locate(b""))
                raw = self._tokenizer.token_bytes(token) if written else b""
        return self._reader.locate(raw)

    def _alternatives(self, item: TokenLogprob) -> dict[str, float]:
        """By name; a second token of the same name (there are such vocabularies) goes by its id."""
        own = self._name(item.token)
        found = {}
        for token, logprob in item.top[: self._top]:
            name = self._name(token)
            taken = token != item.token and (name == own or name in found)
            found[f"token_id:{token}" if taken else name] = _finite(logprob)
        found[own] = _finite(item.logprob)
        return found


def prompt_logprobs(tokenizer: Any, logprobs: Iterable[TokenLogprob | None], top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token a map from token id to its log-probability, rank and text."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_name(token)}

    def position(item: TokenLogprob) -> dict[str, Any]:
        likeliest = {str(token): entry(token, value, rank) for rank, (token, value) in enumerate(item.top[:top], 1)}
        return {str(item.token): entry(item.token, item.logprob, item.rank), **likeliest}

    return [None if item is None else position(item) for item in logprobs]
