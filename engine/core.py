"""The engine: add requests, take steps. One step is schedule, run, sample, publish.

Single-threaded and synchronous; `thread_client` drives it from a thread of its own, `llm` from the caller's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvloom.engine.cache import CacheManager
from kvloom.engine.client import EngineStats, GroupStats
from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.engine.logprobs import logprobs
from kvloom.engine.output import OutputState
from kvloom.engine.request import KVOptions, Request, RequestOutput, SamplingParams
from kvloom.engine.reuse import REUSE
from kvloom.engine.reuse.prefix import Domain, DomainFactory
from kvloom.engine.runner import Runner, StepResult
from kvloom.engine.sampler import SampleError, Sampler
from kvloom.engine.scheduling import ORDERS, Chunk, Scheduler, StepPlan
from kvloom.engine.selection import SELECTIONS
from kvloom.engine.text import Tokenizer
from kvloom.kernels.interface import Kernels

LOGITS_ROWS = 128
"""Prompt log-probabilities are computed this many rows at a time: a row of logits is as wide as the vocabulary."""


class Limits(NamedTuple):
    """What a request may ask for, whatever else runs."""

    max_model_len: int
    vocab_size: int

    def check(
        self, prompt_length: int, largest_token: int, smallest_token: int, sampling: SamplingParams, kv: KVOptions
    ) -> int:
        """The request's token limit, prompt + output. Raises InvalidRequestError if it could never be served."""
        if prompt_length == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        if smallest_token < 0 or largest_token >= self.vocab_size:
            bad = smallest_token if smallest_token < 0 else largest_token
            raise InvalidRequestError(f"token id {bad} is outside the vocabulary, 0 to {self.vocab_size - 1}", param="prompt")
        room = self.max_model_len - prompt_length
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_length} tokens; this server's context is {self.max_model_len} "
                "tokens, prompt and output together; shorten the prompt",
                param="prompt",
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextLengthError(
                f"max_tokens is {sampling.max_tokens} and the prompt has {prompt_length} tokens; together they exceed this "
                f"server's context of {self.max_model_len}; ask for at most {room}",
                param="max_tokens",
            )
        ids = [*sampling.logit_bias, *sampling.stop_token_ids]
        if any(token >= self.vocab_size for token in ids):
            raise InvalidRequestError(
                f"token id {max(ids)} is outside the vocabulary, 0 to {self.vocab_size - 1}",
                param="logit_bias" if max(ids) in sampling.logit_bias else "stop_token_ids",
            )
        for name, value, allowed in (("selection", kv.selection, SELECTIONS), ("reuse", kv.reuse, REUSE)):
            if value is not None and value not in allowed:
                raise InvalidRequestError(f"kv.{name} is {value!r}; allowed: {', '.join(allowed)}", param=f"kv.{name}")
        return prompt_length + (room if sampling.max_tokens is None else sampling.max_tokens)


class EngineCore:
    """Requests in, outputs out, one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        cache: CacheManager,
        kernels: Kernels,
        tokenizer: Tokenizer,
        domains: DomainFactory,
        limits: Limits,
        eos: frozenset[int],
    ) -> None:
        self.limits = limits
        self.cache = cache
        self._reuse = config.cache.reuse
        self.runner = runner
        self._kernels = kernels
        self._tokenizer = tokenizer
        self._domains = domains
        self._eos = eos
        self._eos_ids = sorted(eos)
        self._sampler = Sampler(limits.vocab_size)
        self._order = ORDERS[config.scheduler.scheduler]
        self._scheduler = Scheduler(
            cache,
            self._order,
            max_seqs=config.scheduler.max_num_seqs,
            max_tokens=config.scheduler.max_batched_tokens,
        )
        self._states: dict[str, OutputState] = {}
        self._sequence = 0
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._step_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return len(self._scheduler) > 0

    @property
    def queued_tokens(self) -> int:
        """Tokens of waiting requests."""
        return self._scheduler.queued_tokens

    def domain(self, tenant: str, salt: str) -> Domain:
        """The scope inside which requests share KV."""
        return self._domains.domain(tenant, salt)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError if it can never be served, or its id is in use."""
        if request.id in self._states:
            raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
        if request.priority and not self._order.uses_priority:
            raise InvalidRequestError(
                f"priority is {request.priority}, but this server runs requests as they come; start it with "
                "--scheduler priority, or leave priority out",
                param="priority",
            )
        prompt = request.prompt
        request.token_limit = self.limits.check(
            len(prompt), max(prompt, default=0), min(prompt, default=0), request.sampling, request.kv
        )
        request.tokens = list(prompt)
        request.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        request.sequence = self._sequence
        self._sequence += 1
        reusing = (request.kv.reuse or self._reuse) == "exact"
        table = self.cache.open(
            self.domain(request.tenant, request.cache_salt),
            publishes=reusing,
            looks_up=reusing and request.sampling.prompt_logprobs is None,  # every prompt row must be computed
        )
        self._states[request.id] = OutputState(request, self._tokenizer, self._eos)
        self._scheduler.add(request, table)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Its full blocks stay reusable. Returns its last output, or None if it is not here."""
        state = self._states.get(request_id)
        return None if state is None else self._finish(state, state.end("abort"))

    def step(self) -> list[RequestOutput]:
        """One step. Returns what it added to each request that got anything."""
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        outputs: list[RequestOutput] = []
        if plan.chunks:
            result = self.runner.run(plan)
            for chunk in plan.chunks:
                self._scheduler.completed(chunk)
            self._score_prompts(plan, result)
            outputs = list(self._sample(plan, result))
        self._steps += 1
        self._step_seconds += time.perf_counter() - began
        return outputs

    def check(self) -> None:
        """Prove that no block is lost. Raises AssertionError."""
        self.cache.check()

    def stats(self) -> EngineStats:
        pool, cache, scheduler = self.cache.pool, self.cache, self._scheduler
        tenants = {
            tenant: {"in_use_blocks": pool.in_use_by[tenant], "cached_blocks": pool.cached_by[tenant]}
            for tenant in sorted(set(+pool.in_use_by) | set(+pool.cached_by))
        }
        group = GroupStats(
            name=cache.storage.spec.name, total=pool.total, free=pool.free, cached=pool.cached, in_use=pool.in_use
        )
        counters = self._kernels.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            capacity_tokens=cache.capacity_tokens,
            block_size=cache.block_size,
            groups=(group,),
            prefix_query_tokens=cache.query_tokens,
            prefix_hit_tokens=cache.hit_tokens,
            evicted_blocks=pool.evictions,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
            queued_tokens=scheduler.queued_tokens,
            kv_bytes_read=counters.kv_bytes + counters.score_bytes,
            tenants=tenants,
        )

    def _sample(self, plan: StepPlan, result: StepResult) -> Iterator[RequestOutput]:
        ends = [(chunk, start + chunk.count - 1) for chunk, start in zip(plan.chunks, result.starts) if chunk.samples]
        if not ends:
            return
        requests = [chunk.request for chunk, _ in ends]
        logits = self.runner.logits(result, [row for _, row in ends])
        for i, sampled in enumerate(self._sampler.sample(logits, requests, self._eos_ids)):
            state = self._states[requests[i].id]
            if isinstance(sampled, SampleError):
                yield self._finish(state, state.end("error", error=str(sampled)))
            else:
                yield self._advance(state, ends[i][0], sampled, logits[i : i + 1])

    def _advance(self, state: OutputState, chunk: Chunk, token: int, logits: Tensor) -> RequestOutput:
        request = state.request
        now = time.monotonic()
        if not request.first_token:
            request.first_token = now
            self._prompt_tokens += len(request.prompt)
        if chunk.count == 1:
            state.attended(chunk.stop)
        request.tokens.append(token)
        self._generation_tokens += 1
        top = request.sampling.logprobs
        output = state.push(token, None if top is None else logprobs(logits, [token], top)[0])
        return output if output.finish_reason is None else self._finish(state, output)

    def _finish(self, state: OutputState, output: RequestOutput) -> RequestOutput:
        self._scheduler.finish(state.request)
        self._sampler.drop(state.request)
        del self._states[state.request.id]
        return output

    def _score_prompts(self, plan: StepPlan, result: StepResult) -> None:
        """Log-probabilities of prompt tokens, for the requests that want them: row p scores token p + 1."""
        for chunk, first in zip(plan.chunks, result.starts):
            request, found = chunk.request, self._states[chunk.request.id].prompt_logprobs
            if found is None:
                continue
            begin, end = len(found) - 1, min(chunk.stop, len(request.prompt) - 1)
            for low in range(begin, end, LOGITS_ROWS):
                high = min(low + LOGITS_ROWS, end)
                rows = [first + position - chunk.start for position in range(low, high)]
                targets = list(request.prompt[low + 1 : high + 1])
                top = request.sampling.prompt_logprobs
                assert top is not None
                found.extend(logprobs(self.runner.logits(result, rows), targets, top))
