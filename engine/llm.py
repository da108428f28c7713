"""LLM: the engine for scripts. The same core as the server's, driven by the caller's thread.

from kvloom import LLM, SamplingParams

llm = LLM("smollm2")
for result in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0)):
    print(result.text)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvloom.engine.client import EngineStats, ModelInfo
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import FinishReason, KVOptions, Request, RequestOutput, TokenLogprob, Usage
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.startup.build import Progress, build
from kvloom.engine.text import template_of

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(slots=True, kw_only=True)
class Completion:
    """One finished completion."""

    prompt_tokens: tuple[int, ...]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    usage: Usage | None = None

    def add(self, output: RequestOutput) -> None:
        """Append one delta."""
        self.text += output.text
        self.tokens.extend(output.tokens)
        self.logprobs.extend(output.logprobs)
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = output.finish_reason, output.stop_reason, output.error
        self.usage = output.usage


class LLM:
    """A model, its cache and an engine, for use from one thread."""

    def __init__(self, model: str = "smollm2", *, progress: Progress | None = None, **config: Any) -> None:
        """`config`: any setting of `EngineConfig` by name, such as dtype="fp32" or kv_memory="1GiB".

        Raises ModelError, ModelNotFoundError or ConfigError.
        """
        built = build(EngineConfig.from_flat({"model": model, **config}), progress)
        self.core = built.core
        self.model: ModelInfo = built.model
        self.tokenizer = built.tokenizer
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: KVOptions = KVOptions(),
    ) -> list[Completion]:
        """Complete prompts, all in one batch. With n > 1, each prompt gives n results in a row.

        Raises InvalidRequestError (before anything runs) if a prompt cannot be served.
        """
        batch: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        params = [sampling or SamplingParams()] * len(batch) if not isinstance(sampling, Sequence) else list(sampling)
        if len(params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(params)} SamplingParams; give one, or one per prompt")
        requests = [self._request(prompt, choice, kv) for prompt, p in zip(batch, params) for choice in p.choices()]
        return self._run(requests)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: KVOptions = KVOptions(),
    ) -> list[Completion]:
        """Answer one conversation, or several, through the model's chat template.

        A message is {"role": ..., "content": ...}. Raises InvalidRequestError if the model has no chat template.
        """
        template = template_of(self.tokenizer)
        talks: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.tokenizer.encode(template.render(talk), add_special_tokens=False) for talk in talks]
        return self.generate(prompts, sampling, kv=kv)

    def add_segment(self, text: Prompt, *, scope: str = "tenant") -> Mapping[str, Any]:
        """Compile a text alone, so that prompts that hold it can reuse its KV (with kv reuse "approx").

        scope: whom it is for, as in `KVOptions.share`. Returns how many segments, tokens and bytes were stored.
        """
        result = self.generate(
            [text], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), kv=KVOptions(segment=scope)
        )[0]
        return {} if result.usage is None else result.usage.explanation or {}

    def settle(self) -> None:
        """Do the work that the engine keeps for idle times: heal, compile, check. A server does it by itself."""
        while self.core.background.waiting:
            self.core.background.start()
            while self.core.busy:
                self.core.step()

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self.core.stats()

    def _request(self, prompt: Prompt, sampling: SamplingParams, kv: KVOptions) -> Request:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        return Request(id=str(next(self._ids)), prompt=tokens, sampling=sampling, kv=kv, arrival=time.monotonic())

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        results = {request.id: Completion(prompt_tokens=tuple(request.prompt)) for request in requests}
        added = []
        try:
            for request in requests:
                self.core.add(request)
                added.append(request.id)
            while self.core.busy:
                for output in self.core.step():
                    results[output.id].add(output)
        finally:  # also on Ctrl-C: what is not finished gives its blocks back
            for name in added:
                self.core.abort(name)
        return list(results.values())


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
