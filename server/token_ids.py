"""`return_token_ids`: token ids beside the text, in vLLM's places.

    chat          `prompt_token_ids` of the answer, and of each completion's first chunk; `token_ids` of each choice
    completions   both of each choice; in a stream, the prompt's with its first chunk

A chunk has the ids of the tokens since the one before: also of those whose text is held back, or that are no text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvloom.server.generation import Work


class TokenIds:
    """Of one request's completions."""

    def __init__(self, work: Work, *, echoed: bool, chat: bool) -> None:
        """echoed: whether outputs begin with the prompt's tokens, which are none of the completion's."""
        self._work, self._chat = work, chat
        self._echoed = [len(work.prompt_of(index)) * echoed for index in range(work.completions)]
        self._waiting: list[list[int]] = [[] for _ in range(work.completions)]
        self._begun: set[int] = set()

    def note(self, index: int, tokens: Sequence[int]) -> None:
        """A completion's next tokens, which a chunk is to bring."""
        skip = min(self._echoed[index], len(tokens))
        self._echoed[index] -= skip
        self._waiting[index].extend(tokens[skip:])

    def chunk(self, index: int, *, opening: bool) -> tuple[str, str]:
        """What a chunk of a completion holds: JSON at the end of its choice, and behind its choices. The opening one of a chat
        has no tokens of the completion yet."""
        inside = "" if opening else f',"token_ids":{_dumps(self._waiting[index])}'
        if not opening:
            self._waiting[index] = []
        if index in self._begun:
            return inside, ""
        self._begun.add(index)
        prompt = f',"prompt_token_ids":{_dumps(self._work.prompt_of(index))}'
        return (inside, prompt) if self._chat else (inside + prompt, "")

    def whole(self, body: dict[str, Any], tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The body of an answer with ids in it. tokens: of each completion, as outputs brought them."""
        for index, given in enumerate(tokens):
            self.note(index, given)
            choice = body["choices"][index]
            choice["token_ids"] = self._waiting[index]
            if not self._chat:
                choice["prompt_token_ids"] = list(self._work.prompt_of(index))
        return body | ({"prompt_token_ids": list(self._work.prompt_of(0))} if self._chat else {})


def _dumps(tokens: Sequence[int]) -> str:
    return json.dumps(tokens, separators=(",", ":"))
