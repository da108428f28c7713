"""A fake engine whose output is a known function of the prompt, and a real small tokenizer: no weights, no torch.

The fake answers with the prompt's tokens, again and again (`echo_tokens`), one per step of its clock, until max_tokens. It
counts what it was asked and what was aborted, and can be told to be slow, to refuse, to fail or to die.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from kvloom.engine.client import EngineStats, GroupStats, Health, ModelInfo, ShareStats, TenantStats
from kvloom.engine.errors import ContextLengthError, EngineDeadError, KVLoomError
from kvloom.engine.requests.request import KVOptions, RequestOutput, TokenLogprob, Usage
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.text import IncrementalDetokenizer, Tokenizer
from kvloom.engine.text.tokenizer import TokenizerSettings
from kvloom.engine.thread.queue_limit import QueueLimit

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = "echo-model"
MAX_MODEL_LEN = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(template: str = TEMPLATE, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A byte-level BPE over a few English words, so that an emoji is four tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog and says hello world"] * 8, trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    eos = backend.token_to_id("<|im_end|>")
    return Tokenizer(backend, TokenizerSettings(eos_ids=(eos,), chat_template=template))


def echo_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake generates: the prompt, repeated and cut to `count` tokens."""
    return [prompt[i % len(prompt)] for i in range(count)]


def _explanation(prompt: Sequence[int], kv: KVOptions) -> Mapping[str, Any] | None:
    """What the last output explains, if anything."""
    if kv.segment is not None:
        return {"segments": 1, "tokens": len(prompt), "bytes": 100 * len(prompt)}
    return {"cached_tokens": len(prompt) // 2, "runs": [], "reason": "a fake"} if kv.explain else None


class FakeEngine:
    """An `EngineClient` for tests."""

    def __init__(self, *, step_seconds: float = 0.0) -> None:
        self.model = ModelInfo(name=MODEL, root="/models/echo", max_model_len=MAX_MODEL_LEN, vocab_size=323, dtype="bf16",
                               weights="bf16", backend="fake", created=1700000000)  # fmt: skip
        self.tokenizer = make_tokenizer()
        self.step_seconds = step_seconds
        self.limit = QueueLimit(1 << 30)
        self.refuse: KVLoomError | None = None
        """Raised instead of the first output."""
        self.fail_after: int | None = None
        """After this many tokens a request ends with finish_reason "error","""
        self.blame: str | None = None
        """and this field of it is to blame."""
        self.says: str | None = None
        """What it answers, instead of the prompt."""
        self.held = False
        """Requests wait in the queue until this is False."""
        self.dead = ""
        self.closed = False
        self.calls: list[dict[str, object]] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.live: set[str] = set()
        self.generated = 0
        self.reused = 0
        """Of every prompt, so many tokens are said to be reused approximately, and one to be recomputed."""
        self.purged: list[str] = []

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, *, request_id: str, kv: KVOptions = KVOptions(),
                       priority: int = 0, tenant: str = "", cache_salt: str = "") -> AsyncIterator[RequestOutput]:  # fmt: skip
        """See `EngineClient`."""
        self.calls.append({"prompt": list(prompt), "sampling": sampling, "kv": kv, "priority": priority, "tenant": tenant,
                           "cache_salt": cache_salt, "id": request_id})  # fmt: skip
        self._check()
        if self.refuse is not None:
            raise self.refuse
        if len(prompt) >= MAX_MODEL_LEN:
            raise ContextLengthError.beyond(MAX_MODEL_LEN, f"the prompt has {len(prompt)} tokens", "prompt")
        assert request_id not in self.live
        self.live.add(request_id)
        done = False
        try:
            async for output in self._steps(prompt, sampling, request_id, kv):
                done = output.finish_reason is not None
                yield output
        finally:
            self.live.discard(request_id)
            (self.finished if done else self.aborted).append(request_id)

    async def _steps(
        self, prompt: Sequence[int], sampling: SamplingParams, name: str, kv: KVOptions
    ) -> AsyncIterator[RequestOutput]:
        while self.held:
            await asyncio.sleep(0.001)
            self._check()
        text = IncrementalDetokenizer(
            self.tokenizer, prompt, skip_special_tokens=sampling.skip_special_tokens, stop=sampling.stop,
            shown=sampling.shown_special_tokens,
        )  # fmt: skip
        limit = min(sampling.most_tokens(MAX_MODEL_LEN - len(prompt)), MAX_MODEL_LEN - len(prompt))
        said = None if self.says is None else self.tokenizer.encode(self.says, add_special_tokens=False)
        for count, token in enumerate(echo_tokens(prompt, limit) if said is None else said[:limit], 1):
            await asyncio.sleep(self.step_seconds)
            self._check()
            usage = Usage(
                prompt_tokens=len(prompt),
                completion_tokens=count,
                cached_tokens=len(prompt) // 2,
                written_tokens=len(prompt) - len(prompt) // 2,
                reused_tokens=self.reused,
                recomputed_tokens=min(1, self.reused),
                attended_tokens=count,
                explanation=_explanation(prompt, kv) if count == limit else None,
            )
            if self.fail_after is not None and count > self.fail_after:
                yield RequestOutput(id=name, finish_reason="error", error="the fake failed", param=self.blame, usage=usage)
                return
            self.generated += 1
            piece, stopped = text.push(token)
            whole = said is not None and count == len(said)
            last = count == limit or whole
            yield RequestOutput(
                id=name,
                text=piece + (text.finish() if last and stopped is None else ""),
                tokens=(token,),
                logprobs=() if sampling.logprobs is None else (self._logprob(token, sampling.logprobs),),
                prompt_logprobs=self._prompt_logprobs(prompt, sampling) if count == 1 else None,
                finish_reason="stop" if stopped is not None else "stop" if whole else "length" if last else None,
                stop_reason=stopped,
                usage=usage,
            )
            if stopped is not None:
                return

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        ranked = [(token, -0.5)] + [((token + i) % 300, -1.0 - i) for i in range(1, top)]
        return TokenLogprob(token, -0.5, 1, tuple(ranked[:top]))

    def _prompt_logprobs(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[TokenLogprob | None, ...] | None:
        if sampling.prompt_logprobs is None:
            return None
        return (None, *(self._logprob(token, sampling.prompt_logprobs) for token in prompt[1:]))

    def _check(self) -> None:
        if self.dead or self.closed:
            raise EngineDeadError(self.dead or "the engine has been shut down")

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """One run that covers the whole prompt; the rest says what was asked."""
        self.calls.append({"prompt": list(prompt), "tenant": tenant, "cache_salt": cache_salt})
        self._check()
        if self.refuse is not None:
            raise self.refuse
        runs = [{"start": 0, "stop": len(prompt), "donor": "context", "scope": "tenant", "shift": 0, "pieces": 1}]
        return {"prompt_tokens": len(prompt), "cached_tokens": 0, "runs": runs, "broken": [], "dropped": []}

    async def peek(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> int:
        """Half of it, as `generate` says."""
        self._check()
        return len(prompt) // 2

    async def purge(self, tenant: str) -> int:
        """Always three."""
        self._check()
        self.purged.append(tenant)
        return 3

    async def reset(self) -> Mapping[str, int]:
        """Always twenty blocks and four segments."""
        self._check()
        return {"blocks": 20, "segments": 4}

    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """Two tenants."""
        self._check()
        known = {
            "": TenantStats(in_use_blocks=10, cached_blocks=20, segment_bytes=1024, tokens={"prefix": 10, "stale": 60}),
            "alice": TenantStats(segment_bytes=3072, tokens={"fresh": 18}),
        }
        return {name: known.get(name, TenantStats()) for name in (known if names is None else names)}

    def reserve(self, tenant: str, tokens: int) -> AbstractContextManager[object]:
        """Nothing is counted unless a test puts a limit of its own here."""
        self._check()
        return self.limit.enter(tenant, tokens)

    async def abort(self, request_id: str) -> None:
        """Closing the iterator is all that is needed here."""

    async def stats(self) -> EngineStats:
        """Two head groups, with numbers that can be told apart."""
        return EngineStats(
            running=len(self.live), waiting=0, capacity_tokens=1600, block_size=16,
            groups=(GroupStats(name="full", total=100, free=70, cached=20, in_use=10),
                    GroupStats(name="local", total=40, free=40, cached=0, in_use=0)),
            prefix_query_tokens=200, prefix_hit_tokens=50, evicted_blocks=3, preemptions=2, prompt_tokens=400,
            generation_tokens=self.generated, steps=7, step_seconds=1.5, queued_tokens=0, kv_bytes={"tail": 1234},
            step_times=(3, 0, 2, *[0] * 13), step_times_sum=0.5,
            step_prompt_rows=(4, 0, 0, 1, *[0] * 7), step_prompt_rows_sum=60,
            replayed_tokens=5, selection_bytes=768, selection_capacity=3 << 20,
            share=ShareStats(
                tokens=Counter(prefix=10, stale=60, boundary=8, ranked=4, fresh=18),
                requests=Counter({("segment", ""): 1, ("full", "too little to reuse"): 2}),
                runs=Counter(context=2, isolated=1, tenant=2, public=1), run_lengths=[1, 0, 2, 0, 0, 0, 1],
                recomputed_shares=[0, 0, 0, 1, 0, 0, 0], match_seconds=0.25, deviation_sum=0.5, deviation_runs=2,
                segments=4, segment_bytes=4096, segment_capacity=8192,
            ),
        )  # fmt: skip

    async def health(self) -> Health:
        """Not ok once `dead` is set."""
        return Health(ok=not self.dead, reason=self.dead)

    def close(self) -> None:
        """Every request ends with EngineDeadError."""
        self.closed = True


def shipped(value: Any) -> Any:
    """The value as it arrives on the other side."""
    return pickle.loads(pickle.dumps(value))


class FarEngine:
    """An `EngineClient` over another that stands far away: what is asked and what is answered is pickled and takes a while."""

    def __init__(self, engine: Any) -> None:
        self.model: ModelInfo = shipped(engine.model)
        self.tokenizer = make_tokenizer()
        self.crossed: Counter[str] = Counter()
        """How often each method was asked across."""
        self._engine = engine
        self._limit = QueueLimit(1 << 30)

    async def generate(self, *args: Any, **how: Any) -> AsyncIterator[RequestOutput]:
        """See `EngineClient`."""
        self.crossed["generate"] += 1
        arriving: asyncio.Queue[bytes] = asyncio.Queue()
        task = asyncio.create_task(self._stream(arriving, *shipped((args, how))))
        try:
            while (item := pickle.loads(await arriving.get())) is not None:
                if isinstance(item, KVLoomError):
                    raise item
                yield item
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _stream(self, arriving: asyncio.Queue[bytes], args: Sequence[Any], how: Mapping[str, Any]) -> None:
        last: KVLoomError | None = None
        try:
            async with aclosing(self._engine.generate(*args, **how)) as outputs:
                async for output in outputs:
                    arriving.put_nowait(pickle.dumps(output))
        except KVLoomError as error:
            last = error
        arriving.put_nowait(pickle.dumps(last))

    async def _ask(self, method: str, *args: Any, **how: Any) -> Any:
        self.crossed[method] += 1
        args, how = shipped((args, how))
        await asyncio.sleep(0.001)
        try:
            answer = await getattr(self._engine, method)(*args, **how)
        except KVLoomError as error:
            raise shipped(error) from None
        return shipped(answer)

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """See `EngineClient`."""
        return await self._ask("explain", prompt, tenant=tenant, cache_salt=cache_salt)

    async def peek(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> int:
        """See `EngineClient`."""
        return await self._ask("peek", prompt, tenant=tenant, cache_salt=cache_salt)

    async def purge(self, tenant: str) -> int:
        """See `EngineClient`."""
        return await self._ask("purge", tenant)

    async def reset(self) -> Mapping[str, int]:
        """See `EngineClient`."""
        return await self._ask("reset")

    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """See `EngineClient`."""
        return await self._ask("tenants", names)

    async def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return await self._ask("stats")

    async def health(self) -> Health:
        """See `EngineClient`."""
        return await self._ask("health")

    async def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        await self._ask("abort", request_id)

    def reserve(self, tenant: str, tokens: int) -> AbstractContextManager[object]:
        """Counted here."""
        return self._limit.enter(tenant, tokens)

    def close(self) -> None:
        """See `EngineClient`."""
        self._engine.close()
