"""`echo` of /v1/completions: the prompt's text and log-probabilities in front of what is generated.

An echo is an output that begins with the prompt, so everything behind it (streams, bodies, log-probabilities) needs to know
nothing of it. A character that the end of the prompt cuts comes with the output that completes it. With max_tokens 0 only the
prompt is wanted: the one token that the engine generates all the same is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvloom.engine.requests.request import FinishReason, RequestOutput
from kvloom.server.logprobs import Echoed


class Echo:
    """Puts each completion's prompt in front of its first output."""

    def __init__(self, prompts: Sequence[Echoed], n: int, *, only: bool) -> None:
        self._prompts = prompts
        self._n = n
        self._only = only
        self._begun: set[int] = set()

    def prompt_of(self, index: int) -> Echoed:
        """The prompt of a completion."""
        return self._prompts[index // self._n]

    def __call__(self, index: int, output: RequestOutput) -> RequestOutput:
        """The output to write in the place of `output`."""
        if self._only:
            usage = replace(output.usage, completion_tokens=0)
            finish: FinishReason | None = None if output.finish_reason is None else "length"
            output = replace(output, text="", tokens=(), logprobs=(), usage=usage, finish_reason=finish, stop_reason=None)
        if index in self._begun:
            return output
        self._begun.add(index)
        prompt = self.prompt_of(index)
        return replace(
            output,
            text=prompt.text + output.text,
            tokens=(*prompt.tokens, *output.tokens),
            logprobs=(*(output.prompt_logprobs or ()), *output.logprobs),  # type: ignore[arg-type]  # the first is None
        )
