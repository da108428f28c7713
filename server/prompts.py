"""From the text of a request to token ids, without holding up the event loop or the engine.

Encoding takes about a millisecond per KiB of text: one short prompt is encoded where it is, since handing work to a thread
costs more; long ones, and many, go to a small pool, in pieces, on which tenants take turns. Its threads give way to the
engine's where cores are few. A text that cannot fit the context is refused before it is encoded, and so is a long one while
too much of its tenant's waits to be computed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.engine.text.chat_template import ChatTemplate, template_of
from kvloom.server.fair_pool import FairPool
from kvloom.server.schema.conversation import Conversation

INLINE_CHARACTERS = 2048
INLINE_TOKENS = 2048
PIECE_CHARACTERS = 128 * 1024
"""Texts are encoded so many characters at a time, or one at a time if it is longer."""
PIECE_TEXTS = 256
CHARACTERS_PER_TOKEN = 6
"""About, or a little more: what a text takes of the queue until its tokens are counted."""
THREADS = 2
NICENESS = 10
MAX_DECODED = 65536
"""Tokens that may be decoded at once, if the context is not longer: a second of the interpreter's time is everybody's."""

_END = 1024
"""Characters at the end of a prompt that tell whether it opens the model's thoughts."""

T = TypeVar("T")


class Cut(NamedTuple):
    """What is kept of a prompt."""

    most: int
    """Tokens."""
    side: str
    """Where others are cut off: left keeps the last ones."""

    def __call__(self, tokens: list[int]) -> list[int]:
        return tokens[-self.most :] if self.side == "left" else tokens[: self.most]


class ChatPrompt(NamedTuple):
    """A conversation as it goes to the model."""

    tokens: list[int]
    end: str
    """Its last characters."""


class PromptEncoder:
    """A tokenizer and its chat template, for use from the event loop."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_model_len: int,
        reserve: Callable[[str, int], AbstractContextManager[object]],
    ) -> None:
        """vocab_size: the model's, which may be more than its tokenizer's: padding of the embedding has ids without text.
        reserve: see `EngineClient.reserve`."""
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._reserve = reserve
        self._pool = FairPool(THREADS, _give_way)
        self._tenant = ""
        self._cut: Cut | None = None
        self._template = functools.cache(lambda: template_of(tokenizer))
        tokenizer.least_tokens("")  # looks through the vocabulary, once

    def of(self, tenant: str) -> PromptEncoder:
        """The same, for the texts of one tenant."""
        own = copy.copy(self)
        own._tenant = tenant
        return own

    def truncating(self, most: int | None, side: str, max_tokens: int | None) -> PromptEncoder:
        """The same, for prompts of which so many tokens are kept, the last ones with side left; -1 for what the context has
        room for beside max_tokens; None for all. Raises InvalidRequestError for more than the context."""
        if most is None:
            return self
        if most > self.max_model_len:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {most}; allowed: -1, or 1 to {self.max_model_len}, this server's context",
                "truncate_prompt_tokens",
            )
        own = copy.copy(self)
        own._cut = Cut(most if most > 0 else max(1, self.max_model_len - max(1, max_tokens or 1)), side)
        return own

    def cut(self, tokens: list[int]) -> list[int]:
        """What is kept of a prompt."""
        return tokens if self._cut is None else self._cut(tokens)

    async def text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises ContextLengthError if it must be longer than the context."""
        return (await self.texts([text], add_special_tokens=add_special_tokens))[0]

    async def texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts."""
        if self._cut is None:
            for text in texts:
                self.check_text(text)
        found: list[list[int]] = []
        with self._room(sum(map(len, texts))):
            for piece in _pieces(texts):
                long = len(texts) > 1 or len(piece[0]) > INLINE_CHARACTERS
                found += await self._run(long, lambda piece=piece: self.tokenizer.encode_batch(piece, add_special_tokens))  # type: ignore[misc]
        return list(map(self.cut, found))

    async def chat(self, conversation: Conversation) -> ChatPrompt:
        """A conversation through the model's chat template. Raises InvalidRequestError if it has none, or knows nothing of what
        is asked of it, and ContextLengthError as `text` does."""
        template = self._template()
        variables = _variables(template, conversation)

        def encode() -> ChatPrompt:
            text = template.render(
                [message.for_template() for message in conversation.messages],
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                tools=[tool.for_template() for tool in conversation.tools],
                variables=variables,
            )
            if self._cut is None:
                self.check_text(text)
            return ChatPrompt(self.cut(self.tokenizer.encode(text, conversation.add_special_tokens)), text[-_END:])

        characters = conversation.length()
        with self._room(characters):
            return await self._run(characters > INLINE_CHARACTERS, encode)

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises InvalidRequestError if it has none."""
        return self._template()

    async def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True, open_end: bool = False) -> str:
        """Text of token ids; `open_end` leaves out a character that is not complete at the end. Raises InvalidRequestError for
        more than MAX_DECODED, or than the context holds."""
        most = max(MAX_DECODED, self.max_model_len)
        if len(tokens) > most:
            raise InvalidRequestError(f"{len(tokens)} tokens are given; allowed: {most} at once; send them in parts", "tokens")
        return await self._run(
            len(tokens) > INLINE_TOKENS, lambda: self.tokenizer.decode(tokens, skip_special_tokens, open_end=open_end)
        )

    async def spelled(self, tokens: Sequence[int]) -> list[str]:
        """A name of each token alone: its text, or its bytes where they are no text."""
        return await self._run(len(tokens) > INLINE_TOKENS, lambda: [self.tokenizer.token_name(token) for token in tokens])

    def check(self, tokens: Sequence[int], param: str = "prompt") -> None:
        """Raises InvalidRequestError if an id is outside the model's vocabulary: the engine's own rule, told earlier."""
        if tokens and max(tokens) >= self._vocab_size:
            raise InvalidRequestError(f"{param} holds the token id {max(tokens)}; allowed: 0 to {self._vocab_size - 1}", param)

    def check_length(self, count: int, param: str = "prompt") -> None:
        """Raises ContextLengthError for a prompt that leaves no room in the context."""
        if count >= self.max_model_len:
            why = f"the prompt has {count} tokens and leaves no room for an answer; shorten the prompt"
            raise ContextLengthError.beyond(self.max_model_len, why, param)

    def check_text(self, text: str, param: str = "prompt") -> None:
        """Raises ContextLengthError for a text that must be longer than the context, without encoding it."""
        least = self.tokenizer.least_tokens(text)
        if least >= self.max_model_len:
            why = f"the text has {len(text)} characters, which are at least {least} tokens; shorten the text"
            raise ContextLengthError.beyond(self.max_model_len, why, param)

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def _room(self, characters: int) -> AbstractContextManager[object]:
        """Room in the queue for a text while it is encoded. Raises OverloadedError if it is long and there is none."""
        long, tokens = characters > INLINE_CHARACTERS, characters // CHARACTERS_PER_TOKEN
        return self._reserve(self._tenant, min(tokens, self.max_model_len)) if long else contextlib.nullcontext()

    async def _run(self, long: bool, work: Callable[[], T]) -> T:
        return await self._pool.run(self._tenant, work) if long else work()


def _variables(template: ChatTemplate, conversation: Conversation) -> dict[str, Any]:
    """Variables of the template: those of the request, and what its reasoning_effort stands for. Raises InvalidRequestError for
    an effort that the template knows nothing of."""
    effort = conversation.reasoning_effort
    if effort is None:
        return dict(conversation.variables)
    if not template.variables & {"reasoning_effort", "enable_thinking"} and effort != "none":
        raise InvalidRequestError(
            f"reasoning_effort is {effort!r}, but the model's chat template reads neither reasoning_effort nor "
            "enable_thinking; leave it out",
            "reasoning_effort",
        )
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **conversation.variables}


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of texts that are encoded together."""
    start, characters = 0, 0
    for i, text in enumerate(texts):
        if i > start and (characters + len(text) > PIECE_CHARACTERS or i - start >= PIECE_TEXTS):
            yield texts[start:i]
            start, characters = i, 0
        characters += len(text)
    yield texts[start:]


def _give_way() -> None:
    """Let other threads go first. The tokenizer's own threads, which the first batch starts, inherit it."""
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
