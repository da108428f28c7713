"""`echo` of /v1/completions: the prompt's text and log-probabilities in front of what is generated.

An echo is an output that begins with the prompt, so everything behind it (streams, bodies, log-probabilities) needs to know
nothing of it. With max_tokens 0 only the prompt is wanted: the one token that the engine generates all the same is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvloom.engine.request import FinishReason, RequestOutput


class Echo:
    """Puts each completion's prompt in front of its first output."""

    def __init__(self, texts: Sequence[str], prompts: Sequence[Sequence[int]], n: int, *, only: bool) -> None:
        self._texts = texts
        self._prompts = prompts
        self._n = n
        self._only = only
        self._begun: set[int] = set()

    def __call__(self, index: int, output: RequestOutput) -> RequestOutput:
        """The output to write in the place of `output`."""
        if self._only:
            usage = replace(output.usage, completion_tokens=0)
            finish: FinishReason | None = None if output.finish_reason is None else "length"
            output = replace(output, text="", tokens=(), logprobs=(), usage=usage, finish_reason=finish, stop_reason=None)
        if index in self._begun:
            return output
        self._begun.add(index)
        return replace(
            output,
            text=self._texts[index // self._n] + output.text,
            tokens=(*self._prompts[index // self._n], *output.tokens),
            logprobs=(*(output.prompt_logprobs or ()), *output.logprobs),  # type: ignore[arg-type]  # the first is None
        )
